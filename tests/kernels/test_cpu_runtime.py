"""The CPU backend at run time: threads, forks, processes, the cache on disk, what is missing, what `explain` says."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import normwright as nw
from normwright.catalog import CATALOG
from normwright.kernels import cpu, dispatch
from normwright.kernels.cpu import build

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(build.parallel_for() is None, reason="this torch has no torch_parallel_for")

# (row, shape): one of each family, all beyond cpu.SERIAL, so that two threads share them
CALLS = [("BatchNorm", (8, 16, 32, 32)), ("LayerNorm", (512, 256)), ("BatchNorm", (4096, 40)), ("RMSNorm", (300, 500))]
LARGE = (64, 8, 32, 32)


def test_the_calls_are_shared_out():
    for row, shape in CALLS:
        found = cpu.recipe(CATALOG[row].spec, True, shape, torch.empty(shape).stride(), torch.float32, 2)
        assert isinstance(found, cpu.Recipe)
        assert found.parallel
        assert found.tasks > 1


def one_step(row, x, dy):
    """Output, gradients and running statistics of one training step on the CPU kernels."""
    spec = CATALOG[row].spec
    size = spec.layout(tuple(x.shape)).affine_shape
    leaves = [x.clone().requires_grad_(), torch.ones(size, requires_grad=True)]
    buffers = {}
    if spec.running:
        buffers = {"running_mean": torch.zeros(size), "running_var": torch.ones(size)}
    with torch.enable_grad():
        y = nw.normalize(leaves[0], spec, leaves[1], act="relu", **buffers)
        grads = torch.autograd.grad(y, leaves, dy)
    return [y.detach(), *grads, *buffers.values()]


@pytest.fixture
def demanded():
    with nw.use("cpu"):
        yield


# -------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.usefixtures("demanded")
def test_eight_python_threads_at_once():
    """The same bits as one after the other, also while a kernel is compiled for the first time."""
    jobs = []
    for i in range(48):
        row, shape = CALLS[i % len(CALLS)]
        jobs.append((row, torch.randn(shape) + i, torch.randn(shape)))
    for key in list(build._kernels):
        if key[3] == "relu":  # all threads find no kernel and load it together
            del build._kernels[key]
    start = threading.Barrier(8)

    def work(n):
        start.wait()
        return [one_step(*job) for job in jobs[n::8]]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(8)))
    for n in range(8):
        for job, found in zip(jobs[n::8], together[n], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, one_step(*job), strict=True))


@pytest.mark.usefixtures("demanded")
@pytest.mark.parametrize(("row", "shape"), CALLS)
def test_number_of_threads(row, shape):
    """Any number of threads gives the same within rounding, and the same number the same bits."""
    x, dy = torch.randn(shape) * 2 + 1, torch.randn(shape)
    found = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found[threads] = one_step(row, x, dy)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(found[threads], one_step(row, x, dy), strict=True))
    for threads in (2, 3):
        for a, b in zip(found[1], found[threads], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-4)


# -------------------------------------------------------------------------------------------------- forks and processes


def _in_child(queue, x, dy):
    torch.set_num_threads(1)  # as a DataLoader does: torch's own pool does not survive a fork
    queue.put([t.numpy() for t in one_step("BatchNorm", x, dy)])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.usefixtures("demanded")
def test_a_fork_after_kernels_ran():
    x, dy = torch.randn(8, 16, 32, 32), torch.randn(8, 16, 32, 32)
    torch.set_num_threads(2)
    one_step("BatchNorm", x, dy)  # the pool has threads before the fork
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    child = fork.Process(target=_in_child, args=(queue, x, dy))
    child.start()
    found = queue.get()
    child.join(30)
    assert child.exitcode == 0
    torch.set_num_threads(1)
    truth = one_step("BatchNorm", x, dy)
    assert all(torch.equal(a, torch.as_tensor(b)) for a, b in zip(truth, found, strict=True))


class _Normalized(torch.utils.data.Dataset):
    """A dataset that runs a layer, as some augmentations do."""

    def __init__(self):
        self.x = torch.randn(6, 3, 200, 200)
        self.layer = nw.InstanceNorm2d(3)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(self.x[i : i + 1])[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("demanded")
def test_data_loader_workers():
    data = _Normalized()
    torch.set_num_threads(2)
    truth = nn.functional.instance_norm(data.x)
    data[0]  # the pool has threads before the fork
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, timeout=60)
    torch.testing.assert_close(torch.cat(list(loader)), truth, rtol=1e-5, atol=1e-5)


STEP = """
import json, sys, warnings
{before}
import torch
import normwright as nw
from normwright.kernels.cpu import build
torch.manual_seed(0)
x = torch.randn(4, 3, 60, 70) * 2 + 1
layer = nw.BatchNorm2d(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    said = str(nw.explain(layer, x))
    y = layer(x.requires_grad_())
    y.square().sum().backward()
truth = torch.nn.functional.batch_norm(x, None, None, training=True)
{after}
print(json.dumps({{
    "said": said,
    "error": (y - truth).abs().max().item(),
    "how": [how for how, _ in build.compile_times.values()],
    "seconds": [seconds for _, seconds in build.compile_times.values()],
    "warnings": [[w.category.__name__, str(w.message)] for w in caught],
}}))
"""


def start(cache, before="", after="", **environment) -> subprocess.Popen:
    """A new process that trains one step and says in JSON how its kernels came."""
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", STEP.format(before=before, after=after)],
        env={**os.environ, "NORMWRIGHT_CACHE": str(cache), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["error"] < 1e-5
    return found


@pytest.mark.slow
def test_processes_that_start_together_and_the_next(tmp_path):
    """Four at once on an empty cache; the next loads what they left, and replaces what is damaged."""
    together = [finish(process) for process in [start(tmp_path) for _ in range(4)]]
    for found in together:
        assert "runs on cpu" in found["said"]
        assert len(found["how"]) == 2
        assert not found["warnings"]
    assert any(found["how"] == ["compiled"] * 2 for found in together)
    files = sorted((tmp_path / "kernels").iterdir())
    assert len(files) == 2, "a temporary file was left, or a kernel not written"

    found = finish(start(tmp_path))
    assert found["how"] == ["loaded"] * 2
    assert sum(found["seconds"]) < 5  # most of it the import of Numba

    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    files[1].write_bytes(b"")
    assert finish(start(tmp_path))["how"] == ["compiled"] * 2
    assert len(files[0].read_bytes()) > len(whole) // 2
    assert finish(start(tmp_path))["how"] == ["loaded"] * 2


MASKED_OR_NOT = """
import sys
import torch
import normwright as nw
from normwright.kernels.cpu import build
torch.manual_seed(0)
x = torch.randn(4, 3, 60, 70) * 2 + 1
mask = torch.rand(4, 60, 70) > 0.3
truths = {
    "whole": torch.nn.functional.batch_norm(x, None, None, training=True),
    "masked": torch.nn.functional.batch_norm(x.movedim(1, -1)[mask], None, None, training=True),
}
with nw.use("cpu"):
    for name in sys.argv[1:]:
        y = nw.BatchNorm2d(3)(x, mask=mask if name == "masked" else None)
        got = y.movedim(1, -1)[mask] if name == "masked" else y
        torch.testing.assert_close(got, truths[name], rtol=1e-5, atol=1e-5)
print(*(how for how, _ in build.compile_times.values()))
"""


@pytest.mark.slow
def test_kernels_of_different_processes_run_side_by_side(tmp_path):
    """Numba counts functions in each process from 1, so that kernels left as it makes them define the same symbols."""

    def run(*names):
        return subprocess.Popen(
            [sys.executable, "-c", MASKED_OR_NOT, *names],
            # the names of functions hold their fast-math flags, a set
            env={**os.environ, "NORMWRIGHT_CACHE": str(tmp_path), "PYTHONHASHSEED": "0"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def check(processes, how):
        for out, err, code in [(*process.communicate(timeout=240), process.returncode) for process in processes]:
            assert code == 0, err
            assert out.strip() == how

    check([run("whole"), run("masked")], "compiled")
    check([run("whole", "masked"), run("masked", "whole")], "loaded loaded")


ROUNDED = """
import hashlib
import torch
import normwright as nw
from normwright.kernels.cpu import build
torch.manual_seed(0)
x, dy = torch.randn(2, 8, 6, 24, 24).unbind()
layer = nw.BatchNorm2d(6, act="sigmoid")
with nw.use("cpu"):
    y = layer(x.requires_grad_())
    found = (y, *torch.autograd.grad(y, [x, *layer.parameters()], dy), layer.running_var)
print(*(how for how, _ in build.compile_times.values()))
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in found)).hexdigest())
"""


@pytest.mark.slow
def test_a_kernel_just_compiled_rounds_like_the_one_from_the_disk(tmp_path):
    """Or else the first run of a study could not be repeated bit for bit."""
    environment = {**os.environ, "NORMWRIGHT_CACHE": str(tmp_path)}
    first, second = (
        subprocess.check_output([sys.executable, "-c", ROUNDED], env=environment, text=True).splitlines()
        for _ in range(2)
    )
    assert (first[0], second[0]) == ("compiled compiled", "loaded loaded")
    assert first[1] == second[1]


def test_a_cache_that_cannot_be_written(tmp_path):
    """One warning in the process, and right numbers."""
    (tmp_path / "file").write_text("in the way")
    found = finish(start(tmp_path / "file" / "cache"))
    assert found["how"] == ["compiled"] * 2
    ((category, text),) = found["warnings"]
    assert category == "RuntimeWarning"
    assert "Compiled kernels cannot be kept in" in text
    assert "Set NORMWRIGHT_CACHE" in text


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("NORMWRIGHT_CACHE", str(tmp_path))
    assert build.cache_directory() == tmp_path / "kernels"
    monkeypatch.delenv("NORMWRIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_directory() == tmp_path / "xdg" / "normwright" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert build.cache_directory() == tmp_path / "home" / ".cache" / "normwright" / "kernels"


# ------------------------------------------------------------------------------------------------------ what is missing

NO_NUMBA = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "numba" else find(name, *more)
sys.modules["numba"] = None
"""
DEMAND = """
try:
    with nw.use("cpu"):
        layer(x)
except RuntimeError as error:
    said += " | " + str(error)
"""


