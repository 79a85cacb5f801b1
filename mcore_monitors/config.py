"""The one schema: Megatron's YAML file and DeepSpeed's JSON key hold the same settings.

Each room's settings are a dataclass beside the component they configure; this file puts them
together, reads them and turns every mistake into one sentence that names the setting. Nothing in a
configuration can name code: there is no path from a value to an import.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from .detection.config import DetectionConfig
from .errors import ConfigError, nearest
from .faults.config import DrillConfig
from .recovery.config import RecoveryConfig
from .sinks.config import WandbConfig
from .windows import SELDOM, default_judged, default_windows

#: ``auto`` watches what the model has; ``true`` insists, so that a run without it does not start
Enabled = Literal["auto"] | bool
Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class AttentionUpdateConfig:
    """Attention-update signals from the query and key weights."""

    enabled: Enabled = "auto"
    #: iterations between the two weights that are compared; multiples of ``interval``. None: the
    #: usual 10, 50 and 200, brought to multiples of ``interval``
    windows: Annotated[list[Positive], Field(min_length=1)] | None = None
    #: where the earlier weights are kept: on the device, or in the host's (pinned) memory
    snapshots: Literal["device", "host"] = "device"
    #: what no rule judges (other windows, and all but Δ2) is told at one sample out of this many
    every: Positive = SELDOM


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Router signals of mixture-of-experts layers."""

    enabled: Enabled = "auto"
    #: tokens that count: ``all`` since the last sample, or those of the ``sampled`` step only
    tokens: Literal["all", "sampled"] = "all"
    #: what no rule judges (quantiles, load, margin and others) is told at one sample out of this
    #: many, the first one included; weights and mean entropy at every sample
    every: Positive = SELDOM


@dataclass(frozen=True, kw_only=True)
class ConservationConfig:
    """Conservation residuals of the attention's backward pass."""

    enabled: Enabled = "auto"
    #: look at every sequence and token of each sample, not at some of them in turn; costs more
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionActivityConfig:
    """Largest logits and entropy of the attention."""

    enabled: Enabled = "auto"
    #: queries of a sequence that are looked at; sequences up to this length are looked at whole
    queries: Positive = 16
    #: looked at in one sample out of this many, the first one included
    every: Positive = SELDOM


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Update sizes and gradient spikes from Adam's state."""

    enabled: Enabled = "auto"
    #: layers take turns: each is read at one sample out of this many
    every: Positive = 40


@dataclass(frozen=True, kw_only=True)
class KoopmanConfig:
    """Residual Koopman profile of the layers, now and then."""

    enabled: Enabled = False
    #: iterations between profiles; a multiple of ``interval``
    every: Positive = 1000
    #: modes of a layer; ``full``: all of them; ``auto``: full up to hidden size 256, else 32
    rank: Positive | Literal["auto", "full"] = 32
    #: tokens of a step that are looked at, at most
    tokens: Positive = 2048


