"""The benchmark on a GPU, proved without one: a stand-in has its properties and events, the tensors stay on the CPU."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import pytest
import torch
import typer
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from normwright import bench as b
from normwright.bench import cases, devices, measure, others
from normwright.bench.row import least_traffic
from normwright.kernels import triton
from normwright.lab.errors import UserError

L2 = 64 << 10


class _Event:
    """An event of a GPU that works as fast as the host's clock says."""

    made: list[_Event]

    def __init__(self, enable_timing):
        assert enable_timing
        self.time, self.waited = None, False
        self.made.append(self)

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        assert self.time is not None
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited, "read before the GPU came to it"
        return (end.time - self.time) * 1e3  # milliseconds, as torch's


@pytest.fixture
def gpu(monkeypatch):
    properties = SimpleNamespace(
        name="Stand-in GPU", major=9, minor=0, multi_processor_count=132, L2_cache_size=L2,
        regs_per_multiprocessor=65536, shared_memory_per_multiprocessor=228 * 1024,
    )  # fmt: skip
    monkeypatch.setattr(_Event, "made", [], raising=False)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(devices.Cuda, "place", "cpu")
    monkeypatch.setattr(devices.Cuda, "sample_seconds", 1e-4)
    monkeypatch.setattr(triton, "INTERPRETING", False)  # read when it was imported, by whichever test came first
    return properties


@pytest.fixture
def libraries(monkeypatch):
    """Which libraries are installed, by distribution; none at first."""
    found: dict[str, str] = {}

    def version(distribution):
        if distribution in ("quack-kernels", "liger-kernel") and distribution not in found:
            raise PackageNotFoundError(distribution)
        return found.get(distribution, "1.0")

    monkeypatch.setattr(others, "version", version)
    return found


def run(row, **extra):
    (result,) = b.bench([row], device=b.Cuda(), kernel="native", repeat=5, seconds=0, **extra)
    return result


# -------------------------------------------------------------------------------------------------------------- clocks


