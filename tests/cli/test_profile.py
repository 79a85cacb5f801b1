"""``mcore-monitors profile``: a launch line or a folder in, table, picture and risk out."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import transformers

from launch.demo_model import MEGATRON_ARGUMENTS
from mcore_monitors.cli.main import main
from mcore_monitors.cli.profile import for_profile, read_profile
from mcore_monitors.cli.profile_result import (
    FEATURES,
    LayerProfile,
    Profiled,
    from_signals,
    print_profile,
    risk_of,
    to_json,
)
from mcore_monitors.config import from_dict
from mcore_monitors.signals.koopman import decompose, features, whiten
from tests.huggingface.models import SMALL
from tests.megatron.train import ROOT, free_port


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration only."""
    path = tmp_path_factory.mktemp("models") / "llama"
    transformers.AutoConfig.for_model("llama", **SMALL).save_pretrained(path)
    return path


# ---- a command that can't be profiled ----


def test_no_command(capfd) -> None:
    assert main(["profile"]) == 1
    assert "profile: no command" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rank 0", "1 or more"),
        ("--rank many", "--rank"),
        ("--tokens 0", "1 or more"),
        ("--lr 0", "above 0"),
        ("--lr nan", "above 0"),
        ("--output table.txt", ".svg or .json"),
        ("--output nowhere/p.svg", "no folder"),
    ],
)
def test_options_that_cannot_be_used(words: str, said: str, capfd, folder: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["profile", *words.split(), "--", "train.py"])
    assert ended.value.code == 2
    assert said in capfd.readouterr().err


def test_a_command_that_fails_shows_its_last_lines(folder: Path, capfd) -> None:
    code = "print('something is wrong'); raise SystemExit(3)"
    assert main(["profile", "--", sys.executable, "-c", code]) == 1
    said = capfd.readouterr().err
    assert "something is wrong" in said and "ended with exit code 3" in said
    assert main(["profile", "--", sys.executable, "-c", "raise SystemExit(78)"]) == 78
    assert list(folder.iterdir()) == []


def test_a_profile_reads_it_alone_at_the_first_step(folder: Path) -> None:
    config = from_dict(for_profile({"drill": {}, "interval": 7}, folder, rank="full", tokens=99))
    assert (config.profile, config.check, config.interval, config.drill) == (True, False, 1, None)
    koopman = config.monitors.koopman
    assert (koopman.enabled, koopman.every, koopman.rank, koopman.tokens) == (True, 1, "full", 99)
    assert config.monitors.conservation.enabled is config.monitors.router.enabled is False


# ---- what is printed ----


def profiled(layers: dict[int, tuple[torch.Tensor, torch.Tensor]], lr: float | None) -> Profiled:
    """From snapshots [N, D] to what a run would have recorded."""
    signals: dict = {}
    for layer, (x, y) in layers.items():
        modes = decompose(*whiten(x, y))
        found = features(modes)._asdict() | {"tokens": torch.tensor(float(len(x)))}
        for name, value in found.items():
            finite = value if value.isfinite() else torch.tensor(math.nan)  # as in a history
            signals.setdefault(f"koopman/{name}", {})[layer] = [float(finite)]
        for name, value in (
            ("eigenvalue_real", modes.eigenvalues.real),
            ("eigenvalue_imaginary", modes.eigenvalues.imag),
        ):
            signals.setdefault(f"koopman/{name}", {})[layer] = value.tolist()
    width = next(iter(layers.values()))[0].shape[-1]
    return from_signals(signals, width=width, learning_rate=lr, versions={}, left_out=["a part"])


def printed(found: Profiled) -> list[str]:
    out = io.StringIO()
    print_profile(found, risk_of(found), out)
    return out.getvalue().splitlines()


