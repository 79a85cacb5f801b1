"""The one schema: frozen keys and defaults, and every mistake as one sentence about a setting."""

from __future__ import annotations

import datetime
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mcore_monitors.config import Config, from_dict, load
from mcore_monitors.errors import ConfigError
from mcore_monitors.windows import judged_stride

ROOT = Path(__file__).resolve().parents[1]

#: Every key with its default. A later release may add keys; none here may go or change.
SCHEMA = {
    "version": 1,
    "run_dir": "runs/x",  # required
    "interval": 10,
    "strict": False,
    "monitors": {
        "attention_update": {
            "enabled": "auto",
            "windows": [10, 50, 200],
            "snapshots": "device",
            "every": 10,
        },
        "router": {"enabled": "auto", "tokens": "all", "every": 10},
        "conservation": {"enabled": "auto", "whole": False},
        "attention_activity": {"enabled": "auto", "queries": 16, "every": 10},
        "optimizer": {"enabled": "auto", "every": 40},
        "koopman": {"enabled": False, "every": 1000, "rank": 32, "tokens": 2048},
    },
    "detection": {
        "warmup": 200,
        "reference": 20,
        "lag": 2,
        "threshold": 6.0,
        "sustain": 3,
        "limit": None,
        "windows": [50],
    },
    "recovery": {
        "mode": "log",
        "how": "auto",
        "quiet": 100,
        "margin": 0,
        "max_attempts": 2,
        "remedies": {},
    },
    "wandb": {
        "enabled": "auto",
        "project": "mcore-monitors",
        "name": None,
        "entity": None,
        "signals": "judged",
    },
    "console": True,
    "drill": None,
    "kss": None,
    "check": False,
    "profile": False,
}
#: Sections that are empty by default, written out.
DRILL = {"fault": "attention_row_term", "strength": 0.003, "layers": [], "from_iteration": 600}
KSS = {
    "alpha": 0.15,
    "gamma": 0.4,
    "beta": 1.0,
    "temperature": 20.0,
    "interval": 10,
    "share": 0.5,
    "rank": 32,
    "seed": 0,
}
REMEDY = {"attention": "keep", "learning_rate_factor": 1.0, "pass_over": 0}
CAUSES = (
    "attention_numerics",
    "router_numerics",
    "kernel_numerics",
    "router_or_learning_rate",
    "combined",
    "data",
    "unknown",
)


def settings(dotted: str, value: Any) -> dict[str, Any]:
    """Valid settings but for one, given by its dotted name."""
    *path, last = dotted.split(".")
    data: dict[str, Any] = {"run_dir": "runs/x"}
    place = data
    for key in path:
        place = place.setdefault(key, {})
    place[last] = value
    if "drill" in data and isinstance(data["drill"], dict):
        data["drill"] = {"strength": 0.003, "from_iteration": 600} | data["drill"]
    return data


