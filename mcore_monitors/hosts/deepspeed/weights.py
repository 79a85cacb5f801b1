"""Whole weights out of DeepSpeed's shards.

Where a weight lives, and what it costs to read it, in bytes a rank receives for ``n`` elements:

===========================  ====================================  =========
training in                  read from                             traffic
===========================  ====================================  =========
fp32, stages 0 to 2          the parameter                         none
bf16 or fp16, stages 1, 2    the optimizer's fp32 shards           8 n (all-reduce)
any format, stage 3          the optimizer's fp32 shards           4 n (all-gather)
stage 3, frozen parameter    the parameter's shards                size of the parameter
bf16 or fp16, stage 0        fp32 copy if it is linked, else the   as above or none
                             parameter
===========================  ====================================  =========

Only the parameters that are asked for are gathered, one after another, and only for as long as the
caller keeps the result. DeepSpeed's own state (which parameters are gathered, its trace of
modules) is left as it is, so the training that follows is bitwise the same.
"""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param


def gathers(parameter: torch.nn.Parameter) -> bool:
    """Whether reading this weight takes a collective; the same answer on every rank."""
    return _sharded(parameter) or _has_main_weight(parameter)


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole weight in the best format that is kept of it, without a gradient.

    A collective where :func:`gathers` says so: then all ranks call it, in the same order.
    """
    if _sharded(parameter):
        if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
            return safe_get_full_fp32_param(parameter).detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if _has_main_weight(parameter):
        return safe_get_full_fp32_param(parameter).detach()
    return parameter.detach()


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of the whole weight; stage 3 leaves an empty tensor in the module."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _sharded(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _has_main_weight(parameter: torch.nn.Parameter) -> bool:
    """Whether the optimizer keeps fp32 shards of a parameter of a lower format."""
    return parameter.dtype != torch.float32 and hasattr(parameter, "_hp_mapping")