def test_the_table_says_what_is_unusual() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    broken = x.clone()
    broken[3, 1] = math.nan
    # whitened by its own statistics a linear map stays as defective as it is
    jordan = torch.eye(4, dtype=torch.float64) * 0.5
    jordan[0, 1] = 1.0
    found = profiled(
        {1: (x, x), 2: (x, broken), 3: (x, x * 1.0001 + 1e-6 * x.square()), 4: (x, x.square())},
        1e-3,
    )
    lines = printed(found)
    assert re.search(r"1 +1 +0 +0 +1 .* – +adds nothing", lines[1])
    assert lines[2].endswith("its states are not finite: no profile") and "–" in lines[2]
    assert "passes its input on" in lines[3] and "adds nothing" not in lines[3]
    assert lines[4].rstrip()[-1].isdigit()  # nothing to say
    assert [line.split()[0] for line in lines[5:8]] == ["mean", "max", "min"]
    assert "left out: a part." in lines
    assert "risk: not computed, a layer has no profile" in lines
    defective = LayerProfile(
        layer=1,
        tokens=9,
        features=dict.fromkeys(FEATURES, 1.0) | {"condition": math.inf},
        eigenvalues=[2 + 0j],
    )
    assert defective.note == "no basis of eigenvectors (defective)"
    one = Profiled(layers=[defective], width=1, learning_rate=None, versions={})
    assert "∞" in printed(one)[1]
    assert to_json(one, "no", 1.0)["layers"][0]["features"]["condition"] == "inf"
    json.dumps(to_json(found, "no", 1.0), allow_nan=False)


def test_fewer_tokens_than_channels_are_said() -> None:
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    (warning,) = (line for line in printed(profiled({1: (x, 2 * x)}, None)) if "WARN" in line)
    assert "20 tokens span fewer than the 30 directions" in warning
    assert "WARN" not in "".join(printed(profiled({1: (x[:, :5], 2 * x[:, :5])}, None)))


def test_the_risk_and_when_there_is_none() -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    layers = {1: (x, x + 0.3 * x.tanh()), 2: (x, 1.2 * x + 0.1 * x.square())}
    risk = risk_of(profiled(layers, 0.01))
    assert 0 <= risk["low"] <= risk["probability"] <= risk["high"] <= 1
    assert not any("modes" in sentence for sentence in risk["outside"])
    text = "\n".join(printed(profiled(layers, 0.01)))
    assert "risk of divergence at learning rate 0.01:" in text and "calibrated on:" in text
    far = "\n".join(printed(profiled(layers, 1e-9)))
    assert "OUTSIDE THE CALIBRATED RANGE: learning_rate" in far and "extrapolation" in far
    assert "the learning rate is not known; give --lr" in "\n".join(printed(profiled(layers, None)))
    some = profiled(layers, 0.01)
    some = Profiled(**vars(some) | {"width": 9})
    assert "8 of 9 modes" in risk_of(some)["outside"][-1]


def test_a_run_folder_without_a_profile(folder: Path) -> None:
    assert read_profile(folder / "run", None) is None


# ---- a Hugging Face folder ----


def test_a_folder_with_new_weights_and_the_same_weights_stored(
    llama: Path, folder: Path, capfd
) -> None:
    words = ["profile", "--lr", "0.002", "--output", "new.json", "--output", "new.svg"]
    assert main([*words, "--seed", "3", "--hf", str(llama)]) == 0
    assert "risk of divergence" in capfd.readouterr().out
    new = json.loads((folder / "new.json").read_text())
    assert [row["layer"] for row in new["layers"]] == [1, 2]
    assert new["modes"] == new["hidden_size"] == 32 and new["layers"][0]["tokens"] == 2048
    labels = "".join(ElementTree.parse(folder / "new.svg").getroot().itertext())
    assert "layer 1" in labels and "layer 2" in labels
    torch.manual_seed(3)
    config = transformers.AutoConfig.from_pretrained(llama)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "stored")
    words = ["profile", "--rank", "8", "--output", "s.json", "--hf", str(folder / "stored")]
    assert main([*words, "--seed", "3", "--rank", "full"]) == 0
    stored = json.loads((folder / "s.json").read_text())
    for a, b in zip(new["layers"], stored["layers"], strict=True):
        assert a["features"] == pytest.approx(b["features"], rel=1e-6)
    assert stored["risk"] is None and "--lr" in stored["no_risk_because"]


