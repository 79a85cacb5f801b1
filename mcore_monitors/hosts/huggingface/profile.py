"""Profile a Hugging Face model from its folder, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from ... import __version__
from ...errors import ConfigError, MonitorsError
from ...monitors.base import Readings, StepState
from ...monitors.koopman import KoopmanMonitor
from ...parallel import Packed
from ...views import ModelView, ResidualStream
from .attention import find_attention
from .blocks import attention_width, find_blocks, tapped
from .layers import number_layers

#: tokens of a sequence, where the model takes as many
_LENGTH = 256


def profile_folder(folder: Path, *, rank: int | str, tokens: int, seed: int) -> dict[str, Any]:
    """Run random tokens through a model and profile its layers.

    Args:
        folder: holds ``config.json`` and, for other than new weights, ``*.safetensors``.
        rank: of :class:`KoopmanMonitor`.
        tokens: at most this many are looked at.
        seed: of new weights and of the tokens.

    Returns:
        ``signals``, ``width``, ``versions`` and ``left_out``.

    Raises:
        ConfigError: the folder can't be read safely, or holds no such model.
        MonitorsError: its layers are not found.
    """
    model = _load(folder, seed)
    attentions, _ = find_attention(model, lambda p: p.shape)
    numbers, count = number_layers([a.path for a in attentions], [])
    layers = find_blocks(model, numbers)
    widths = {attention_width(a, lambda p: p.shape) for a in attentions}
    if not layers or len(widths) != 1:
        raise MonitorsError(
            f"profile: the layers of {type(model).__name__} were not found: attentions with query "
            "and key projections in one list of modules, all of one width"
        )
    config = model.config.get_text_config()
    length = min(_LENGTH, tokens, int(getattr(config, "max_position_embeddings", 0) or _LENGTH))
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(
        config.vocab_size, (max(1, tokens // length), length), generator=generator
    )
    signals = _profile(model, layers, count, widths.pop(), batch, rank, tokens)
    return {
        "signals": signals,
        "width": attention_width(attentions[0], lambda p: p.shape),
        "versions": {
            "mcore-monitors": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "left_out": [],
    }


def _load(folder: Path, seed: int) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ConfigError("--hf", str(folder), "a folder with a config.json")
    stored = list(folder.glob("*.safetensors"))
    others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if not stored and others:
        raise ConfigError(
            "--hf", str(folder), "weights as *.safetensors", f"{others[0].name} may hold code."
        )
    torch.manual_seed(seed)
    try:
        if stored:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
            )
        else:
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            config.dtype = torch.float32
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            "--hf", str(folder), "a causal language model that transformers knows", f"{error}"
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval().requires_grad_(False)


def _profile(
    model: nn.Module,
    layers: dict[int, nn.Module],
    count: int,
    width: int,
    batch: torch.Tensor,
    rank: int | str,
    tokens: int,
) -> Readings:
    device = next(model.parameters()).device
    view = ModelView(
        layers=count,
        heads=1,
        groups=1,
        experts=1,
        device=device,
        activation_dtype=torch.float32,
        sequence_length=batch.shape[1],
        residual=ResidualStream(
            width=width,
            sequences=batch.shape[0],
            micro_batch=batch.shape[0],
            layers=tuple(layers),
            length=batch.shape[1],
        ),
    )
    monitor = KoopmanMonitor(view, every=1, rank=rank, tokens=tokens)
    state = StepState(iteration=1, armed=True)
    for number, tap in tapped(layers, state, every=1, evaluation=True).items():
        tap.listeners.append(lambda x, y, number=number: monitor.on_layer(number, x, y))
    model(input_ids=batch.to(device), use_cache=False)
    packed = Packed(monitor.schema(), device)
    with torch.no_grad():
        monitor.collect(1, packed.fields)
    return monitor.read(packed.reduce())
