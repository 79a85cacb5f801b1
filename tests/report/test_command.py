from __future__ import annotations

import subprocess
import sys

import pytest

from mcore_monitors.cli.main import main
from mcore_monitors.errors import MonitorsError
from mcore_monitors.report import write_report
from tests.report import make


def test_page_is_written_into_the_run_by_default(tmp_path, capsys):
    run = make.calm(tmp_path / "run", 50)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_output_and_compare(tmp_path):
    run, other = make.calm(tmp_path / "run", 50), make.calm(tmp_path / "other", 50)
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--compare", str(other), "--output", str(page)]) == 0
    assert "other: the same loss" in page.read_text()
    assert not (run / "report.html").exists()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as done:
        main(["report", "--help"])
    assert done.value.code == 0
    assert "mcore-monitors report runs/demo-0/recovered" in capsys.readouterr().out


def test_run_in_progress_with_torn_lines(tmp_path):
    samples = [make.make_sample(i) for i in range(10, 51, 10)]
    run = make.write(tmp_path / "run", samples, [make.start(0, 0), make.drill(200)])
    for name in ("history.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"v":1,"iteration":60,"att')
    page = make.Page(write_report(run).read_text())
    assert "iteration 50, loss" in page.text
    assert "going on, or killed" in page.text
    assert "(not reached yet)" in page.text
    assert "fault injected at" not in page.text


def test_run_without_events_or_finite_values(tmp_path):
    sample = make.make_sample(10, shift=float("nan"))
    sample.loss, sample.grad_norm = [None] * 10, [None] * 10
    run = make.write(tmp_path / "run", [sample], [])
    (run / "events.jsonl").unlink()
    assert "A calm run up to iteration 10" in make.Page(write_report(run).read_text()).headline


def missing_folder(run):
    return run / "nowhere", "nowhere: there is no such folder"


def file_as_run(run):
    return run / "history.jsonl", "is a file, not a run folder"


def missing_history(run):
    (run / "history.jsonl").unlink()
    return run, "history.jsonl: No such file"


def empty_history(run):
    (run / "history.jsonl").write_text("")
    return run, "history.jsonl is empty"


def corrupt_history(run):
    lines = (run / "history.jsonl").read_text().splitlines(keepends=True)
    (run / "history.jsonl").write_text("".join([lines[0], "{nonsense\n", *lines[1:]]))
    return run, "history.jsonl, line 2: not JSON"


def foreign_history(run):
    (run / "history.jsonl").write_text('{"v":99}\n')
    return run, "history.jsonl, line 1: history record of version 99"


def foreign_events(run):
    (run / "events.jsonl").write_text('{"kind":"stop","iteration":"many","attempt":0}\n')
    return run, "events.jsonl, line 1: not an event record (iteration 'many'"


def event_without_field(run):
    (run / "events.jsonl").write_text('{"kind":"alarm","iteration":1,"attempt":0}\n')
    return run, "events.jsonl, line 1: not an event record (no field 'signal'"


def corrupt_ledger(run):
    (run / "recovery.json").write_text('{"version": 1, "checkpo')
    return run, "recovery.json is not a ledger of this release"


def output_is_a_folder(run):
    (run / "report.html").mkdir()
    return run, "report.html is a folder"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_folder,
        file_as_run,
        missing_history,
        empty_history,
        corrupt_history,
        foreign_history,
        foreign_events,
        event_without_field,
        corrupt_ledger,
        output_is_a_folder,
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, capsys, spoil):
    folder, words = spoil(make.calm(tmp_path / "run", 50))
    assert main(["report", str(folder)]) == 1
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*report.html*") if path.is_file()]


def test_compared_run_is_checked_before_anything_is_written(tmp_path):
    run = make.calm(tmp_path / "run", 50)
    with pytest.raises(MonitorsError, match="nowhere: there is no such folder"):
        write_report(run, compare=[tmp_path / "nowhere"])
    assert not (run / "report.html").exists()


def test_place_that_cannot_be_written_is_named(tmp_path):
    run = make.calm(tmp_path / "run", 50)
    with pytest.raises(MonitorsError, match="page.html cannot be written: No such file"):
        write_report(run, tmp_path / "missing" / "page.html")


def test_an_old_page_stays_when_the_new_one_fails(tmp_path):
    run = make.calm(tmp_path / "run", 50)
    (run / "report.html").write_text("old")
    (run / "history.jsonl").write_text("")
    with pytest.raises(MonitorsError):
        write_report(run)
    assert (run / "report.html").read_text() == "old"


def test_command_line_does_not_load_matplotlib_until_it_draws():
    code = "import sys, mcore_monitors.cli.report as r; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
