"""Run a training script on a patched Megatron and write down what the patch calls.

    python -m tests.patching.record_megatron RECORD.json EXIT_AT SCRIPT [ARGUMENTS]

With --mcore-monitors among the arguments, our own call sites are exchanged for ones that only take
notes, so that the lines in Megatron are seen alone. After iteration EXIT_AT they ask for exit code
85; 0 is never.
"""

from __future__ import annotations

import json
import runpy
import sys
from types import ModuleType
from typing import Any

from mcore_monitors import cpu

NAME = "mcore_monitors.hosts.megatron.callsites"


def note_taker(calls: list[tuple[str, Any]], exit_at: int) -> ModuleType:
    """Return a module with the call sites' functions, each of which adds to ``calls``."""
    module = ModuleType(NAME)
    last = [0]

    def on_arguments(args):
        args.mcore_monitors_passed_over_samples = 8
        calls.append(("on_arguments", [args.rank, args.world_size]))

    def on_layer_spec(spec):
        calls.append(("on_layer_spec", type(spec).__name__))
        return spec

    def on_setup(model, optimizer, scheduler):
        from megatron.training import training

        train, _, _ = training.get_train_valid_test_num_samples()
        steps = getattr(scheduler, "num_steps", None)
        calls.append(("on_setup", [len(model), len(optimizer.param_groups) > 0, steps, train]))

    def on_step(iteration, loss_dict, grad_norm, learning_rate, skipped_iter):
        last[0] = iteration
        loss = float(loss_dict["lm loss"])
        calls.append(("on_step", [iteration, loss, float(grad_norm), learning_rate, skipped_iter]))

    def on_checkpoint(iteration, path):
        calls.append(("on_checkpoint", [iteration, path]))

    def exit_code():
        return 85 if last[0] == exit_at else None

    def on_end():
        calls.append(("on_end", None))

    functions = (on_arguments, on_layer_spec, on_setup, on_step, on_checkpoint, exit_code, on_end)
    for function in functions:
        setattr(module, function.__name__, function)
    return module


def main() -> None:
    """Exchange the call sites, run the script as ``__main__``, and leave as it leaves."""
    _, record, exit_at, script, *arguments = sys.argv
    calls: list[tuple[str, Any]] = []
    cpu.install()  # a released Megatron does not do it itself
    if "--mcore-monitors" in arguments:
        sys.modules[NAME] = note_taker(calls, int(exit_at))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        ours = [name for name in sys.modules if name.startswith("mcore_monitors.hosts")]
        with open(record, "w", encoding="utf-8") as file:
            json.dump({"calls": calls, "ours": ours}, file)


if __name__ == "__main__":
    main()