def test_folders_that_are_not_read(llama: Path, folder: Path, capfd) -> None:
    assert main(["profile", "--hf", str(folder)]) == 78
    assert "a folder with a config.json" in capfd.readouterr().err
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((llama / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert main(["profile", "--hf", str(pickled)]) == 78
    assert "safetensors" in capfd.readouterr().err
    torn = folder / "torn"
    torn.mkdir()
    (torn / "config.json").write_bytes((llama / "config.json").read_bytes())
    (torn / "model.safetensors").write_bytes(b"not one")
    assert main(["profile", "--hf", str(torn)]) == 78
    code = folder / "code"
    code.mkdir()
    (code / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}})
    )
    (code / "own.py").write_text("raise SystemExit('this must not run')")
    assert main(["profile", "--hf", str(code)]) == 78
    assert main(["profile", "--hf", str(llama), "--", "train.py"]) == 78
    assert "not both" in capfd.readouterr().err


# ---- real runs ----


def test_the_demos_launch_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """Two processes with expert parallelism through the real runner, as a user would start it."""
    binaries = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(binaries), prepend=":")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    line = [
        str(binaries / "deepspeed"), "--num_accelerators", "2", "--no_local_rank",
        "--master_port", str(free_port()), str(ROOT / "launch" / "pretrain_gpt.py"),
        *MEGATRON_ARGUMENTS, "--train-iters", "1000", "--mock-data",
        "--data-cache-path", str(folder / "cache"),
        "--save", str(folder / "checkpoints"), "--save-interval", "1", "--mcore-monitors-cpu",
    ]  # fmt: skip
    words = ["profile", "--verbose", "--output", "p.svg", "--output", "p.json"]
    assert main([*words, "--", *line]) == 0
    said = capfd.readouterr().out
    assert not re.search(r"iteration +1/", said)  # no step was taken
    assert "risk of divergence at learning rate 0.001" in said  # the largest, not the first
    result = json.loads((folder / "p.json").read_text())
    assert [row["layer"] for row in result["layers"]] == [1, 2, 3, 4]
    assert result["hidden_size"] == result["modes"] == 128
    for row in result["layers"]:
        assert row["tokens"] == 8 * 128 and len(row["eigenvalues"]) == 128
        shares = [row["features"][name] for name in ("near_unit", "super_unit", "sub_unit")]
        assert 0 < sum(shares) <= 1
    assert "megatron-core" in result["versions"]
    ElementTree.parse(folder / "p.svg")
    assert {path.name for path in folder.iterdir()} == {"cache", "p.svg", "p.json"}


TRAINING = """
import json, sys, deepspeed, torch, transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config)
engine, *_ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=sys.argv[3]
)
generator = torch.Generator().manual_seed(1)
tokens = torch.randint(64, (8, 32), generator=generator)
for step in range(4):
    for piece in tokens.chunk(2):
        engine.backward(engine(input_ids=piece, labels=piece).loss)
        engine.step()
    print("took step", step)
"""


def test_a_deepspeed_engine_with_a_hugging_face_model(
    llama: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "DS_ACCELERATOR": "cpu"}
    for name, value in rank.items():
        monkeypatch.setenv(name, str(value))
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
    }
    (folder / "ds.json").write_text(json.dumps(settings))
    (folder / "train.py").write_text(TRAINING)
    line = [sys.executable, "train.py", str(llama), "--deepspeed_config", "ds.json"]
    words = ["profile", "--verbose", "--output", "p.json"]
    assert main([*words, "--", *line]) == 0
    said = capfd.readouterr().out
    assert "took step" not in said and "at learning rate 0.003" in said
    result = json.loads((folder / "p.json").read_text())
    # the same by hand
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(llama)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(1))
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for row, (x, y) in zip(result["layers"], seen, strict=True):
        assert row["tokens"] == 8 * 32
        expected = features(decompose(*whiten(x.flatten(0, 1), y.flatten(0, 1))))
        for name, value in expected._asdict().items():
            assert row["features"][name] == pytest.approx(float(value), rel=1e-4), name
