"""``mcore-monitors profile``: what each layer of a model does to its residual stream."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from mcore_monitors.cli.profile_result import (
    Profiled,
    from_signals,
    print_profile,
    risk_of,
    to_json,
)
from mcore_monitors.cli.trial import add_options, command_of, trial
from mcore_monitors.config import MonitorsConfig
from mcore_monitors.errors import ConfigError, MonitorsError
from mcore_monitors.sinks.events import EventReader
from mcore_monitors.sinks.history import HistoryReader

_DESCRIPTION = """\
Profiles the layers of a model from one batch: the eigenvalues of the map from the residual stream
before a layer to that behind it, and the risk that training diverges (docs/koopman.md).

Behind -- stands a training command as it is: Megatron-core or DeepSpeed, with its model, data,
number format, checkpoint to load and parallelism. It runs to its first optimizer step, which it
does not take; it writes no checkpoint. Or --hf names the folder of a Hugging Face model.

  0    the table is printed and the picture written
  78   a setting cannot be used; nothing was run
  1    nothing could be measured
"""
_EPILOG = """\
Examples:
  mcore-monitors profile -- deepspeed --num_accelerators 8 pretrain_gpt.py ...
  mcore-monitors profile --output gpt.svg --output gpt.json -- torchrun ... pretrain_gpt.py ...
  mcore-monitors profile --hf models/llama --lr 3e-4
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the words of ``mcore-monitors profile``."""
    parser = subparsers.add_parser(
        "profile",
        help="profile the layers of a model before its first step, and say its risk",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mcore-monitors profile [options] -- COMMAND ... | --hf FOLDER",
    )
    parser.add_argument(
        "--rank",
        type=_rank,
        default="auto",
        metavar="R",
        help="modes of each layer: a number, or full for all (default: full up to hidden size 256, "
        "else 32)",
    )
    parser.add_argument(
        "--tokens", type=_positive, default=2048, metavar="N", help="at most (default: 2048)"
    )
    parser.add_argument(
        "--lr",
        type=_rate,
        metavar="LR",
        help="learning rate that the risk is for (default: the largest of the command's schedule)",
    )
    parser.add_argument(
        "--output",
        type=_output,
        action="append",
        metavar="FILE",
        help="picture (.svg) or result (.json); may be given twice (default: profile.svg)",
    )
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="FOLDER",
        help="a folder with config.json; with *.safetensors their weights, else new ones. Runs no "
        "code of the folder and reads no pickles",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of --hf: new weights and random tokens (default: 0)"
    )
    add_options(parser)


def _rank(text: str) -> int | str:
    return text if text in ("auto", "full") else _positive(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of 1 or more")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: a learning rate above 0")
    return value


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".json"):
        raise argparse.ArgumentTypeError(f"{text!r}: a file that ends in .svg or .json")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
    return path


def run(args: argparse.Namespace) -> int:
    """Profile; return the exit code.

    Raises:
        ConfigError: the settings cannot be used.
        MonitorsError: there is nothing to profile, or nothing was measured.
    """
    began = time.time()
    if args.hf is not None:
        found = _of_folder(args)
    else:
        change = partial(for_profile, rank=args.rank, tokens=args.tokens)
        with trial("profile", args, change) as tried:
            found = read_profile(tried.run_dir, args.lr)
            if found is None:
                return tried.measured_nothing()
    risk = risk_of(found)
    print_profile(found, risk, sys.stdout)
    for path in args.output or [Path("profile.svg")]:
        if path.suffix == ".json":
            result = to_json(found, risk, time.time() - began)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        else:
            _draw(found, path)
        print(f"written: {path}")
    return 0


def _of_folder(args: argparse.Namespace) -> Profiled:
    if command_of(args):
        raise ConfigError("--hf", str(args.hf), "either --hf or a command, not both")
    from mcore_monitors.hosts.huggingface.profile import profile_folder

    return from_signals(
        **profile_folder(args.hf, rank=args.rank, tokens=args.tokens, seed=args.seed),
        learning_rate=args.lr,
    )


def _draw(found: Profiled, path: Path) -> None:
    from mcore_monitors.report.eigenvalues import draw

    values = {layer.layer: layer.eigenvalues if layer.finite else [] for layer in found.layers}
    tokens = min(layer.tokens for layer in found.layers)
    title = f"{found.modes} of {found.width} modes a layer, {tokens} tokens"
    draw(values, title, path)


def for_profile(
    settings: dict[str, Any], run_dir: Path, *, rank: int | str, tokens: int
) -> dict[str, Any]:
    """The settings of a profile: it alone, at the first step, nothing else happens."""
    monitors: dict[str, Any] = {f.name: {"enabled": False} for f in fields(MonitorsConfig)}
    monitors["koopman"] = {"enabled": True, "every": 1, "rank": rank, "tokens": tokens}
    return {
        "run_dir": str(run_dir),
        "interval": 1,
        "profile": True,
        "monitors": monitors,
        "wandb": {"enabled": False},
        "console": False,
    }


def read_profile(run_dir: Path, learning_rate: float | None) -> Profiled | None:
    """What the run recorded, or None where no layer was profiled.

    Args:
        learning_rate: instead of the run's own.
    """
    try:
        samples, events = HistoryReader(run_dir).read(), EventReader(run_dir).read()
    except MonitorsError:
        return None
    start = next((event for event in events if event["kind"] == "start"), None)
    if not samples or start is None:
        return None
    return from_signals(
        samples[-1].signals,
        width=start["hidden_size"],
        learning_rate=samples[-1].learning_rate if learning_rate is None else learning_rate,
        versions=start["versions"],
        left_out=start["left_out"],
    )