def refusal(data: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    assert "\n" not in str(caught.value)
    return caught.value


def test_schema_is_frozen() -> None:
    assert asdict(from_dict({"run_dir": "runs/x"})) == SCHEMA


def test_sections_that_are_empty_by_default_are_frozen() -> None:
    config = from_dict(
        {
            "run_dir": "x",
            "drill": {"strength": 0.003, "from_iteration": 600},
            "recovery": {"remedies": {cause: {} for cause in CAUSES}},
        }
    )
    assert asdict(config.drill) == DRILL
    assert {c: asdict(r) for c, r in config.recovery.remedies.items()} == dict.fromkeys(
        CAUSES, REMEDY
    )


def test_all_defaults_can_be_written_out() -> None:
    assert from_dict(SCHEMA) == from_dict({"run_dir": "runs/x"})
    assert from_dict(SCHEMA | {"drill": DRILL}).drill.layers == []
    assert asdict(from_dict({"run_dir": "runs/x", "kss": {}}).kss) == KSS


def test_shipped_configurations_load() -> None:
    shipped = sorted((ROOT / "configs").glob("*.yaml"))
    assert "moe.yaml" in [path.name for path in shipped]
    for path in shipped:
        assert isinstance(load(path), Config)
    assert load(ROOT / "configs" / "moe.yaml").run_dir == "runs/moe"


def test_yaml_and_dict_mean_the_same(tmp_path: Path) -> None:
    path = tmp_path / "monitors.yaml"
    path.write_text(
        "run_dir: runs/x\ninterval: 5\nmonitors: {router: {enabled: false}}\n"
        "recovery: {remedies: {data: {pass_over: -1}}}\n"
    )
    data = {"run_dir": "runs/x", "interval": 5, "monitors": {"router": {"enabled": False}}}
    data["recovery"] = {"remedies": {"data": {"pass_over": -1}}}
    assert load(path) == from_dict(data)


@pytest.mark.parametrize(
    ("dotted", "meant"),
    [
        ("inteval", "interval"),
        ("run_dirs", "run_dir"),
        ("monitors.routers", "router"),
        ("monitors.attention_update.window", "windows"),
        ("monitors.router.enable", "enabled"),
        ("detection.treshold", "threshold"),
        ("recovery.max_attemps", "max_attempts"),
        ("recovery.remedies.dta", "data"),
        ("recovery.remedies.data.pass_ovr", "pass_over"),
        ("wandb.projct", "project"),
        ("drill.layer", "layers"),
    ],
)
def test_unknown_key(dotted: str, meant: str) -> None:
    error = refusal(settings(dotted, {}))
    assert error.setting == dotted
    assert f"Did you mean {meant!r}?" in str(error)


def test_profiles_are_taken_where_samples_are() -> None:
    data = {"run_dir": "x", "monitors": {"koopman": {"enabled": True, "every": 15}}}
    assert refusal(data).setting == "monitors.koopman.every"
    from_dict(data | {"interval": 5})
    from_dict({"run_dir": "x", "monitors": {"koopman": {"every": 15}}})  # it is off


def test_unknown_key_without_a_near_one_lists_them_all() -> None:
    text = str(refusal(settings("monitors.zzz", 1)))
    assert "attention_update, conservation, koopman, optimizer, router" in text
    assert "Did you mean" not in text


@pytest.mark.parametrize(
    ("dotted", "value", "allowed"),
    [
        ("interval", "10", "an integer"),
        ("interval", 10.5, "an integer"),
        ("interval", True, "an integer"),
        ("interval", None, "an integer"),
        ("run_dir", ["a"], "a text"),
        ("run_dir", 5, "a text"),
        ("strict", "yes", "true or false"),
        ("strict", 1, "true or false"),
        ("console", "no", "true or false"),
        ("monitors", None, "key: value"),
        ("monitors.router", None, "key: value"),
        ("monitors.router", True, "key: value"),
        ("monitors.router.enabled", 1, "'auto' or true or false"),
        ("monitors.router.enabled", "yes", "'auto' or true or false"),
        ("monitors.attention_update.windows", 50, "a list"),
        ("detection.windows", [0], ">= 1"),
        ("monitors.attention_update.snapshots", 3, "device"),
        ("monitors.attention_update.windows.0", ["50"], "an integer"),
        ("detection.sustain", "3", "an integer"),
        ("detection.threshold", "six", "number"),
        ("recovery.quiet", 100.5, "an integer"),
        ("recovery.remedies.data", "skip", "key: value"),
        ("wandb.enabled", 2, "true or false or 'auto'"),
        ("wandb.project", 3, "a text"),
        ("drill.layers", "all", "a list"),
        ("drill.strength", "strong", "number"),
    ],
)
def test_wrong_type(dotted: str, value: Any, allowed: str) -> None:
    error = refusal(settings(dotted.removesuffix(".0"), value))
    assert error.setting == dotted
    assert allowed in str(error)


@pytest.mark.parametrize(
    ("dotted", "value", "allowed"),
    [
        ("version", 2, "1"),
        ("run_dir", "", "at least 1"),
        ("interval", 0, "greater than 0"),
        ("interval", -10, "greater than 0"),
        ("monitors.attention_update.windows", [], "at least 1"),
        ("monitors.attention_update.windows.0", [0], "greater than 0"),
        ("monitors.attention_update.windows", [50, 25], "multiples of interval (10)"),
        ("monitors.koopman.rank", "half", "'auto'"),
        ("monitors.koopman.rank", 0, "greater than 0"),
        ("detection.reference", 11, ">= 12"),
        ("detection.sustain", 0, ">= 1"),
        ("detection.threshold", 0, "> 0"),
        ("detection.threshold", math.nan, "> 0"),
        ("detection.limit", math.inf, "> 0"),
        ("detection.limit", {"attention/key_shift": 0.0}, "> 0"),
        ("detection.limit", {"attention/keyshift": 1e-3}, "attention/key_shift"),
        ("detection.limit", {"router/routing_entropy": 1.0}, "residuals: attention/key_shift"),
        ("recovery.mode", "auto", "'log', 'notify' or 'rollback'"),
        ("recovery.how", "restart", "'auto', 'in_place' or 'relaunch'"),
        ("recovery.margin", -1, ">= 0"),
        ("recovery.max_attempts", 0, ">= 1"),
        ("wandb.project", " ", "non-empty"),
        ("drill.strength", 0, "greater than 0"),
        ("drill.strength", math.inf, "finite"),
        ("drill.from_iteration", 0, "greater than 0"),
    ],
)
def test_out_of_range(dotted: str, value: Any, allowed: str) -> None:
    error = refusal(settings(dotted.removesuffix(".0"), value))
    assert error.setting == dotted
    assert allowed in str(error)


@pytest.mark.parametrize(
    ("dotted", "value", "meant"),
    [
        ("recovery.mode", "rolback", "rollback"),
        ("monitors.router.enabled", "atuo", "auto"),
        ("drill.fault", "attention_row", "attention_row_term"),
    ],
)
def test_nearest_choice(dotted: str, value: str, meant: str) -> None:
    assert f"Did you mean {meant!r}?" in str(refusal(settings(dotted, value)))


def test_window_and_interval_go_together() -> None:
    data = settings("monitors.attention_update.windows", [15])
    assert refusal(data).setting == "monitors.attention_update.windows"
    windows = from_dict(data | {"interval": 5}).monitors.attention_update.windows
    assert windows == [15]


@pytest.mark.parametrize(
    ("interval", "windows", "judged"),
    [
        (1, [10, 50, 200], [50]),
        (7, [7, 49, 203], [49]),
        (20, [20, 40, 200], [40]),
        (50, [50, 200], [50]),
        (1000, [1000], [1000]),
    ],
)
def test_default_windows_fit_every_interval(
    interval: int, windows: list[int], judged: list[int]
) -> None:
    data: dict[str, Any] = {"run_dir": "x", "interval": interval}
    config = from_dict(data)
    assert config.monitors.attention_update.windows == windows
    assert config.detection.windows == judged
    # written out they are accepted again, and so is a rollback that waits long enough
    written = {"attention_update": {"windows": windows}}
    recovery = {"mode": "rollback", "quiet": 3 * judged_stride(judged[0], interval) + judged[0]}
    assert from_dict(data | {"monitors": written, "recovery": recovery}).detection.windows == judged


def test_judged_windows_are_among_the_windows() -> None:
    data = settings("detection.windows", [10, 60])
    error = refusal(data)
    assert error.setting == "detection.windows"
    assert "10, 50, 200" in str(error) and "60" in str(error)
    assert from_dict(settings("detection.windows", [])).detection.windows == []
    assert from_dict(settings("detection.windows", [10, 200])).detection.windows == [10, 200]


def test_only_judged_windows_make_a_checkpoint_wait() -> None:
    data: dict[str, Any] = {"run_dir": "x", "recovery": {"mode": "rollback", "quiet": 80}}
    assert from_dict(data).recovery.quiet == 80
    slow = data | {"detection": {"windows": [50, 200]}}
    assert "320" in str(refusal(slow))  # compared every 40 iterations, three times, after 200


@pytest.mark.parametrize("setting", ["run_dir", "drill.strength", "drill.from_iteration"])
def test_required_setting(setting: str) -> None:
    data: dict[str, Any] = {"run_dir": "x", "drill": {"strength": 0.1, "from_iteration": 3}}
    *path, last = setting.split(".")
    del (data[path[0]] if path else data)[last]
    error = refusal(data)
    assert error.setting == setting
    assert "required" in str(error)


@pytest.mark.parametrize("data", [None, [], "runs/x", 3])
def test_no_settings_at_all(data: Any) -> None:
    assert "run_dir" in str(refusal(data))


def test_what_json_cannot_hold_is_refused() -> None:
    day = datetime.date(2026, 1, 1)
    refusal({"run_dir": "x", "recovery": {"remedies": {day: {}}}})
    endless: list[Any] = []
    endless.append(endless)
    refusal({"run_dir": endless})


def file_refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.setting == "--mcore-monitors"
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in file_refusal(tmp_path / "none.yaml")
    assert "directory" in file_refusal(tmp_path)


@pytest.mark.parametrize("content", [b"run_dir: [", b"a: b: c", b"\tx: 1", b"\xff\xfe\x00run"])
def test_not_yaml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "monitors.yaml"
    path.write_bytes(content)
    assert "a YAML file" in file_refusal(path)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch MARK']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [MARK]]",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_a_tag_cannot_run_or_import_anything(tag: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "monitors.yaml"
    path.write_text(f"run_dir: {tag.replace('MARK', str(mark))}\n")
    assert "could not determine a constructor" in file_refusal(path)
    assert not mark.exists()


def test_empty_file_asks_for_run_dir(tmp_path: Path) -> None:
    path = tmp_path / "monitors.yaml"
    path.write_text("# nothing yet\n")
    with pytest.raises(ConfigError, match="run_dir"):
        load(path)
