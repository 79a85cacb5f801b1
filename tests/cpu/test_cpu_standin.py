"""The stand-in answers Megatron's calls into torch.cuda, and only when asked to."""

from __future__ import annotations

import pytest

from mcore_monitors import cpu
from tests.cpu.fresh import run


@pytest.mark.parametrize(
    ("argv", "environ", "asked"),
    [
        (["train.py"], {}, False),
        (["train.py", "--mcore-monitors-cpu"], {}, True),
        (["train.py", "--mcore-monitors", "cpu.yaml"], {}, False),
        (["train.py"], {"MCORE_MONITORS_CPU": "1"}, True),
        (["train.py"], {"MCORE_MONITORS_CPU": "0"}, False),
    ],
)
def test_asked_for(argv, environ, asked):
    assert cpu.asked_for(argv, environ) is asked


def test_importing_it_is_light_and_installs_nothing():
    result = run("""
        import sys
        from mcore_monitors import cpu
        result = ["torch" in sys.modules, cpu.installed()]
    """)
    assert result == [False, False]


def test_not_on_by_itself():
    """Importing Megatron without the switch leaves torch as it was."""
    changed = run("""
        import torch, torch._dynamo  # which wraps torch.manual_seed when Megatron imports it
        places = {"torch": torch, "torch.cuda": torch.cuda, "Tensor": torch.Tensor,
                  "accelerator": torch.accelerator, "random": torch.cuda.random}
        before = {name: dict(vars(place)) for name, place in places.items()}
        import megatron.core
        # What was there has to stay the same object.
        result = [f"{name}.{key}" for name, old in before.items() for key, value in old.items()
                  if vars(places[name]).get(key) is not value and not key.startswith("__")]
    """)
    assert changed == []


def test_installing_twice_changes_nothing_more():
    result = run("""
        import sys, torch
        from mcore_monitors import cpu
        cpu.install()
        now = [torch.zeros, torch.Tensor.to, torch.cuda.current_device, list(sys.meta_path)]
        cpu.install()
        then = [torch.zeros, torch.Tensor.to, torch.cuda.current_device, list(sys.meta_path)]
        result = [cpu.installed(), now == then]
    """)
    assert result == [True, True]


def test_too_late_is_refused():
    message = run("""
        import megatron.core
        from mcore_monitors import cpu, errors
        try:
            cpu.install()
            result = "installed"
        except errors.HostError as error:
            result = str(error)
    """)
    assert "before Megatron is imported" in message


@pytest.fixture(scope="module")
def answers():
    """Everything Megatron asks of torch.cuda, asked once."""
    return run("""
        import os, torch
        from mcore_monitors import cpu
        cpu.install()
        t = torch.ones(2)
        stream, start, end = torch.cuda.Stream(device="cuda"), torch.cuda.Event(), torch.cuda.Event()
        start.record(); end.record()
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.current_stream())
            stream.record_event().synchronize()
        torch.cuda.synchronize(); torch.cuda.empty_cache(); torch.cuda.set_device(0)
        torch.cuda.nvtx.range_push("x"); torch.cuda.nvtx.range_pop()
        t.record_stream(stream)
        from torch._subclasses.fake_tensor import FakeTensorMode
        with FakeTensorMode():
            fake = torch.zeros(2, device="cuda")
            fake_sum = (fake + torch.ones_like(fake)).sum()
        with torch.device("cpu"):  # a TorchFunctionMode
            under_mode = [t.type(), str(t.to("cuda").device), str(torch.ones(1, device=0).device)]
        devices = {
            "zeros": torch.zeros(1, device="cuda"), "ones_int": torch.ones(1, device=0),
            "tensor": torch.tensor([1.0], device=torch.cuda.current_device()),
            "empty_like": torch.empty_like(t, device="cuda:0"),
            "arange": torch.arange(3, device=torch.device("cuda")),
            "to": t.to("cuda"), "to_keyword": t.to(device=torch.device("cuda:0")),
            "to_both": t.to(torch.device("cuda"), torch.float64), "new": t.new_zeros(1, device=0),
            "pinned": torch.empty(1, pin_memory=True), "module": torch.nn.Linear(1, 1).cuda().weight,
            "module_to": torch.nn.Linear(1, 1).to("cuda").weight,
        }
        result = {
            "devices": {name: str(value.device) for name, value in devices.items()},
            "cuda_is_self": t.cuda(non_blocking=True) is t,
            "type": t.type(), "bf16": t.bfloat16().type(),
            "to_type": [str(t.type("torch.cuda.HalfTensor").dtype),
                        str(t.type(torch.cuda.DoubleTensor).dtype), str(t.type(torch.int).dtype)],
            "dtype_kept": str(t.to(torch.float64).dtype),
            "available": torch.cuda.is_available(), "count": torch.cuda.device_count(),
            "current": torch.cuda.current_device(),
            "capability": list(torch.cuda.get_device_capability()),
            "properties": torch.cuda.get_device_properties(0).major,
            "memory": [torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved(),
                       torch.cuda.memory_stats()],
            "capturing": torch.cuda.is_current_stream_capturing(),
            "elapsed": start.elapsed_time(end),
            "accelerator": [torch.accelerator.is_available(),
                            torch.accelerator.current_accelerator() is None],
            "environment": [os.environ[k] for k in
                            ("TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS")],
            "compiled": torch.compile(lambda x: x + 1)(t).tolist(),
            "under_mode": under_mode,
            "fake": [str(fake.device), str(fake_sum.device)],
        }
    """)


