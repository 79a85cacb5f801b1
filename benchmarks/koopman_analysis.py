"""What the replication study says: which score tells who diverges, and a calibrated risk.

    python benchmarks/koopman_analysis.py --json koopman.json --export

Reads the runs of ``benchmarks/koopman.py`` without a final norm (and, apart, those of the paper's
setting) and prints

1. the AUROC of near-unit mass and of each baseline, with 95% intervals over resampled runs: over
   all runs, within one architecture (each, and the pairs of all added up), and within one
   architecture at one learning rate;
2. the calibrated model of ``koopman_study/risk_model.py`` on runs that it has not seen: one
   architecture left out, one learning rate left out, and a tenth of the runs left out.

``--export`` writes the model of all runs into the package. About a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from conservation_common import made_by  # noqa: E402
from koopman import ROWS, rows  # noqa: E402
from koopman_study import risk_model  # noqa: E402
from koopman_study.scores import (  # noqa: E402
    SCORES,
    calibration_error,
    reliability,
    with_interval,
)

from mcore_monitors.signals.koopman_risk import TABLE  # noqa: E402

#: What the model is given, to see what each part is worth.
GIVEN = {
    "spectral features and learning rate": list(risk_model.INPUTS),
    "spectral features": [n for n in risk_model.INPUTS if n != "learning_rate"],
    "learning rate": ["learning_rate"],
}


def within(runs: list[dict]) -> list[str]:
    """Stratum of each run: its architecture."""
    return [run["architecture"] for run in runs]


def areas(runs: list[dict], score: np.ndarray) -> dict[str, Any]:
    """AUROC of one score, overall, within architectures and within learning rates of them."""
    diverged = risk_model.ends(runs)
    known = ~np.isnan(score)
    runs = [run for run, k in zip(runs, known, strict=True) if k]
    score, diverged = score[known], diverged[known]
    architectures = np.array(within(runs))
    cells = [(run["architecture"], run["learning_rate"]) for run in runs]
    return {
        "runs": len(runs),
        "overall": with_interval(score, diverged),
        "within": with_interval(score, diverged, within(runs)),
        "within_at_one_learning_rate": with_interval(score, diverged, cells),
        "by_architecture": {
            str(name): with_interval(score[architectures == name], diverged[architectures == name])
            for name in np.unique(architectures)
        },
    }


def single_scores(runs: list[dict]) -> dict[str, Any]:
    """:func:`areas` of each of :data:`SCORES`."""
    return {
        name: areas(runs, sign * np.array([float(run[field]) for run in runs]))
        for name, (field, sign) in SCORES.items()
    }


def model_results(runs: list[dict]) -> list[dict[str, Any]]:
    """The model on runs that it has not seen, for each way to leave some out."""
    random = np.random.default_rng(0)
    tenth = random.permutation(len(runs)) % 10
    parts = {
        "architecture": within(runs),
        "learning rate": [run["learning_rate"] for run in runs],
        "tenth of the runs": list(tenth),
    }
    diverged = risk_model.ends(runs)
    results = []
    for left_out, labels in parts.items():
        for given, names in GIVEN.items():
            for method in ("sigmoid", "isotonic"):
                found = risk_model.held_out(runs, labels, names, method)
                known = ~np.isnan(found)
                if not known.any():
                    continue
                results.append(
                    {
                        "left_out": left_out,
                        "given": given,
                        "calibration": method,
                        "ece": calibration_error(found[known], diverged[known]),
                        "reliability": reliability(found[known], diverged[known]),
                        **areas(runs, found),
                    }
                )
    return results


def rule_error(runs: list[dict]) -> float:
    """Calibration error of near-unit mass taken for a probability, as in the paper."""
    mass = np.array([run["near_unit_mean"] for run in runs])
    return calibration_error(mass, risk_model.ends(runs))


def sentence(runs: list[dict]) -> str:
    """What the model was calibrated on."""
    names = ", ".join(sorted({run["architecture"] for run in runs}))
    rates = [run["learning_rate"] for run in runs]
    layers = " and ".join(map(str, sorted({run["layers"] for run in runs})))
    widths = " and ".join(map(str, sorted({run["hidden"] for run in runs})))
    return (
        f"{len(runs)} trainings on associative recall without a norm before the head "
        f"({names}; width {widths}, {layers} layers, AdamW without clipping, learning rates "
        f"{min(rates):g} to {max(rates):g}); {int(risk_model.ends(runs).sum())} of them diverged "
        f"within {max(run['steps'] for run in runs)} steps"
    )


def show(area: dict[str, Any]) -> str:
    """AUROC and interval in a few characters."""
    if area["auroc"] is None:
        return "not defined"
    return f"{area['auroc']:.3f} [{area['low']:.3f}, {area['high']:.3f}]"


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    for title, scores in (("study", result["auroc"]), ("paper's setting", result["paper_setting"])):
        print(f"\nAUROC, {title}")
        print(f"{'score':28} {'overall':22} {'within':22} {'within, one lr':22} by architecture")
        for name, area in scores.items():
            one = ", ".join(
                f"{n} {a['auroc']:.2f}" if a["auroc"] is not None else f"{n} –"
                for n, a in area["by_architecture"].items()
            )
            print(
                f"{name:28} {show(area['overall']):22} {show(area['within']):22} "
                f"{show(area['within_at_one_learning_rate']):22} {one}"
            )
    print(f"\n{'held out':18} {'given':36} {'calibrated':10} {'ECE':5}  overall / within")
    for row in result["model"]:
        print(
            f"{row['left_out']:18} {row['given']:36} {row['calibration']:10} {row['ece']:.3f}  "
            f"{show(row['overall'])} / {show(row['within'])}"
        )


def figure(result: dict[str, Any], path: Path) -> None:
    """Predicted against observed share, for each way to leave runs out."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = drawing.subplots()
    axes.plot([0, 1], [0, 1], color="#999", linewidth=1)
    colours = {"architecture": "#c0562b", "learning rate": "#1f6f8b", "tenth of the runs": "#444"}
    for row in result["model"]:
        if row["given"] != next(iter(GIVEN)) or row["calibration"] != "sigmoid":
            continue
        bins = row["reliability"]
        x, y = [b["predicted"] for b in bins], [b["diverged"] for b in bins]
        colour = colours[row["left_out"]]
        label = f"left out: one {row['left_out']} (ECE {row['ece']:.3f})"
        axes.plot(x, y, color=colour, alpha=0.5, linewidth=1)
        axes.scatter(x, y, s=[6 * b["runs"] for b in bins], color=colour, alpha=0.6, label=label)
    axes.set(xlabel="predicted probability of divergence", ylabel="share that diverged")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", markerscale=0.5)
    drawing.savefig(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/koopman_analysis.py --figure docs/koopman_risk.svg",
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="the raw table")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--figure", type=Path, help="write the reliability plot to this file")
    parser.add_argument("--export", action="store_true", help="write the model into the package")
    arguments = parser.parse_args()
    every = sorted(rows(arguments.rows), key=lambda run: run["key"])
    runs = [run for run in every if not run["final_norm"]]
    bare = ("no_norm", "post_ln", "deep_norm")
    paper = [
        run
        for run in every
        if run["init_scale"] == 1.0 and (run["final_norm"] or run["architecture"] in bare)
    ]
    result = {
        "runs": len(runs),
        "diverged": int(risk_model.ends(runs).sum()),
        "auroc": single_scores(runs),
        "paper_setting": single_scores(paper),
        "model": model_results(runs),
        "ece_near_unit_mass": rule_error(runs),
        "made_by": made_by(0),
    }
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.figure:
        figure(result, arguments.figure)
    if arguments.export:
        made = risk_model.table(runs, list(risk_model.INPUTS), sentence(runs))
        TABLE.write_text(json.dumps(made, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
