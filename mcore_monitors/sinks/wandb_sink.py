"""Weights & Biases: a few keys a layer, on a step metric of our own, never in training's way.

Written against the behaviour of wandb 0.31 as seen in a run: ``wandb.init`` without a key asks on a
terminal and raises elsewhere; with a key that is wrong or a server that is away it raises
``CommError`` within ``init_timeout``; an offline run can be started in the same process afterwards.

Keys. ``monitors/iteration`` is the step metric of everything here, because W&B drops rows whose own
step is below the last one, which after a rollback is every replayed row. Of what a rule judges, a
signal with one value a layer is ``<signal>/layer<N>``; a signal over heads or query groups is
``<signal>/layer<N>/min``, ``/p25``, ``/median``, ``/p75``, ``/max`` and ``/worst_head`` or
``/worst_group``, the number of the one nearest to trouble. Of a residual, which only its largest
value can make alarm, there are no quartiles. What is recorded only is ``<signal>/min``, ``/median``
and ``/max`` over the whole model, unless ``wandb.signals`` is ``all``.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from mcore_monitors.catalogue import SIGNALS, base_name, is_judged
from mcore_monitors.files import write_atomically
from mcore_monitors.sample import Sample
from mcore_monitors.sinks.config import WandbConfig
from mcore_monitors.sinks.summary import Spread, largest, mean, spread, worst
from mcore_monitors.sinks.wording import event_text

RUN_ID_FILE = "wandb_run_id"
STEP_METRIC = "monitors/iteration"
#: Seconds that a server may take to let a run begin, before we go on offline.
INIT_TIMEOUT = 20.0
#: Seconds that the upload may take at the end; what is left stays on disk for ``wandb sync``.
FINISH_TIMEOUT = 30.0
#: ``finish_timeout`` begins only when the queue before it is through, and an alert to a server that
#: has gone away is retried for hours (seen with 0.31): so requests give up after 1 + 2 + 4 seconds.
_PATIENCE = {
    "x_graphql_retry_max": 3,
    "x_graphql_retry_wait_min_seconds": 1.0,
    "x_graphql_retry_wait_max_seconds": 4.0,
    "x_graphql_timeout_seconds": 10.0,
}


class WandbSink:
    """Writes to a W&B run that is open already.

    Args:
        run: the run.
        own: whether it is ours to finish; the host's own run is not.
        signals: as ``wandb.signals``.
        windows: windows of the update signals that are judged; None for all.
    """

    def __init__(
        self,
        run: Any,
        *,
        own: bool,
        signals: str = "judged",
        windows: Collection[int] | None = None,
    ) -> None:
        self._run, self._own = run, own
        self._signals, self._windows = signals, windows
        self._defined: set[str] = set()
        self._row: int | None = None
        self._alarms = 0
        run.define_metric(STEP_METRIC, hidden=True)
        run.define_metric("monitors/*", step_metric=STEP_METRIC)

    @property
    def offline(self) -> bool:
        """Whether the run is kept on disk only."""
        return bool(self._run.offline)

    def sample(self, sample: Sample) -> None:
        """Log one row."""
        for name in sample.signals.keys() - self._defined:
            self._run.define_metric(f"{name}/*", step_metric=STEP_METRIC)
            self._defined.add(name)
        keys = keys_of(sample, signals=self._signals, windows=self._windows)
        row = {key: value for key, value in keys.items() if value is not None}
        row["monitors/alarms"] = self._alarms
        if self._own:
            self._run.log(row)
            return
        # The host logs with its own step. A commit of ours would push W&B's step beyond it, and
        # drop what the host still has to say about this iteration; so our row joins the host's,
        # unless that row still carries our last sample (nobody moved the step on in between).
        if self._run.step == self._row:
            self._run.log({}, commit=True)
        self._row = self._run.step
        self._run.log(row, commit=False)

    def event(self, event: Mapping[str, Any]) -> None:
        """Keep what matters in the run's summary; alert on a new diagnosis and at the end of hope.

        A diagnosis comes with the first alarm and when the picture changes, so alerts are few and
        carry the sentence with layer, signal, onset and likely cause. They need a server; the
        summary is kept without one as well.
        """
        kind = event["kind"]
        if kind == "alarm":
            self._alarms += 1
            self._keep("last_alarm", event)
        elif kind == "diagnosis":
            self._keep(kind, event)
            cause = str(event.get("cause")).replace("_", " ")
            self._alert(f"Training alarm: {cause}", event, event.get("severity"))
        elif kind == "gave_up":
            self._keep(kind, event)
            self._alert("The monitors gave up", event, "critical")
        elif kind in ("rollback", "recovered"):
            self._keep(kind, event)

    def close(self, exit_code: int = 0) -> None:
        """Finish the run if it is ours; the host's own writes its open row when it finishes."""
        if self._own:
            self._run.finish(exit_code=exit_code)

    def _keep(self, key: str, event: Mapping[str, Any]) -> None:
        self._run.summary[f"monitors/{key}"] = _line(event)

    def _alert(self, title: str, event: Mapping[str, Any], severity: Any) -> None:
        if not self.offline:
            level = "ERROR" if severity == "critical" else "WARN"
            self._run.alert(title=title[:63], text=_line(event), level=level)


def _line(event: Mapping[str, Any]) -> str:
    return f"iteration {event['iteration']}: {event_text(event)}"