def test_what_is_asked_to_be_on_cuda_is_on_the_cpu(answers):
    assert set(answers["devices"].values()) == {"cpu"}
    assert answers["cuda_is_self"]


def test_tensor_types_are_those_of_a_gpu(answers):
    assert answers["type"] == "torch.cuda.FloatTensor"
    assert answers["bf16"] == "torch.cuda.BFloat16Tensor"
    assert answers["to_type"] == ["torch.float16", "torch.float64", "torch.int32"]
    assert answers["dtype_kept"] == "torch.float64"


def test_a_function_mode_sees_the_same(answers):
    assert answers["under_mode"] == ["torch.cuda.FloatTensor", "cpu", "cpu"]


def test_queries_are_answered(answers):
    assert answers["available"] and answers["count"] == 1 and answers["current"] == 0
    assert answers["capability"] == [8, 0] and answers["properties"] == 8
    assert answers["memory"] == [0, 0, {}]
    assert answers["capturing"] is False
    assert 0 <= answers["elapsed"] < 1000
    assert answers["accelerator"] == [False, True]
    assert answers["environment"] == ["1", "1"]
    assert answers["compiled"] == [2.0, 2.0]


def test_fake_cuda_tensors_stay_on_cuda(answers):
    """Under FakeTensorMode a tensor on cuda is meant: tests without a card rely on it."""
    assert answers["fake"] == ["cuda:0", "cuda:0"]


def test_the_gpu_generator_has_a_state_of_its_own():
    result = run("""
        import logging, torch
        from mcore_monitors import cpu
        cpu.install()
        warned = []
        class Keep(logging.Handler):
            def emit(self, record):
                warned.append(record.getMessage())
        logging.getLogger().addHandler(Keep())
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        torch.manual_seed(5)
        before = torch.get_rng_state()
        def untouched():
            return torch.equal(before, torch.get_rng_state())
        torch.cuda.manual_seed(7)
        checks = {"seeding": untouched()}

        gpu_before = torch.cuda.get_rng_state()
        dropped = [torch.nn.Dropout(0.5)(torch.ones(64)) for _ in range(2)]
        drawn = [torch.rand(4, device="cuda") for _ in range(2)]
        checks["dropout"] = untouched() and not torch.equal(*dropped)
        checks["factories"] = untouched() and not torch.equal(*drawn)
        torch.cuda.set_rng_state(gpu_before)
        checks["state restored"] = torch.equal(dropped[0], torch.nn.Dropout(0.5)(torch.ones(64)))
        gpu_before = torch.cuda.get_rng_state()
        torch.rand(4)
        checks["CPU draws"] = torch.equal(gpu_before, torch.cuda.get_rng_state())
        torch.set_rng_state(before)

        def tracker():
            made = CudaRNGStatesTracker()
            made.add("a", 11)
            made.add("b", 12)
            return made
        def draw(tracker, name, inner=None):
            with tracker.fork(name):
                first = torch.rand(4)
                inner = draw(tracker, inner) if inner else []
                return [first, *inner, torch.nn.functional.dropout(torch.ones(64))]
        one, two = tracker(), tracker()
        plain = [*draw(one, "a"), *draw(one, "b"), *draw(one, "a")]
        again = [*draw(two, "a"), *draw(two, "b"), *draw(two, "a")]
        checks["forks repeat"] = all(map(torch.equal, plain, again))
        checks["forks go on"] = not torch.equal(plain[0], plain[4])
        nested = draw(tracker(), "a", inner="b")
        checks["nested forks"] = all(map(torch.equal, nested, [plain[i] for i in (0, 2, 3, 1)]))
        checks["forks leave the CPU"] = untouched()
        checks["forks leave the GPU"] = torch.equal(gpu_before, torch.cuda.get_rng_state())
        result = [checks, [w for w in warned if "RNG" in w], torch.cuda.initial_seed()]
    """)
    checks, warned, seed = result
    assert all(checks.values()), checks
    assert warned == []
    assert seed == 7


def test_refused_only_by_the_makefile_and_sequence_parallelism():
    """Two places that fail on a CPU for other reasons than torch.cuda."""
    result = run("""
        from mcore_monitors import cpu
        cpu.install()
        import torch
        from megatron.core.datasets.utils import compile_helpers
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        from megatron.core.transformer.transformer_config import TransformerConfig
        compile_helpers()
        def norm(**kwargs):
            config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2,
                                       normalization="RMSNorm", **kwargs)
            built = WrappedTorchNorm(config, 8)
            return [type(built).__name__, built.weight.sequence_parallel, config.sequence_parallel]
        from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu
        splits = maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
        result = [norm(), norm(sequence_parallel=True, tensor_model_parallel_size=2),
                  type(splits).__name__]
    """)
    assert result == [["RMSNorm", False, False], ["RMSNorm", True, True], "ndarray"]


def test_default_arguments_are_megatrons():
    result = run("""
        import sys
        from mcore_monitors import cpu
        cpu.install()
        from megatron.training.arguments import parse_args
        sys.argv = ["train.py", *cpu.default_arguments(experts=True)]
        args = parse_args()
        result = [args.distributed_backend, args.transformer_impl, args.no_persist_layer_norm,
                  args.use_cpu_initialization, args.ckpt_format, args.add_bias_linear]
    """)
    assert result == ["gloo", "local", True, True, "torch_dist", False]
