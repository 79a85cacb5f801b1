"""``mcore-monitors check``: one step of a training, every residual against its limit."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from mcore_monitors.catalogue import SIGNALS, base_name
from mcore_monitors.catalogue.conservation import EVIDENCE, NORMS
from mcore_monitors.cli.columns import print_columns
from mcore_monitors.cli.trial import add_options, trial
from mcore_monitors.config import MonitorsConfig
from mcore_monitors.detection.localise import Site, localise
from mcore_monitors.errors import EXIT_BROKEN, MonitorsError
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the check; return its exit code.

    Raises:
        ConfigError: the settings cannot be used.
        MonitorsError: there is no command, it cannot be started, or nothing was measured.
    """
    began = time.time()
    with trial("check", args, for_check) as tried:
        found = read_findings(tried.run_dir)
        if found is None:
            return tried.measured_nothing()
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
            quiet = signal in EVIDENCE and worst is not None and values[worst] <= limit
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
    print_columns(lines, out, left=(1, 2, 6))
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