def test_without_numba(tmp_path):
    found = finish(start(tmp_path, NO_NUMBA, DEMAND))
    said, error = found["said"].split(" | ")
    assert "runs on native (not cpu: Numba is not installed; install it with: pip install numba)" in said
    assert error.startswith("The kernel 'cpu' was demanded and cannot run '[b] c [s...]'")
    assert "Numba is not installed" in error
    assert not found["how"]
    assert not found["warnings"]


def test_without_torch_parallel_for(monkeypatch):
    monkeypatch.setattr(build, "parallel_for", lambda: None)
    reason = build._unavailable()
    assert reason == f"torch {torch.__version__} has no torch_parallel_for; it is there from torch 2.10 on"
    monkeypatch.setattr(build, "UNAVAILABLE", reason)
    layer, x = nw.BatchNorm2d(8), torch.randn(LARGE)
    assert str(nw.explain(layer, x)).endswith(f"runs on native (not cpu: {reason})")
    assert torch.equal(layer(x), nn.BatchNorm2d(8)(x))
    with nw.use("cpu"), pytest.raises(RuntimeError, match="has no torch_parallel_for"):
        layer(x)


def test_this_torch_and_numba_are_enough():
    assert build._unavailable() is None


def test_numba_is_imported_with_the_first_kernel_only():
    """And torch's compiler and Triton, which are as slow to import as torch is, not at all."""
    code = (
        "import sys, normwright, torch\n"
        "normwright.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))\n"
        "print([name for name in ('numba', 'torch._dynamo', 'triton', 'sympy') if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.strip() == "[]"


# ---------------------------------------------------------------------------------------------------- what explain says


def said(layer, *inputs, **more) -> str:
    return str(nw.explain(layer, *inputs, **more))


def test_explain_names_layer_pattern_shape_and_kernel():
    model = nn.Sequential(nw.BatchNorm2d(8), nn.ReLU(), nn.Sequential(nw.GroupNorm(2, 8)))
    with torch.no_grad():
        found = nw.explain(model, torch.randn(LARGE))
    assert str(found).splitlines() == [
        "0: '[b] c [s...]' on (64, 8, 32, 32) runs on cpu",
        "2.0: 'b (g [c]) [s...]' on (64, 8, 32, 32) runs on cpu",
    ]
    assert found.kernel == "cpu"
    assert str(nw.explain(model, torch.randn(LARGE))).splitlines() == [
        "0: '[b] c [s...]' on (64, 8, 32, 32) runs on cpu",
        "2.0: 'b (g [c]) [s...]' on (64, 8, 32, 32) runs on native "
        "(not cpu: torch's own operator is as fast for this norm alone in contiguous float32)",
    ]
    assert said(nn.ReLU(), torch.ones(3)) == "no call of normwright's kernels"


class _OfItsOwn(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("layer", "x", "why"),
    [
        (nw.BatchNorm2d(4), torch.randn(8, 4, 8, 8), "torch's own operators are faster on so few elements"),
        (nw.BatchNorm2d(4), torch.randn(0, 4, 8, 8), "the input is empty"),
        (nw.BatchNorm2d(8), torch.randn(LARGE, device="meta"), "the input is on meta"),
        (nw.BatchNorm2d(8), torch.randn(LARGE).as_subclass(_OfItsOwn), "the input is a _OfItsOwn, not a plain tensor"),
        (
            nw.Norm("[b c] d", affine="c", running=False, c=8),
            torch.randn(64, 8, 320),
            "the parameters vary along several loops",
        ),
    ],
    ids=["tiny", "empty", "meta", "subclass", "no plan"],
)
def test_explain_says_why_not(layer, x, why):
    if x.device.type == "meta":
        layer = layer.to("meta")
    text = said(layer, x)
    assert "runs on native" in text
    assert f"not cpu: {why}" in text
    with nw.use("cpu"):
        if why.startswith("torch's own"):
            layer(x)  # what is only slower is run when it is demanded
        else:
            with pytest.raises(RuntimeError, match=why):
                layer(x)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_type_without_a_kernel(dtype):
    x = torch.randn(LARGE).to(dtype)
    with nw.use("cpu"), pytest.raises(RuntimeError, match=f"there is no kernel for {dtype}"):
        nw.normalize(x, CATALOG["BatchNorm"].spec)


def test_explain_with_mask_residual_and_other_strides():
    layer, x = nw.BatchNorm2d(8, act="relu"), torch.randn(LARGE)
    mask = torch.rand(64) > 0.5
    for more in ({"mask": mask}, {"residual": torch.randn(LARGE)}):
        assert said(layer, x, **more).endswith("runs on cpu")
    for other in (x.to(memory_format=torch.channels_last), x[..., 1:], x.transpose(2, 3)):
        assert said(layer, other).endswith("runs on cpu")
    assert "not cpu: the residual is torch.float64 and the input torch.float32" in said(layer, x, residual=x.double())
    tracked = nw.InstanceNorm2d(8, track_running_stats=True)
    assert "averaged over samples, with a mask, have no kernel" in said(tracked, x, mask=mask)


def test_explain_leaves_everything_as_it_was():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nw.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(x + torch.rand_like(x))

    model = Noisy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    nw.explain(model, torch.ones(LARGE))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.norm._forward_hooks

    class Failing(Noisy):
        def forward(self, x):
            super().forward(x)
            raise KeyError("as it may")

    model = Failing()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError, match="as it may"):
        nw.explain(model, torch.ones(LARGE))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.norm._forward_hooks
    assert dispatch._record is None


