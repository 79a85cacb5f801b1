"""Attention activity: largest logits and entropy of each head, from sampled queries.

Records what :mod:`mcore_monitors.catalogue.attention_activity` lists. No rule judges it, so it is
looked at in one sample out of several.
"""

from __future__ import annotations

import torch

from ..calls import AttentionCall
from ..signals.attention import attention_activity, causal_bias
from ..views import ModelView
from .base import Monitor, Readings, Rhythm, StepState, mean_by_layer

_FIELDS = ("max_logit", "entropy", "sequences")


class AttentionActivityMonitor(Monitor):
    """Makes some rows of the attention again at the border of each kernel, on sampled steps only.

    Args:
        model: what the host shows; ``model.activity`` names the local layers and heads.
        queries: how many queries of each sequence are looked at.
        interval: iterations between samples.
        every: looked at in one sample out of this many, the first one included.
        state: tells the hooks which iteration is in progress.
    """

    name = "attention_activity"

    def __init__(
        self,
        model: ModelView,
        queries: int,
        *,
        interval: int = 1,
        every: int = 1,
        state: StepState | None = None,
    ) -> None:
        self._shape = (model.layers, model.heads)
        # largest logit, entropy, sequences: as in the fields, and views on each layer's heads
        shape = len(_FIELDS), *self._shape
        self._sums = torch.zeros(shape, dtype=torch.float64, device=model.device)
        self._of_layer = {
            layer: self._sums[:, layer - 1].narrow(1, view.first_head, view.heads).unbind()
            for layer, view in model.activity.items()
        }
        self._any = False
        self._queries = queries
        self._views = model.activity
        self._rhythm, self._state = Rhythm(interval, every), state or StepState()
        #: the causal mask of the last sequence length
        self._mask: torch.Tensor | None = None

    def restart(self) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._any:
            self._sums.zero_()
            self._any = False

    def schema(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(_FIELDS, self._shape)

    def on_attention(self, layer: int, call: AttentionCall) -> None:
        """Take in one micro-batch.

        Raises:
            ValueError: it holds packed sequences, whose borders the logits would cross.
        """
        if not self._rhythm.is_whole(self._state.iteration):
            return
        if call.packed is not None or call.layout == "thd":
            raise ValueError("packed sequences are not supported; turn this monitor off")
        query = call.arranged(call.query.data, call.heads)
        key = call.arranged(call.key.data, call.groups)
        length = query.shape[0]
        if self._mask is None or self._mask.shape[1] != length:
            self._mask = causal_bias(length, self._queries, query.device)
        found = attention_activity(
            query, key, scale=self._views[layer].scale, queries=self._queries, bias=self._mask
        )
        largest, entropy, sequences = self._of_layer[layer]
        largest += found.max_logit
        entropy += found.entropy
        sequences += query.shape[1]
        self._any = True

    def collect(self, iteration: int, fields: dict[str, torch.Tensor]) -> None:
        if self._any:
            for name, sums in zip(_FIELDS, self._sums, strict=True):
                fields[name] += sums
        self._clear()

    def read(self, fields: dict[str, torch.Tensor]) -> Readings:
        count = fields["sequences"]
        return {
            "attention/max_logit": mean_by_layer(fields["max_logit"], count),
            "attention/entropy": mean_by_layer(fields["entropy"], count),
        }
