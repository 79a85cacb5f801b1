"""``mcore-monitors check``: one step of a training, every residual against its limit."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from mcore_monitors.catalogue import SIGNALS, base_name
from mcore_monitors.catalogue.conservation import NORMS
from mcore_monitors.cli.child import Children
from mcore_monitors.cli.settings import OPTIONS, read_settings, with_settings
from mcore_monitors.config import MonitorsConfig
from mcore_monitors.detection.localise import Site, localise
from mcore_monitors.errors import EXIT_BAD_CONFIG, EXIT_BROKEN, MonitorsError
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import HistoryReader
from mcore_monitors.sinks.wording import number

_DESCRIPTION = """\
Runs one forward and backward pass of a training command as it is: its model, data, number format,
kernels and parallelism. Every conservation identity of the backward pass is measured and held
against the limit of the number format. No checkpoint is written and no weight is kept. To be run
after each upgrade of a kernel library, a driver or the hardware.

  0    every identity that was measured holds
  87   an identity is broken; the site is named
  78   a setting cannot be used; nothing was run
  1    nothing could be measured: the command failed, or no identity holds for this model
"""
_EPILOG = """\
Examples:
  mcore-monitors check -- deepspeed --num_accelerators 8 pretrain_gpt.py --mcore-monitors moe.yaml
  mcore-monitors check --config moe.yaml -- torchrun --nproc-per-node 8 pretrain_gpt.py ...
"""
#: lines of a failed command's output that are shown
_TAIL = 25


@dataclass(frozen=True)
class Row:
    """The worst value of one residual in one layer."""

    layer: int
    signal: str
    unit: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the identity holds."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Findings:
    """What a check measured."""

    rows: list[Row]
    sites: list[Site]
    left_out: list[str]
    versions: dict[str, str]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the words of ``mcore-monitors check``."""
    parser = subparsers.add_parser(
        "check",
        help="run one step of a training command and see whether its kernels tell the truth",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mcore-monitors check [options] -- COMMAND ...",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings to use (default: those that COMMAND names, else the defaults)",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="where the run may keep its files meanwhile; on several machines a folder that all "
        "of them see (default: the system's place for such files)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    parser.add_argument(
        "--verbose", action="store_true", help="show what the command prints while it runs"
    )
    parser.add_argument("training", nargs=argparse.REMAINDER, metavar="COMMAND")


def run(args: argparse.Namespace) -> int:
    """Run the check; return its exit code.

    Raises:
        ConfigError: the settings cannot be used.
        MonitorsError: there is no command, it cannot be started, or nothing was measured.
    """
    command = args.training[1:] if args.training[:1] == ["--"] else args.training
    if not command:
        raise MonitorsError(
            "check: no command. Give it behind --, for example: mcore-monitors check -- "
            "deepspeed --num_accelerators 2 train.py --mcore-monitors moe.yaml"
        )
    settings = read_settings(command, args.config)
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="mcore-monitors-check-", dir=args.dir) as folder:
        run_dir = Path(folder) / "run"
        command = with_settings(command, for_check(settings, run_dir), Path(folder))
        code, log = _run(command, Path(folder) / "output.log", show=args.verbose)
        found = read_findings(run_dir)
    if found is None:
        if not args.verbose:
            sys.stderr.write(log)
        if code == EXIT_BAD_CONFIG:
            return code
        raise MonitorsError(
            f"check: nothing was measured; the command ended with exit code {code}. "
            f"{_advice(command)}"
        )
    print_table(found, time.time() - began, sys.stdout)
    if args.json is not None:
        args.json.write_text(json.dumps(to_json(found, time.time() - began), indent=1) + "\n")
    return EXIT_BROKEN if found.sites else 0


