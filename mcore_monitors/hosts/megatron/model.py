"""Walk a built Megatron model and describe it to the monitors."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.utils import get_attr_wrapped_model, unwrap_model

from ...parallel import GroupSum
from ...views import ModelView, Replica
from . import identities
from .activity import activity_view
from .graphs import captured
from .main_weights import MainWeights
from .observed import is_observed
from .optimizer_state import optimizer_views
from .router_weights import router_view
from .stream import find_layers
from .weights import attention_views


class MegatronModel:
    """The model chunks of this rank, their process groups and their observed modules.

    Args:
        chunks: what Megatron's ``setup_model_and_optimizer`` returns: a list of (wrapped) models.
        optimizer: and its optimizer, which may keep better weights than the model; or None.

    Attributes:
        attentions, routers: global layer number to the observed core attention or router.
        norms: (global layer number, place in ``NORMS``) to a norm that can be watched.
        outputs: the last layer's number to the output layer, where this rank has it.
        layers: global layer number to the whole layer.
        view: what monitors may see.
    """

    def __init__(self, chunks: list[torch.nn.Module], optimizer: Any = None) -> None:
        self.groups = get_attr_wrapped_model(chunks[0], "pg_collection", allow_none=True)
        if self.groups is None:
            self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.config = get_attr_wrapped_model(chunks[0], "config", allow_none=False)
        self._main = MainWeights(optimizer)
        self.attentions: dict[int, Any] = {}
        self.routers: dict[int, Any] = {}
        self.view = self._describe(chunks)
        self.view.optimizer, left_out = optimizer_views(chunks, optimizer, self.groups)
        self.view.left_out += left_out
        self.norms = identities.find_norms(chunks, self.view)
        self.outputs = identities.find_outputs(chunks, self.view)
        self.layers = find_layers(chunks)
        self._vocabulary = identities.vocabulary_group(chunks, self.groups)

    @property
    def vocabulary(self) -> GroupSum:
        """Sums over the ranks that share a token's logits."""
        return GroupSum(self._vocabulary)

    @property
    def context(self) -> GroupSum:
        """Sums over the ranks that share a sequence."""
        group = getattr(self.groups, "cp", None)
        return GroupSum(group if group is not None and group.size() > 1 else None)

    @property
    def reports_loss(self) -> bool:
        """Whether this rank is the one that records the loss: last stage, first of the others."""
        g = self.groups
        return (
            g.pp.rank() == g.pp.size() - 1 and g.tp.rank() == 0 and g.dp_cp.rank() == 0
        )

    def _describe(self, chunks: list[torch.nn.Module]) -> ModelView:
        config = self.config
        view = ModelView(
            layers=config.num_layers,
            heads=config.num_attention_heads,
            groups=config.num_query_groups,
            experts=config.num_moe_experts or 1,
            device=next(chunks[0].parameters()).device,
            activation_dtype=config.params_dtype,
            sequence_length=0,
            data=_place_in(self.groups.dp),
            head_dim=identities.head_dim(config),
        )
        model = unwrap_model(chunks[0])
        identities.add_identities(view, config, getattr(model, "vocab_size", 0))
        replicas = _place_in(self.groups.dp_cp)
        tp = self.groups.tp
        # a router's weight is the same on all tensor-parallel ranks too
        router_replicas = Replica(
            rank=replicas.rank * tp.size() + tp.rank(), size=replicas.size * tp.size()
        )
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, SelfAttention | MLASelfAttention):
                    self._take_attention(view, module, replicas)
                elif isinstance(module, Router) and not getattr(module, "is_mtp_layer", False):
                    self._take_router(view, module, router_replicas)
        return view

    def _take_attention(self, view: ModelView, attention: Any, replicas: Replica) -> None:
        layer, core = attention.layer_number, attention.core_attention
        if not is_observed(core):
            # e.g. the attention of a multi-token-prediction block, which is not registered
            view.left_out.append(
                f"layer {layer}: its {type(core).__name__} was not built from a registered spec"
            )
            return
        self.attentions[layer] = core
        weights = attention_views(attention, layer, replicas, self._main)
        if isinstance(weights, str):
            view.left_out.append(f"attention updates of layer {layer}: {weights}")
        else:
            view.attention += weights
            if self._main.rounded([p for p in attention.parameters() if p.dim() > 1]):
                view.left_out.append(
                    "fp32 main weights of the attention layers: this optimizer shows none, so "
                    "attention updates are read from 16-bit weights, whose rounding is estimated"
                )
        identities.take_attention(view, attention)
        activity = activity_view(attention)
        if isinstance(activity, str):
            view.left_out.append(f"attention activity of layer {layer}: {activity}")
        else:
            view.activity[layer] = activity

    def _take_router(self, view: ModelView, router: Any, replicas: Replica) -> None:
        if not is_observed(router):
            view.left_out.append(
                f"layer {router.layer_number}: its {type(router).__name__} was not built from a "
                "registered spec"
            )
            return
        if captured(self.config, "router"):
            view.left_out.append(
                "logits of the routers: a CUDA graph captures the routers, and no hook runs in its "
                "replay; signals from the routers' weights are complete"
            )
        else:
            self.routers[router.layer_number] = router
            identities.take_router(view, router)
        view.routers.append(router_view(router, router.layer_number, replicas, self._main))


def _place_in(group: Any) -> Replica:
    """This rank's place among those of one of Megatron's process groups."""
    return Replica(rank=group.rank(), size=group.size())
