"""Pretrain a GPT with nothing but the megatron-core wheel.

    deepspeed --num_accelerators 2 --no_local_rank launch/pretrain_gpt.py <Megatron's arguments>

An ordinary Megatron script, the size of one: datasets, batch, loss, and a call of ``pretrain``. For
those who have no checkout of Megatron-LM, whose own pretrain_gpt.py serves as well. Dense and
mixture-of-experts models, local or Transformer Engine layers, as the arguments say. Works with
megatron-core 0.18 and 0.19, whose ``pretrain`` take the model in different ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import argument_utils, get_args, pretrain
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Build the training, validation and test data sets of the given numbers of samples."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    # Every tensor-parallel rank reads its data itself: the samples depend on the data-parallel
    # rank alone, so that no broadcast is needed.
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        partial(is_first_or_last_pipeline_stage, vp_stage),
        config,
    ).build()


datasets.is_distributed = True


def get_batch(data_iterator: Iterator[Any], vp_stage: int | None) -> list[torch.Tensor | None]:
    """Return the tensors named in ``_KEYS`` [micro batch, sequence], None where not needed."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return [None] * len(_KEYS)
    batch = {k: v.cuda(non_blocking=True) for k, v in next(data_iterator).items() if k in _KEYS}
    if mpu.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
        )
    return [batch.get(key) for key in _KEYS]


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed loss, the number of tokens, and both for the log."""
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
    """Run one micro batch forward."""
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator, vp_stage)
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """Build the model of this pipeline stage (for releases before the model builder)."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = core_transformer_config_from_args(args) if config is None else config
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=args.transformer_impl == "transformer_engine",
        normalization=args.normalization,
        qk_l2_norm=args.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def keep_compiled_helper() -> None:
    """Use the compiled data helper of the wheel, which has no makefile to build it anew with."""
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:  # a checkout before its first run
        return
    utils.compile_helpers = lambda: None


def main() -> None:
    """Parse Megatron's arguments and train."""
    keep_compiled_helper()
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    model = {"model_type": ModelType.encoder_or_decoder, "forward_step_func": forward_step}
    if hasattr(argument_utils, "gpt_config_from_args"):
        model_config = argument_utils.gpt_config_from_args(args)
    else:
        model_config, model["model_provider"] = None, model_provider
    container = argument_utils.pretrain_cfg_container_from_args(args, model_config)
    pretrain(container, datasets, **model)


if __name__ == "__main__":
    main()