@dataclass(frozen=True, kw_only=True)
class MonitorsConfig:
    """Which families of signals are watched."""

    attention_update: AttentionUpdateConfig = field(default_factory=AttentionUpdateConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    conservation: ConservationConfig = field(default_factory=ConservationConfig)
    attention_activity: AttentionActivityConfig = field(default_factory=AttentionActivityConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    koopman: KoopmanConfig = field(default_factory=KoopmanConfig)


@dataclass(frozen=True, kw_only=True)
class KssConfig:
    """Koopman spectral shaping: a loss term that changes the training (docs/koopman.md)."""

    #: weight of the term in the loss
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.15
    #: soft near-unit mass that the layers are pulled to
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.4
    #: weight of that pull; 0 only brings modes inside of the unit circle
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    #: steepness of the soft borders of the near-unit mass
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    #: iterations between shaped ones, counted on absolute iterations
    interval: Positive = 10
    #: share of the layers that is shaped at a time, drawn anew each time
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    #: modes of a layer that are looked at, at most the hidden size
    rank: Annotated[int, Field(ge=2)] = 32
    #: of the draws
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set."""

    #: schema version of this file
    version: Literal[1] = 1
    #: folder for the history, events, recovery state, offline W&B files and the report
    run_dir: Annotated[str, Field(min_length=1)]
    #: iterations between samples, counted on absolute iterations
    interval: Positive = 10
    #: make an error inside a monitor fatal instead of disabling the monitor
    strict: bool = False
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    #: one line a sample on rank 0
    console: bool = True
    #: a fault to inject on purpose; for rehearsals only
    drill: DrillConfig | None = None
    #: shape the layers' spectra with a loss term; null is off
    kss: KssConfig | None = None
    #: end the run after the first sample and write no checkpoint; ``mcore-monitors check`` sets it
    check: bool = False
    #: end the run before its first optimizer step; ``mcore-monitors profile`` sets it
    profile: bool = False

    def __post_init__(self) -> None:
        update = self.monitors.attention_update
        if update.windows is None:
            update = replace(update, windows=default_windows(self.interval))
            # what the rest of the program reads are the windows themselves, never "the usual ones"
            object.__setattr__(self, "monitors", replace(self.monitors, attention_update=update))
        for window in update.windows:
            if window % self.interval:
                raise ConfigError(
                    "monitors.attention_update.windows",
                    window,
                    f"multiples of interval ({self.interval}), since snapshots are taken there",
                )
        koopman = self.monitors.koopman
        if koopman.enabled is not False and koopman.every % self.interval:
            raise ConfigError(
                "monitors.koopman.every",
                koopman.every,
                f"a multiple of interval ({self.interval}), since samples are taken there",
            )
        judged = self.detection.windows
        if judged is None:
            detection = replace(self.detection, windows=default_judged(update.windows))
            object.__setattr__(self, "detection", detection)
        elif missing := [window for window in judged if window not in update.windows]:
            raise ConfigError(
                "detection.windows",
                missing[0],
                "windows of monitors.attention_update.windows "
                f"({', '.join(map(str, sorted(update.windows)))}), or [] to judge none",
            )
        if self.recovery.mode == "rollback":
            windows = () if update.enabled is False else self.detection.windows
            self.recovery.check_quiet(self.detection.slowest_delay(self.interval, windows))


def load(path: str | Path) -> Config:
    """Read a YAML configuration file.

    Raises:
        ConfigError: the file is missing, is no YAML, or a setting in it cannot be used.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(
            "--mcore-monitors", str(path), "the path of a YAML file", f"{error.strerror}."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError("--mcore-monitors", str(path), "a YAML file", "It is no text.") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError("--mcore-monitors", str(path), "a YAML file", where) from None
    return from_dict(data, source=str(path))


def from_dict(data: Any, source: str = "mcore_monitors") -> Config:
    """Check settings that were read from YAML or JSON.

    Args:
        data: the settings as plain dicts, lists and scalars.
        source: what to call them in an error about the whole.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is out of range.
    """
    if not isinstance(data, dict):
        raise ConfigError(source, data, "settings as 'key: value' lines", "At least run_dir.")
    _refuse_unknown_keys(Config, data, ())
    try:
        text = json.dumps(data, default=str)
    except (TypeError, ValueError) as error:  # a date as a key, a list that holds itself
        raise ConfigError(source, "its content", "what JSON can hold", f"{error}.") from None
    try:
        # Strict JSON: "10" is no integer, yet a mapping may stand for a dataclass.
        return _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
        first, place = found[0], _place(found[0])
        allowed = dict.fromkeys(_in_words(e["msg"]) for e in found if _place(e) == place)
        missing = first["type"] == "missing"
        raise ConfigError(
            place or source,
            None if missing else first["input"],
            "a value; this setting is required" if missing else " or ".join(allowed),
            _nearest_choice(first["input"], allowed),
        ) from None


#: what pydantic calls a type that it tried
_TRIED = ("bool", "int", "constrained-int", "float", "str", "none")


def _place(error: ErrorDetails) -> str:
    """Dotted setting of an error; pydantic puts the tried type of a union behind it."""
    parts = []
    for part in error["loc"]:
        if part in _TRIED or set("[]") & set(str(part)):
            break
        parts.append(str(part))
    return ".".join(parts)


#: pydantic speaks of JSON; a user wrote YAML
_WORDS = {
    "an object": "settings below it, as 'key: value' lines",
    "array": "a list",
    "boolean": "true or false",
    "integer": "an integer",
    "string": "a text",
}


def _in_words(message: str) -> str:
    words = message.removeprefix("Input should be ").removeprefix("a valid ").rstrip(".")
    return _WORDS.get(words, words)


def _nearest_choice(value: Any, allowed: Iterable[str]) -> str | None:
    """The nearest of the words that ``allowed`` gives in quotes."""
    choices = re.findall(r"'(\w+)'", " ".join(allowed))
    return nearest(value, choices) if isinstance(value, str) else None


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type hint allows, through Optional, dict values and Annotated."""
    if is_dataclass(hint):
        return hint
    for part in get_args(hint) if get_origin(hint) is not None else ():
        if found := _dataclass_in(part):
            return found
    return None


def _refuse_unknown_keys(kind: type, data: dict, path: tuple[str, ...]) -> None:
    known = {f.name for f in fields(kind)}
    hints = get_type_hints(kind)
    for key, value in data.items():
        if key not in known:
            raise ConfigError(
                ".".join((*path, str(key))),
                value,
                "no such setting here; there are " + ", ".join(sorted(known)),
                nearest(str(key), known),
            )
        inner = _dataclass_in(hints[key])
        if inner is None or not isinstance(value, dict):
            continue
        if get_origin(hints[key]) is dict:
            for name, item in value.items():
                if isinstance(item, dict):
                    _refuse_unknown_keys(inner, item, (*path, key, str(name)))
        else:
            _refuse_unknown_keys(inner, value, (*path, key))


_ADAPTER = TypeAdapter(Config)