def keys_of(
    sample: Sample, *, signals: str = "judged", windows: Collection[int] | None = None
) -> dict[str, float | int | None]:
    """Return a sample's W&B keys and values; None where a value is unknown.

    Args:
        sample: the sample.
        signals: ``all``, or ``judged`` for few keys of what is recorded only.
        windows: windows of the update signals that are judged; None for all.
    """
    row: dict[str, float | int | None] = {
        STEP_METRIC: sample.iteration,
        "monitors/attempt": sample.attempt,
        "monitors/loss": mean(sample.loss),
        "monitors/grad_norm_max": largest(sample.grad_norm),
        "monitors/learning_rate": sample.learning_rate,
        "monitors/cost_seconds": sample.cost_seconds,
    }
    for name, layers in sample.signals.items():
        info = SIGNALS.get(base_name(name))
        if signals != "all" and not is_judged(name, windows):
            everything = spread(value for values in layers.values() for value in values)
            row |= _keys(name, everything, quartiles=False)
            continue
        for layer, values in layers.items():
            seen, key = spread(values), f"{name}/layer{layer}"
            if info is not None and info.unit == "layer":
                row[key] = seen.middle if seen else None
                continue
            row |= _keys(key, seen, quartiles=info is None or info.watch != "limit")
            place = worst(name, {layer: values})
            if info is not None and info.watch != "record":
                row[f"{key}/worst_{info.unit.split()[-1]}"] = place.unit if place else None
    return row


def _keys(key: str, seen: Spread | None, *, quartiles: bool) -> dict[str, float | None]:
    names = {"min": "low", "median": "middle", "max": "high"}
    if quartiles:
        names |= {"p25": "quarter", "p75": "three_quarters"}
    return {f"{key}/{name}": getattr(seen, value, None) for name, value in names.items()}


def open_wandb(
    config: WandbConfig,
    run_dir: str | os.PathLike[str],
    *,
    say: Callable[[str], None],
    writer: Any = None,
    windows: Collection[int] | None = None,
    init_timeout: float = INIT_TIMEOUT,
    finish_timeout: float = FINISH_TIMEOUT,
) -> WandbSink | None:
    """Return a sink on the host's W&B run, else on a run of our own, else None. Never raises.

    Args:
        config: the settings.
        run_dir: run folder; our own run's files go to ``RUN/wandb``, its id to
            ``RUN/wandb_run_id``, so that a relaunch goes on with the same run (online) or joins the
            same group (offline, where W&B cannot resume).
        say: prints one message.
        writer: the host's initialised ``wandb`` module or run, if it has one.
        windows: windows of the update signals that are judged; None for all.
        init_timeout: seconds that the server may take before we go on offline.
        finish_timeout: seconds that the upload may take at the end.
    """
    if config.enabled is False:
        return None
    try:
        import wandb
    except ImportError:
        say("W&B is off: the package wandb is not installed (pip install wandb).")
        return None
    except Exception as error:
        say(f"W&B is off: the package wandb cannot be imported. {_short(error)}")
        return None
    try:
        run = writer.run if isinstance(writer, ModuleType) else writer
        run = run if run is not None else wandb.run
        if run is not None:
            return WandbSink(run, own=False, signals=config.signals, windows=windows)
        run = _own_run(wandb, config, Path(run_dir), say, init_timeout, finish_timeout)
        if run is None:
            return None
        return WandbSink(run, own=True, signals=config.signals, windows=windows)
    except Exception as error:
        say(f"W&B is off: {_short(error)}")
        return None


def _own_run(
    wandb: ModuleType,
    config: WandbConfig,
    run_dir: Path,
    say: Callable[[str], None],
    init_timeout: float,
    finish_timeout: float,
) -> Any:
    """A W&B run of our own, or None where W&B is disabled."""
    known = wandb.setup().settings
    if known.mode == "disabled":
        say("W&B is off: WANDB_MODE is disabled.")
        return None
    identity = _stable_id(run_dir)
    common: dict[str, Any] = {
        "project": config.project,
        "entity": config.entity,
        "name": config.name or run_dir.resolve().name,
        "group": identity,
        "dir": str(run_dir),
    }
    settings = {"silent": True, "console": "off", "finish_timeout": finish_timeout}
    if known.mode in ("offline", "dryrun"):
        why = f"WANDB_MODE is {known.mode}"
    elif not _has_key(known):
        why = "no API key was found"
    else:
        try:
            run = wandb.init(
                **common,
                id=identity,
                resume="allow",
                settings=wandb.Settings(**settings, **_PATIENCE, init_timeout=init_timeout),
            )
            say(f"W&B: {run.url}")
            return run
        except Exception as error:
            why = f"the server could not be used ({_short(error)})"
    # An offline run cannot resume, and `wandb sync` of one id twice would overwrite: a new id each
    # time, in the same group.
    run = wandb.init(
        **common,
        id=f"{identity}-{secrets.token_hex(3)}",
        mode="offline",
        settings=wandb.Settings(**settings),
    )
    say(f"W&B is offline: {why}. Upload later with: wandb sync {Path(run.dir).parent}")
    return run


def _stable_id(run_dir: Path) -> str:
    path = run_dir / RUN_ID_FILE
    if path.exists():
        known = path.read_text().strip()
        if known:
            return known
    identity = secrets.token_hex(4)
    write_atomically(path, identity + "\n")
    return identity


def _has_key(settings: Any) -> bool:
    """Whether W&B would find a key without asking; looks where it looks, without a connection.

    ``wandb.login`` is no help: it verifies over the network, for ten seconds without a server.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if settings.api_key:
        return True
    hosts = {urlsplit(settings.base_url).netloc, "api.wandb.ai"}
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            entries = netrc.netrc(os.path.expanduser(name)).hosts if name else {}
        except (OSError, netrc.NetrcParseError):
            continue
        if hosts & entries.keys():
            return True
    return False


def _short(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