def for_check(settings: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The settings of a check: residuals only, at every step, nothing else happens."""
    monitors = {f.name: {"enabled": f.name == "conservation"} for f in fields(MonitorsConfig)}
    detection = {k: v for k, v in (settings.get("detection") or {}).items() if k == "limit"}
    checked = {
        "run_dir": str(run_dir),
        "interval": 1,
        "check": True,
        "monitors": monitors,
        "detection": detection,
        "wandb": {"enabled": False},
        "console": False,
    }
    if settings.get("drill"):
        checked["drill"] = settings["drill"] | {"from_iteration": 1}
    return checked


def _run(command: Sequence[str], log: Path, *, show: bool) -> tuple[int, str]:
    """Run the command; return its exit code and the last of what it printed."""
    children = Children()
    with children.forwarding(), log.open("w+") as output:
        code = children.run(command, None if show else output)
    if children.stopped_by is not None:
        raise MonitorsError(f"check: stopped by {children.stopped_by.name}")
    lines = log.read_text(errors="replace").splitlines(keepends=True)
    return code, "".join(lines[-_TAIL:])


def _advice(command: Sequence[str]) -> str:
    if not any(word.partition("=")[0] in OPTIONS for word in command):
        return "Its last lines are above."
    return (
        "Its last lines are above. Is the host patched (mcore-monitors patch status), and does "
        "the run have a step left to do?"
    )


def read_findings(run_dir: Path) -> Findings | None:
    """What the run recorded, or None where no residual was measured."""
    try:
        samples, events = HistoryReader(run_dir).read(), EventReader(run_dir).read()
    except MonitorsError:
        return None
    starts = [event for event in events if event["kind"] == "start"]
    if not samples or not starts:
        return None
    limits, rows = starts[-1]["limits"], []
    sizes: dict[str, dict[int, list[float]]] = {}
    for signal, layers in samples[-1].signals.items():
        limit = limits.get(base_name(signal))
        if limit is None:
            continue
        for layer, values in layers.items():
            sizes.setdefault(signal, {})[layer] = [value / limit for value in values]
            finite = [unit for unit, value in enumerate(values) if math.isfinite(value)]
            worst = max(finite, key=lambda unit: values[unit], default=None)
            # one sample says little of a direction, unless it says it aloud
            quiet = signal.endswith("_bias") and worst is not None and values[worst] <= limit
            if worst is not None and not quiet:
                name = _unit_name(signal, worst, len(values))
                rows.append(Row(layer, signal, name, values[worst], limit))
    rows.sort(key=lambda row: (row.layer, list(SIGNALS).index(base_name(row.signal))))
    start = starts[-1]
    found = Findings(rows, localise(sizes), start.get("left_out", []), start["versions"])
    return found if rows else None


def _unit_name(signal: str, unit: int, count: int) -> str:
    kind = SIGNALS[base_name(signal)].unit
    if kind == "norm":
        return f"{NORMS[unit]} norm"
    return "" if kind == "layer" else f"{kind} {unit} of {count}"


def print_table(found: Findings, seconds: float, out: IO[str]) -> None:
    """Print every residual of every layer, then what that says."""
    heads = ("layer", "residual", "worst", "value", "limit", "of limit", "")
    lines = [heads]
    for row in found.rows:
        share = f"{row.value / row.limit:.3g}"
        verdict = "holds" if row.holds else "BROKEN"
        values = (number(row.value), number(row.limit), share, verdict)
        lines.append((str(row.layer), row.signal, row.unit, *values))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        cells = [
            cell.ljust(width) if i in (1, 2, 6) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=out)
    for sentence in found.left_out:
        print(f"left out: {sentence}.", file=out)
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    print(f"\n{len(found.rows)} residuals in {seconds:.0f} s; {versions}", file=out)
    for site in found.sites:
        print(f"BROKEN: {site.sentence}.", file=out)
    if not found.sites:
        print("Every identity holds.", file=out)


def to_json(found: Findings, seconds: float) -> dict[str, Any]:
    """The result for machines."""
    return {
        "holds": not found.sites,
        "seconds": round(seconds, 1),
        "versions": found.versions,
        "left_out": found.left_out,
        "sites": [site.sentence for site in found.sites],
        "rows": [vars(row) | {"holds": row.holds} for row in found.rows],
    }
