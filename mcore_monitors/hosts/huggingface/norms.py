"""Norms and the output layer of a model, found by what they are called and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...catalogue.conservation import NORMS
from ..observed_norm import norm_form
from .attention import FoundAttention

#: names of a layer's norms in the order of ``NORMS``, without the final one
_NAMES = (
    ("input_layernorm", "ln_1", "attention_norm", "self_attn_layer_norm"),
    ("post_attention_layernorm", "ln_2", "ffn_norm", "moe_norm", "mlp_norm"),
)
#: names of the norm behind the last layer
_FINAL = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


def find_norms(
    module: nn.Module,
    layers: Mapping[int, nn.Module],
    attentions: Mapping[int, FoundAttention],
) -> tuple[dict[tuple[int, int], nn.Module], list[str]]:
    """(layer, place in ``NORMS``) to each norm whose identity is known; sentences on the others.

    Where a layer has norms behind its attention and its MLP as well (``pre_feedforward_layernorm``
    beside ``post_attention_layernorm``), only the one in front of the MLP counts as such.

    Args:
        module: the whole model.
        layers: layer number to the module that holds it.
        attentions: layer number to its attention.
    """
    found: dict[tuple[int, int], nn.Module | None] = {}
    for number, layer in layers.items():
        children = dict(layer.named_children())
        names = (_NAMES[0], ("pre_feedforward_layernorm",) + _NAMES[1])
        for unit, some in enumerate(names):
            found[number, unit] = next((children[n] for n in some if n in children), None)
    for number, attention in attentions.items():
        found[number, NORMS.index("query")] = attention.query_norm
        found[number, NORMS.index("key")] = attention.key_norm
    if layers:
        last = max(layers)
        found[last, NORMS.index("final")] = _behind(module, layers[last])
    known, unknown = {}, []
    for place, norm in found.items():
        if norm is None:
            continue
        form = norm_form(norm)
        if isinstance(form, str):
            unknown.append(f"{NORMS[place[1]]} norms: {form}")
        else:
            known[place] = norm
    return known, list(dict.fromkeys(unknown))


def _behind(module: nn.Module, layer: nn.Module) -> nn.Module | None:
    """The final norm: it stands beside the list of the layers."""
    for holder in module.modules():
        if any(layer in list(c) for c in holder.children() if isinstance(c, nn.ModuleList)):
            children = dict(holder.named_children())
            return next((children[n] for n in _FINAL if n in children), None)
    return None


def find_output(module: nn.Module) -> tuple[nn.Module | None, str | None]:
    """The layer that gives the logits, or why its gradients' sum over the vocabulary isn't zero."""
    for part in module.modules():
        give = getattr(part, "get_output_embeddings", None)
        output = give() if callable(give) else None
        if isinstance(output, nn.Module):
            if _setting(part, "final_logit_softcapping") is not None:
                return None, "vocabulary shift: the soft cap on the logits scales each differently"
            return output, None
    return None, None


def _setting(part: nn.Module, name: str) -> Any:
    return getattr(getattr(part, "config", None), name, None)