# --------------------------------------------------------------------------------------------------------------- nw.use


def test_use_is_undone_on_leaving_also_by_an_exception():
    assert dispatch._demanded is None
    with nw.use("native"):
        assert said(nw.BatchNorm2d(8), torch.randn(LARGE)).endswith("runs on native")
        with nw.use("cpu"):
            assert said(nw.BatchNorm2d(2), torch.randn(4, 2, 3, 3)).endswith("runs on cpu")
        assert dispatch._demanded == "native"
        with contextlib.suppress(KeyError), nw.use(None):
            assert dispatch._demanded is None
            raise KeyError
        assert dispatch._demanded == "native"
    assert dispatch._demanded is None


def test_use_without_with_stays():
    try:
        nw.use("native")
        assert dispatch._demanded == "native"
    finally:
        nw.use(None)
    assert dispatch._demanded is None


@pytest.mark.parametrize("name", ["gpu", "CPU", "", 3])
def test_use_of_an_unknown_kernel(name):
    known = "A kernel is one of 'cpu', 'triton', 'native', or None for the best; got"
    with pytest.raises(ValueError, match=known) as caught:
        nw.use(name)
    assert repr(name) in str(caught.value)
    assert dispatch._demanded is None


@pytest.mark.parametrize(
    ("layer", "of", "shape"),
    [
        (nw.BatchNorm1d(8), "batch_norm_1d", (-1, 8)),
        (nw.BatchNorm1d(8), "batch_norm", (-1, 8, 4)),
        (nw.LayerNorm(64), "layer_norm", (-1, 64)),
        (nw.LayerNorm(64, act="relu"), "layer_norm", (-1, 64)),
        (nw.GroupNorm(2, 8), "group_norm", (-1, 8, 4)),
    ],
)
def test_the_free_choice_is_the_kernel_from_the_measured_size_on(layer, of, shape):
    # without gradients the crossing is at a quarter; an activation halves it
    least = cpu.WORTH[of] // 4 // (2 if layer.act else 1)
    x = torch.randn(least).view(shape)
    assert "so few elements" in said(layer, x)
    with torch.no_grad():
        assert said(layer, x).endswith("runs on cpu")
        assert "so few elements" in said(layer, x[1:])


def test_gradients_and_a_fused_activation_move_the_crossing():
    elements = cpu.WORTH["layer_norm"]
    x = torch.empty(elements, dtype=torch.bfloat16)
    assert cpu.few(x[1:], "layer_norm", False)
    assert not cpu.few(x, "layer_norm", False)
    assert not cpu.few(x[: elements // 2], "layer_norm", True)
    with torch.no_grad():
        assert not cpu.few(x[: elements // 4], "layer_norm", False)
        assert cpu.few(x[1 : elements // 4], "layer_norm", False)


@pytest.mark.parametrize("layer", [nw.RMSNorm(64), nw.ChannelNorm(64), nw.InstanceNorm1d(64)])
def test_what_torch_composes_or_copies_is_a_kernel_at_any_size(layer):
    assert said(layer, torch.randn(1, 64, 64)).endswith("runs on cpu")