def test_without_a_gpu_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(b.command)
    done = CliRunner().invoke(app, ["--device", "cuda", "--quick"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(f"--device cuda needs a GPU, and torch {torch.__version__} sees none.")
    done = CliRunner().invoke(app, ["--device", "tpu"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == "--device is one of cpu, cuda; got 'tpu'."


def test_a_sample_lies_between_two_events_and_is_divided(gpu, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    costs = iter([100.0, 1.0, 2.0, 3.0, 2.0])

    def call():
        now[0] += next(costs)

    assert b.Cuda().sample(call, 4) == pytest.approx(2.0)  # the call ahead of the first event does not count
    assert list(costs) == []
    assert [event.waited for event in _Event.made] == [False, True]


def test_turns_are_of_samples_of_the_gpus_length(gpu, monkeypatch):
    now, count = [0.0], [0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(devices.Cuda, "sample_seconds", 5e-3)

    def call():
        now[0] += 2**-10
        count[0] += 1

    times = measure.measure({"a": call}, 5, 0.0, b.Cuda())
    assert times == {"a": pytest.approx([2**-10] * 5)}
    # once, two samples of one, one of 6 (6/1024 s are the first over 5 ms), five turns of 6; and one ahead of each
    assert count[0] == 1 + 2 * 2 + 7 + 5 * 7


# ------------------------------------------------------------------------------------------------------------ rotation


@pytest.mark.parametrize(("l2", "count"), [(0, 1), (100, 2), (8191, 2), (8192, 3), (20000, 5)])
def test_copies_exceed_twice_the_cache(l2, count):
    case = cases.Case.make(b.Row("LN", (64, 32)))  # 8192 bytes
    found = measure.rotation(case, l2)
    assert len(found) == count
    assert found[0] is case
    assert not l2 or sum(each.x.nbytes for each in found) > 2 * l2


def test_a_copy_has_its_own_tensors_and_the_same_modules():
    case = cases.Case.make(b.Row("BN", (4, 8, 6, 6), "NHWC", torch.bfloat16, "relu", True))
    other = case.copy()
    assert other.ours is case.ours
    assert other.eager is case.eager
    for name in ("x", "dy", "residual"):
        mine, theirs = getattr(case, name), getattr(other, name)
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
        assert theirs.stride() == mine.stride() == (288, 1, 48, 8)
        assert theirs.is_leaf
        assert theirs.requires_grad == (name != "dy")
    forward = cases.Case.make(b.Row("LN", (4, 8), backward=False))
    assert not forward.copy().x.requires_grad


@pytest.mark.parametrize("forward", [True, False])
def test_gradients_are_those_of_the_copy_in_use(forward):
    generator = torch.Generator().manual_seed(1)
    case = cases.Case.make(b.Row("LN", (6, 16), forward=forward))
    found = measure.rotation(case, case.x.nbytes)
    assert len(found) == 3
    wanted = []
    for each in found:
        with torch.no_grad():
            each.x.copy_(torch.randn(6, 16, generator=generator))
            each.dy.copy_(torch.randn(6, 16, generator=generator))
        x = each.x.detach().double().requires_grad_()
        weight, bias = (p.detach().double().requires_grad_() for p in case.eager.norm.parameters())
        y = F.layer_norm(x, (16,), weight, bias, 1e-6)
        wanted.append(torch.autograd.grad(y, [x, weight, bias], each.dy.double()))
    call = measure._in_turns([each.step(case.eager, case.eager) for each in found])
    for want in (*wanted, *wanted):
        for got, right in zip(call(), want, strict=True):
            assert (got - right).abs().max() < 1e-5
    assert (wanted[0][0] - wanted[1][0]).abs().max() > 0.1  # another copy's gradient would not pass


def test_backward_alone_runs_forward_once():
    case = cases.Case.make(b.Row("RMS", (6, 16), forward=False))
    runs = []
    step = case.step(lambda x: runs.append(x) or case.eager(x), case.eager)
    first, second = step(), step()
    assert len(runs) == 1
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert case.row.name == "RMS 6×16 float32 train bwd"


class _Reads(TorchDispatchMode):
    """Which of some tensors the operators read, in order, each once in a row."""

    def __init__(self, tensors):
        super().__init__()
        self.number = {t.data_ptr(): i for i, t in enumerate(tensors)}
        self.order: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in args:
            at = self.number.get(t.data_ptr()) if isinstance(t, torch.Tensor) else None
            if at is not None and self.order[-1:] != [at]:
                self.order.append(at)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", [b.Row("LN", (64, 32)), b.Row("LN", (64, 32), backward=False)], ids=lambda r: r.name)
def test_every_side_visits_every_copy(row, gpu, libraries, monkeypatch):
    made = []
    right = measure.rotation
    monkeypatch.setattr(measure, "rotation", lambda case, l2: made.extend(right(case, l2)) or made)
    seen = {}

    def look(calls, *rest):
        for name, call in calls.items():
            with _Reads([each.x for each in made]) as reads:
                for _ in range(2 * len(made)):
                    call()
            seen[name] = reads.order
        return dict.fromkeys(calls, [1.0] * 5)

    monkeypatch.setattr(measure, "measure", look)
    result = run(row)
    assert result.copies == len(made) == 17  # of 8 KiB, beyond 128 KiB
    assert seen.keys() == {"torch", "ours", "copy"}
    for order in seen.values():
        assert order == 2 * list(range(len(made)))


# ---------------------------------------------------------------------------------------------------------- the others


def _rms(x, weight, eps):
    return (x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()).to(x.dtype)


def _quack(wrong=1.0):
    made = ModuleType("quack.rmsnorm")

    def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
        assert weight.dtype == bias.dtype == torch.float32
        y, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
        return (y.to(x.dtype), rstd, mean) if return_rstd and return_mean else y.to(x.dtype)

    def layernorm_bwd(x, weight, dout, rstd, mean):
        hat = (x.float() - mean) * rstd
        g = dout.float() * weight
        dx = rstd * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True))
        return dx.to(x.dtype), (dout.float() * hat).sum(0), dout.float().sum(0)

    made.rmsnorm = lambda x, weight, eps: _rms(x, weight, eps) * wrong
    made.layernorm_fwd, made.layernorm_bwd = layernorm_fwd, layernorm_bwd
    return made


class _LigerRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6, in_place=True):
        super().__init__()
        assert not in_place, "would overwrite dy"
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x):
        return _rms(x, self.weight, self.eps)


class _LigerLayerNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(hidden_size)), nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@pytest.fixture
def stand_ins(libraries, monkeypatch):
    libraries |= {"quack-kernels": "0.6", "liger-kernel": "0.8"}
    liger = ModuleType("liger_kernel.transformers")
    liger.LigerRMSNorm, liger.LigerLayerNorm = _LigerRMSNorm, _LigerLayerNorm
    for name, module in (("quack", ModuleType("quack")), ("liger_kernel", ModuleType("liger_kernel"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", _quack())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)


@pytest.mark.parametrize("family", ["LN", "RMS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passes", [{}, {"backward": False}, {"forward": False}], ids=str)
def test_other_libraries_are_checked_and_timed(family, dtype, passes, gpu, stand_ins):
    result = run(b.Row(family, (32, 48), "", dtype, **passes))
    assert (result.wrong, result.left_out) == ("", {})
    assert result.others.keys() == result.against.keys() == {"quack", "Liger"}
    assert all(timing.median > 0 for timing in result.others.values())


def test_batch_norm_has_no_other_library_and_the_cpu_none_at_all(gpu, stand_ins):
    assert run(b.Row("BN", (16, 12))).others == {}
    (result,) = b.bench([b.Row("LN", (16, 12))], kernel="native", repeat=5, seconds=0)
    assert result.others == result.left_out == {}


def test_a_wrong_or_broken_library_is_left_out(gpu, stand_ins, monkeypatch):
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", _quack(wrong=1.001))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)  # its import raises
    result = run(b.Row("RMS", (32, 48)))
    assert result.ratio is not None
    assert result.others == {}
    assert result.left_out["quack"].startswith("the output is off by")
    assert result.left_out["Liger"].startswith("ModuleNotFoundError: ")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_torch_compile_is_held_to_the_same_truth(gpu, libraries, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: lambda x: module(x) * 1.001)
    result = run(b.Row("BN", (16, 12)), compiled=True)
    assert result.left_out["torch.compile"].startswith("the output is off by")
    monkeypatch.setattr(torch, "compile", lambda module: module)
    assert run(b.Row("BN", (16, 12)), compiled=True).others.keys() == {"torch.compile"}


# ----------------------------------------------------------------------------------------------- rows, figures, output


def test_rows_are_those_of_resnet50_and_of_long_rows():
    """A bottleneck's first norm is ahead of its stride, which lies in the 3×3 convolution, as torchvision has it."""
    shapes, side = {(128, 64, 112, 112)}, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        shapes.add((128, width, side, side))
        side //= stride
        shapes |= {(128, width, side, side), (128, 4 * width, side, side)}
    names = {
        f"{norm} {'×'.join(map(str, shape))} {layout} {dtype} train fwd+bwd"
        for norm in ("BN", "BN+relu", "BN+add+relu")
        for shape in shapes
        for layout in ("NCHW", "NHWC")
        for dtype in ("float32", "bfloat16")
    }
    names |= {
        f"{norm} {shape} {dtype} train {passes}"
        for norm in ("LN", "RMS")
        for shape in ("8192×1024", "8192×2048", "8192×4096", "4096×8192", "4096×16384")
        for dtype in ("float32", "bfloat16")
        for passes in ("fwd", "bwd")
    }
    assert sorted(row.name for row in b.rows("cuda")) == sorted(names)


def test_least_traffic_of_backward_alone():
    row = b.Row("LN", (64, 1024), forward=False)
    assert least_traffic(row, 8192) == 3  # x and dy of a row are 8192 bytes
    assert least_traffic(row, 8191) == 5


@pytest.mark.parametrize("row", [b.Row("LN", (8, 8)), b.Row("LN", (8, 8), backward=False)], ids=lambda row: row.name)
def test_the_kernel_is_asked_for_with_the_gradients_that_are_timed(row, gpu, libraries, monkeypatch):
    modes = []
    right = measure.explain
    monkeypatch.setattr(measure, "explain", lambda *args: modes.append(torch.is_grad_enabled()) or right(*args))
    assert run(row).kernel == "native"
    assert modes == [row.backward]


def test_summary_of_others_and_of_the_copy_by_hand():
    def result(row, ratio, of_copy, **against):
        against = {name: measure.Timing(value, value, value) for name, value in against.items()}
        return b.Result(row, "triton", ratio=measure.Timing(ratio, ratio, ratio), against=against, of_copy=of_copy)

    large, small = b.Row("LN", (64, 32), backward=False), b.Row("LN", (32, 32), backward=False)
    found = [result(large, 2.0, 0.9, quack=1.0), result(replace(large, act="relu"), 2.0, 0.6, quack=4.0)]
    found += [result(large, 2.0, 0.5), result(large, 2.0, 0.8), result(small, 2.0, 0.1, compiled=0.5)]
    total = b.summary(found, l2_bytes=4096)
    assert total.others == {"quack": (2, pytest.approx(2.0), 1.0), "compiled": (1, pytest.approx(0.5), 0.5)}
    assert total.of_copy == {"LN train fwd": (3, 0.8, 0.5), "LN+relu train fwd": (1, 0.6, 0.6)}
    assert b.summary(found).of_copy == {}


@pytest.fixture
def app():
    made = typer.Typer()
    made.command()(b.command)
    return made


QUICK = ["--device", "cuda", "--quick", "--no-tune-allocator", "--repeat", "5", "--seconds", "0", "--filter", "LN"]


def test_json_lines_say_what_the_gpu_is(app, gpu, stand_ins):
    gpu.L2_cache_size = 5 << 20
    done = CliRunner().invoke(app, [*QUICK, "--kernel", "native", "--json"])
    assert done.exit_code == 0, done.output
    about, *found, total = map(json.loads, done.stdout.splitlines())
    assert {"driver", "cuda", "cudnn", "triton", "cpu", "torch", "commit"} <= about.keys()
    assert (about["device"], about["gpu"], about["compute_capability"]) == ("cuda", "Stand-in GPU", "9.0")
    assert (about["l2_bytes"], about["cache_bytes"]) == (5 << 20, (256 + 228) * 1024)
    assert about["libraries"] == {"quack": "0.6", "Liger": "0.8"}
    assert [row["name"].partition(" train ")[2] for row in found] == ["fwd+bwd", "fwd", "bwd"]
    assert [row["copies"] for row in found] == [4, 7, 4]  # of 3 MiB, and 1.5 MiB in bfloat16, beyond 10 MiB
    assert all(row["others"][name]["median"] > 0 for row in found for name in ("quack", "Liger"))
    assert total["others"].keys() == {"quack", "Liger"}
    assert total["of_copy"] == {}  # none exceeds the cache


def test_the_table_says_who_ran_and_who_is_missing(app, gpu, libraries, monkeypatch):
    libraries["quack-kernels"] = "0.6"
    for name, module in (("quack", ModuleType("quack")), ("quack.rmsnorm", _quack())):
        monkeypatch.setitem(sys.modules, name, module)
    gpu.L2_cache_size = 2 << 20
    done = CliRunner().invoke(app, [*QUICK, "--kernel", "native"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    heads = "kernel torch quack ours torch/ours quartiles of bests quack/ours sizes of copy"
    assert lines[0].split()[5:] == heads.split()
    (machine,) = [line for line in lines if line.startswith("Stand-in GPU, compute capability 9.0")]
    assert "second-level cache 2 MiB" in machine
    assert "quack 0.6. Times by events; 2 to 3 copies" in machine
    assert "Not installed, and so not timed: Liger (pip install liger-kernel)." in lines
    # the row in bfloat16 is within the cache
    said = [line.partition(":")[0] for line in lines[-5:-1]]
    beyond = [f"Of copy, beyond the cache, LN train {passes}" for passes in ("fwd+bwd", "bwd")]
    assert said == [*beyond, "quack/ours", "Geometric mean of 3 rows"]


def test_triton_is_demanded_and_a_kernel_that_raises_is_not_timed(app, gpu, libraries):
    """Of the stand-in's tensors, which lie on the CPU, the demanded kernel says that it cannot run them."""
    done = CliRunner().invoke(app, QUICK)
    assert done.exit_code == 1
    wrong = [line for line in done.stdout.splitlines() if line.startswith("WRONG and not timed: ")]
    assert len(wrong) == 3
    assert all("RuntimeError: The kernel 'triton' was demanded and cannot run" in line for line in wrong)
