"""``mcore-monitors launch``: run a training command and start it again when it asks for that."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from mcore_monitors.cli.child import Children
from mcore_monitors.cli.settings import OPTIONS, YAML_OPTIONS
from mcore_monitors.errors import (
    EXIT_BAD_CONFIG,
    EXIT_GAVE_UP,
    EXIT_ROLLBACK,
    MonitorsError,
    RecoveryError,
)
from mcore_monitors.recovery.ledger import LEDGER_FILE, PLANNED, Ledger, Plan

_DESCRIPTION = """\
Runs a training command as it is. When the run ends with exit code 85, or with another one after it
has written a new recovery plan (torchrun turns every exit code into 1), the same command is started
again and goes back to the checkpoint of the plan. On anything else this ends, with the same code.

  85   the run wrote a plan and asks to be started again; seen from outside: --max-relaunches is
       used up
  86   the run gave up, or did not obey its plan: a person has to look
  78   a setting cannot be used; nothing was trained
"""
_EPILOG = """\
Examples:
  mcore-monitors launch -- deepspeed --num_accelerators 2 train.py --mcore-monitors moe.yaml
  mcore-monitors launch --max-relaunches 3 --delay 30 -- torchrun --nproc-per-node 8 train.py ...
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the words of ``mcore-monitors launch``."""
    parser = subparsers.add_parser(
        "launch",
        help="run a training command and relaunch it after a rollback",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mcore-monitors launch [options] -- COMMAND ...",
    )
    parser.add_argument(
        "--max-relaunches",
        type=_count,
        default=10,
        metavar="N",
        help="start the command again at most N times (default: 10)",
    )
    parser.add_argument(
        "--delay",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="seconds between an end and the next start, for ports and devices to come free "
        "(default: 5)",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="the run folder with recovery.json (default: run_dir of the file behind "
        "--mcore-monitors or --deepspeed_config in COMMAND)",
    )
    parser.add_argument("training", nargs=argparse.REMAINDER, metavar="COMMAND")


def run(args: argparse.Namespace) -> int:
    """Run the command until it ends for good; return its exit code.

    Raises:
        MonitorsError: there is no command, or it cannot be started.
    """
    command = args.training[1:] if args.training[:1] == ["--"] else args.training
    if not command:
        raise MonitorsError(
            "launch: no command. Give it behind --, for example: mcore-monitors launch -- "
            "deepspeed --num_accelerators 2 train.py --mcore-monitors moe.yaml"
        )
    run_dir = args.run_dir if args.run_dir is not None else find_run_dir(command)
    children = Children()
    relaunches = 0
    with children.forwarding():
        while True:
            waiting = _waiting(run_dir)
            code = children.run(command)
            if children.stopped_by is not None:
                _say(f"stopped by {children.stopped_by.name}; not started again (exit code {code})")
                return code
            code, why = _judge(code, run_dir, waiting)
            if why is None:
                return code
            if relaunches >= args.max_relaunches:
                _say(
                    f"{why}, but --max-relaunches ({args.max_relaunches}) is used up. Starting the "
                    "same command again goes on from there."
                )
                return EXIT_ROLLBACK
            relaunches += 1
            _say(
                f"{why}. Starting again in {args.delay:g} s "
                f"({relaunches} of at most {args.max_relaunches} relaunches)"
            )
            children.pause(args.delay)
            if children.stopped_by is not None:
                _say(f"stopped by {children.stopped_by.name} before the relaunch")
                return 128 + children.stopped_by


def find_run_dir(command: Sequence[str]) -> Path | None:
    """Return the run folder that a command's settings name, or None where that cannot be said.

    Nothing is checked here: a mistake in the settings is for the run itself to report.
    """
    for i, word in enumerate(command):
        option, equals, value = word.partition("=")
        if option not in OPTIONS:
            continue
        name = value if equals else next(iter(command[i + 1 : i + 2]), "")
        try:
            text = Path(name).read_text(encoding="utf-8")
            settings = (
                yaml.safe_load(text)
                if option in YAML_OPTIONS
                else json.loads(text)["mcore_monitors"]
            )
            return Path(settings["run_dir"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
    return None


def _judge(code: int, run_dir: Path | None, waiting: Plan | None) -> tuple[int, str | None]:
    """Return (exit code, why to start again or None), having said what there is to say.

    A new plan on disk counts more than the exit code: torchrun turns every code into 1, and the
    ``deepspeed`` runner says 0 when its own child is killed by a signal.
    """
    if code == EXIT_GAVE_UP:
        _say(_give_up_text(run_dir))
        return code, None
    if code == EXIT_BAD_CONFIG:
        _say(f"a setting cannot be used (exit code {code}, message above); not started again")
        return code, None
    plan = _waiting(run_dir)
    if plan is not None and (waiting is None or plan.id != waiting.id):
        return code, (
            f"{plan.id}: alarm at iteration {plan.alarm_iteration} ({plan.cause}), back to "
            f"iteration {plan.checkpoint_iteration} (exit code {code})"
        )
    if code == EXIT_ROLLBACK and run_dir is None:
        return code, f"the run asks to be started again (exit code {code})"
    if code == EXIT_ROLLBACK:
        wrong = (
            f"{run_dir / LEDGER_FILE} holds no plan that waits to be obeyed"
            if plan is None
            else f"{plan.id} was waiting at the start and still is: the run does not obey it. Is "
            "the host patched (mcore-monitors patch status)?"
        )
        _say(
            f"the run asks to be started again (exit code {code}), but {wrong}. Another start "
            f"would do the same; a person has to look (exit code {EXIT_GAVE_UP})"
        )
        return EXIT_GAVE_UP, None
    _say(
        f"the run has ended (exit code {code})"
        if code == 0
        else f"the run failed (exit code {code}); not started again"
    )
    return code, None


def _waiting(run_dir: Path | None) -> Plan | None:
    """Return the plan that waits to be obeyed, or None."""
    try:
        plan = None if run_dir is None else Ledger.load(run_dir).last_plan
    except RecoveryError as error:
        _say(str(error))
        return None
    return plan if plan is not None and plan.status == PLANNED else None


def _give_up_text(run_dir: Path | None) -> str:
    reason, look = "The reason is in its messages above.", "the messages above"
    if run_dir is not None:
        look = f"the curves: mcore-monitors report {shlex.quote(str(run_dir))}"
        try:
            gave_up = Ledger.load(run_dir).gave_up
            reason = reason if gave_up is None else gave_up["reason"]
        except RecoveryError as error:
            reason = str(error)
    return (
        f"the run has given up (exit code {EXIT_GAVE_UP}) and is not started again. The "
        f"checkpoints are untouched; nothing is lost by waiting for the morning.\n"
        f"  Why:  {reason}\n"
        f"  Look: {look}\n"
        f"  Then: start the same command again; it says what to change first if the run is still "
        f"held back."
    )


def _say(text: str) -> None:
    print(f"mcore-monitors launch: {text}", file=sys.stderr, flush=True)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of relaunches, 0 or more")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds, 0 or more")
    return value
