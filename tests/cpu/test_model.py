"""A GPT of Megatron trains under the stand-in."""

from __future__ import annotations

import pytest

from tests.cpu.fresh import run


@pytest.mark.parametrize("experts", [None, 4])
def test_a_model_trains(experts):
    """Forward, backward and one step of Megatron's optimizer lower the loss of a batch."""
    result = run(
        """
        import sys
        from mcore_monitors import cpu
        cpu.install()
        import torch
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.transformer_config import TransformerConfig
        experts = int(sys.argv[1]) or None
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(),
                                             rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        config = TransformerConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, normalization="RMSNorm",
            use_cpu_initialization=True, add_bias_linear=False, num_moe_experts=experts,
            moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.01, persist_layer_norm=False, masked_softmax_fusion=False,
            gradient_accumulation_fusion=False, bias_dropout_fusion=False, hidden_dropout=0.1,
        )
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        model = GPTModel(config=config, transformer_layer_spec=spec, vocab_size=64,
                         max_sequence_length=16, position_embedding_type="rope").cuda()
        tokens = torch.randint(0, 64, (2, 16), device="cuda")
        positions = torch.arange(16, device="cuda").expand(2, 16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(tokens, positions, None, labels=tokens).mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        result = [losses, missing]
        """,
        str(experts or 0),
    )
    losses, missing = result
    assert losses[-1] < losses[0] - 0.5, losses
    assert missing == []
