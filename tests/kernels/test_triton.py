"""The Triton kernels, interpreted on the CPU, against the NumPy reference in float64, at the places of the CPU kernels.

The interpreter runs one program after another, so every kernel, index and mask is proved here; what a GPU makes of them
is not. Each place runs with tiles as on a GPU, where most fit one, and with tiny ones, which cut every loop and share.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cpu import BN, LAYERS, LN, PLACES, Place, buffers_of, compare_compiled, lay, maskable, statistic_of
from test_functional import Problem
from tolerances import assert_close

import normwright as nw
from normwright import reference
from normwright.functional import ACTIVATIONS
from normwright.kernels import triton
from normwright.kernels.call import Call

compiler = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not (triton.INTERPRETING or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
)
DEVICE = "cpu" if triton.INTERPRETING else "cuda"
SMALL = triton.Config(tile=64, row=64, each=2, held=2, lines=8, resident=16, splits=3)
CONFIGS = {"as-is": triton.CONFIG, "small": SMALL}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
VARIANTS = [
    (F32, None, False, False),
    (F32, "relu", True, False),
    (F32, "sigmoid", False, True),
    (F64, "tanh", True, True),
    (F64, "gelu", False, False),
    (BF16, "silu", True, False),
    (BF16, "relu", False, True),
    (F16, "leaky_relu", True, True),
    (F16, None, True, False),
]


def name_of(variant):
    dtype, act, residual, mask = variant
    return f"{str(dtype)[6:]}-{act}{'-residual' * residual}{'-mask' * mask}"


@pytest.fixture(params=CONFIGS)
def config(request, monkeypatch):
    monkeypatch.setattr(triton, "CONFIG", CONFIGS[request.param])
    return CONFIGS[request.param]


def cut(place, x, evaluate=False):
    return triton.cut(place.spec, not evaluate, x.shape, x.stride(), x.dtype, 2, triton.CONFIG)


def problem_at(place, dtype, act=None, residual=False, mask=0, **more):
    param = F64 if dtype == F64 else F32
    p = Problem(place.spec, place.shape, dtype, param=param, act=act, residual=residual, mask=mask, **more)
    for name in ("x", "dy"):
        setattr(p, name, lay(getattr(p, name), place.layout))
    return p


def check(p, place, dtype, masked):
    """Output, gradients, running statistics; and evaluation by running statistics where that has kernels."""
    spec = place.spec
    with nw.use("triton"):
        if not spec.running or (masked and p.layout.merged):
            p.check(dtype)
            return
        buffers = buffers_of(p, spec.center)
        old = {name: value.clone() for name, value in buffers.items()}
        p.check(dtype, new_weight=0.3, **buffers)
        _, cache = p.reference(new_weight=0.3, **{name: p.numpy(value) for name, value in old.items()})
        for name, value in buffers.items():
            condition = max(1.0, np.abs(cache.mean * cache.r).max(initial=0.0)) if name == "running_mean" else 1.0
            assert_close(value, getattr(cache, name), p.layout.count, condition=condition, scale=0.7, what=name)
            assert not torch.equal(value, old[name])
        if isinstance(cut(place, p.x, evaluate=True), triton.Cut):
            moved = {name: value.clone() for name, value in buffers.items()}
            p.check(dtype, use_batch_stats=False, **moved)
            assert all(torch.equal(moved[name], buffers[name]) for name in moved)


def test_the_places_reach_every_cut(config):
    found = [cut(place, lay(torch.empty(place.shape), place.layout)) for place in PLACES]
    assert all(isinstance(f, triton.Cut) for f in found)
    kinds = [f.statistics for f in found] + [t for f in found if f.by_row is None for t in (f.values, f.gradients)]
    assert {t.form for t in kinds} == {"flat", "rows", "nest"}
    assert {t.constants["V"] for t in kinds} >= {1, 2, 4, 8}
    assert {t.constants["EVEN"] for t in kinds} == {True, False}
    assert {t.BK > 1 for t in kinds} == {True, False}
    assert {t.one for t in kinds if t.rows == 1} >= ({True, False} if config is SMALL else {True})
    assert {t.rows > 1 for t in kinds} == {True, False}
    if config is SMALL:
        assert {(t.one, t.splits > 1) for t in kinds} == {(True, False), (False, False), (False, True)}
        assert any(t.rows > 1 and t.splits > 1 for t in kinds)
        assert {f.by_row.one for f in found if f.by_row} == {True, False}
        assert {f.by_row.splits > 1 for f in found if f.by_row} == {True, False}
    for t in kinds:
        assert (t.splits - 1) * t.chunk < t.R <= t.splits * t.chunk
        assert t.chunk % t.BR == 0
    for place in PLACES:  # a tile has whole bytes of signs to itself
        x = lay(torch.empty(place.shape), place.layout)
        f = triton.cut(place.spec, True, x.shape, x.stride(), x.dtype, 2, triton.Config(tile=8, row=8, lines=8))
        assert f.statistics.one or f.statistics.BR % 8 == 0


# sizes that are cut in ways of their own
MORE = [
    Place("columns", "ChannelNorm", (1, 20, 2, 5)),
    Place("columns", "ChannelNorm", (2, 12, 2, 4)),
    Place("segments", "BatchNorm", (3, 4, 3, 3)),
    Place("columns", "BatchNorm", (3, 24, 3, 5), "channels_last"),
    Place("columns", "BatchNorm", (3, 8)),
    Place("columns", "GroupNorm", (2, 16, 3, 5), "channels_last", {"g": 2}),
]


def each_cut(config):
    """Of the places that are cut alike, the smallest: interpreting is slow, tile by tile."""
    smallest, coarse = [], set()
    for place in sorted([*PLACES, *MORE], key=lambda p: int(np.prod(p.shape))):
        x = lay(torch.empty(place.shape), place.layout)
        f = triton.cut(place.spec, True, x.shape, x.stride(), x.dtype, 2, config)
        tiles = (f.statistics, f.by_row or f.gradients)
        loops = (
            f.by_row is None,
            f.plan.by_a,
            f.across,
            *((t.form, t.one, t.splits > 1, t.rows > 1, t.BK > 1) for t in tiles),
        )
        cuts = (*loops, f.plan.G > 1, place.spec.center, *((t.constants["V"], t.constants["EVEN"]) for t in tiles))
        if loops not in coarse or (cuts not in coarse and x.numel() < 1000):
            smallest.append(place)
        coarse |= {loops, cuts}
    return smallest


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_variants(variant, config):
    dtype, act, residual, masked = variant
    for place in [*PLACES, *MORE] if config is not SMALL else each_cut(config):
        if maskable(place, masked):
            p = problem_at(place, dtype, act, residual, 9 if masked else 0)
            try:
                check(p, place, dtype, masked)
            except AssertionError as error:
                raise AssertionError(f"{place}: {error}") from error


QUICK = [
    place
    for _, group in itertools.groupby(sorted(PLACES, key=lambda p: (p.row, p.layout)), key=lambda p: (p.row, p.layout))
    for place in [min(group, key=lambda p: int(np.prod(p.shape)))]
]


@pytest.mark.slow
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_every_row_and_activation(act):
    for place in QUICK:
        check(problem_at(place, F32, act, residual=act in ("gelu", "relu", None)), place, F32, False)


@pytest.mark.parametrize("place", QUICK, ids=str)
def test_large_mean(place, config):
    """At mean 3000 and deviation 1 a variance in one pass of float32 is off by a factor of three."""
    check(problem_at(place, F32, mean=3000.0, deviation=1.0), place, F32, False)


@pytest.mark.parametrize("place", QUICK, ids=str)
def test_a_large_mean_costs_no_precision(place, config):
    """What a mean of 3000 loses by rounding to float32 is put back: the tolerance without a condition holds."""
    p = problem_at(place, F32, mean=3000.0, deviation=1.0)
    leaves = p.leaves()
    with nw.use("triton"):
        y = p.run(leaves)
        dx = torch.autograd.grad(y, leaves["dx"], p.dy)[0]
    truth, cache = p.reference()
    assert_close(y, truth, p.layout.count, scale=1.0, what="y")
    rstd = float(cache.r.max())
    assert_close(dx, reference.backward(p.numpy(p.dy), cache)["dx"], p.layout.count, scale=4.0 * rstd, what="dx")


def test_what_the_compiler_is_told_of_neighbours_is_so(config, monkeypatch):
    """It loads V neighbours at once on our word alone; where that is wrong the interpreter would not notice."""
    triton._kernels()
    from triton.runtime import interpreter

    told = {}

    def check(handle, name, values):
        told[name] = (values, handle.data)
        if name != "tt.constancy":
            return
        (axis, V), inside = max(enumerate(values), key=lambda pair: pair[1]), handle.data
        assert told["tt.divisibility"][0] == told["tt.contiguity"][0] == values
        groups, first, offsets = (
            np.moveaxis(np.broadcast_to(data, inside.shape), axis, -1).reshape(-1, V)
            for data in (inside, inside, told["tt.contiguity"][1])
        )
        assert (groups == groups[:, :1]).all()
        offsets = offsets[first[:, 0]]
        assert (offsets == offsets[:, :1] + np.arange(V)).all()
        assert (offsets[:, 0] % V == 0).all()
        seen.add((axis, V, bool(inside.all())))

    seen: set[tuple[int, int, bool]] = set()
    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", check)
    for place in each_cut(config):
        p = problem_at(place, F32, "silu")
        with nw.use("triton"):
            p.run(p.leaves()).backward(p.dy)
    assert {V for _, V, _ in seen} == {1, 2, 4, 8}
    assert {axis for axis, _, _ in seen} == {0, 1}
    assert {full for *_, full in seen} == {True, False}


def test_one_bad_value_spoils_its_own_statistic_only(config):
    for place in QUICK:
        p = problem_at(place, F32, mean=1.0)
        statistic = statistic_of(p)
        index = tuple(0 for _ in place.shape)
        p.x[index] = float("nan")
        with nw.use("triton"):
            y = nw.normalize(p.x, p.spec, p.weight, p.bias)
        assert torch.equal(y.isnan(), statistic == statistic[index]), place


def test_double_backward_is_the_formulas(config):
    x = torch.randn(4, 3, 5, dtype=F64, requires_grad=True)
    weight = torch.randn(3, dtype=F64, requires_grad=True)
    with nw.use("triton"):
        assert torch.autograd.gradgradcheck(
            lambda x, w: nw.normalize(x, BN, w, None, act="tanh"), (x, weight), atol=1e-7
        )


# ------------------------------------------------------------------------------- signs, a bit an element, for backward


@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_bits_are_the_signs_of_the_output(act, config):
    """At every cut, in the order of the output; and what is left of the last byte is 0."""
    kinds = set()
    for place in (p for p in each_cut(config) if np.prod(p.shape) < 1000):
        masked = maskable(place, 9) and act == "relu"
        p = problem_at(place, F32, act, residual=True, mask=9 if masked else 0)
        p.x[tuple(0 for _ in place.shape)] = float("nan")
        for evaluate in [False, True] if place.spec.running else [False]:
            found = cut(place, p.x, evaluate)
            buffers = buffers_of(p, place.spec.center) if evaluate else {}
            mean, var = buffers.get("running_mean"), buffers.get("running_var")
            call = Call(p.x, p.spec, p.weight, p.bias, mean, var, not evaluate, 0.1, p.eps, act, p.residual, p.mask)
            x = p.x.contiguous() if found.plan.copy else p.x
            residual = p.residual if p.residual.stride() == x.stride() else torch.empty_like(x).copy_(p.residual)
            y, _, _, bits = triton.forward(x, p.weight, p.bias, residual, call, found)
            assert torch.equal(triton._signs(found, bits), (y > 0).byte()), place
            t = found.values
            assert bits.numel() == (y.numel() // 8 if found.across else t.Q * -(-t.R // 8))
            kinds.add(found.across)
            assert sum((bits >> i & 1).sum() for i in range(8)) == (y > 0).sum(), place
    assert kinds == {True, False}


@pytest.mark.parametrize("place", QUICK, ids=str)
def test_gradients_from_signs(place, config):
    act = ("relu", "leaky_relu")[len(str(place)) % 2]
    masked = maskable(place, 9) and len(str(place)) % 3 == 0
    check(problem_at(place, F32, act, residual=True, mask=9 if masked else 0), place, F32, masked)


def test_signs_are_saved_and_the_output_is_not():
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in [(6, 4, 9, 9), (4,)])
    residual = torch.randn(6, 4, 9, 9, requires_grad=True)
    for act in (None, "relu", "leaky_relu", "silu"):
        saved = []
        record = torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t)
        with record, nw.use("triton"):
            y = nw.normalize(x, BN, weight, None, act=act, residual=residual)
        own = {"x": x, "weight": weight, "residual": residual, "y": y}
        names = {name for name, t in own.items() if any(s.data_ptr() == t.data_ptr() for s in saved)}
        assert names == {"x", "weight"} | ({"residual"} if act == "silu" else set())
        bits = [t for t in saved if t.dtype == torch.uint8]
        assert [t.numel() for t in bits] == ([4 * -(-6 * 81 // 8)] if act in ("relu", "leaky_relu") else [])
        truth = torch.autograd.grad(y, (x, residual), torch.ones_like(y), retain_graph=True)
        with torch.no_grad():  # what comes next may write over the output
            y.mul_(-1)
        again = torch.autograd.grad(y, (x, residual), torch.ones_like(y))
        assert all(torch.equal(a, b) for a, b in zip(truth, again, strict=True))


@pytest.mark.parametrize("evaluate", [False, True])
def test_second_order_from_signs(config, evaluate):
    for place in QUICK:
        act = ("relu", "leaky_relu")[len(str(place)) % 2]
        p = problem_at(place, F64, act, residual=True, mask=9 if maskable(place, 9) and len(str(place)) % 3 == 0 else 0)
        more = {"use_batch_stats": False, **buffers_of(p, p.spec.center)} if evaluate else {}
        if evaluate and (not p.spec.running or isinstance(cut(place, p.x, True), str)):
            continue
        leaves = p.leaves()
        found = []
        for kernel in ("triton", "native"):
            with nw.use(kernel):
                y = p.run(leaves, **more)
            grads = torch.autograd.grad(y, list(leaves.values()), p.dy, create_graph=True)
            total = sum(g.square().sum() for g in grads)
            found.append((*grads, *torch.autograd.grad(total, list(leaves.values()), allow_unused=True)))
        for a, b in zip(*found, strict=True):
            if a is None or b is None:  # nothing depends on it
                assert all(t is None or not t.any() for t in (a, b))
            else:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, place=place: f"{place}: {text}")


def test_results_are_the_same_from_run_to_run():
    x, residual = torch.randn(2, 6, 4, 9, 9)
    weight = torch.randn(4, requires_grad=True)
    for more in ({}, {"act": "relu", "residual": residual.requires_grad_()}):
        found = []
        for _ in range(2):
            with nw.use("triton"):
                y = nw.normalize(x.requires_grad_(), BN, weight, None, **more)
                wanted = (x, weight, *([residual] if more else []))
                found.append((y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y).cumsum(1))))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ----------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_is_eager(kind):
    make, shape = LAYERS[kind]
    for memory in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
        compare_compiled("aot_eager", make, [shape], memory, kernel="triton")


def test_compiled_with_residual_mask_and_changing_batches():
    make, (_, *rest) = LAYERS["batch"]
    compare_compiled("aot_eager", make, [(n, *rest) for n in (4, 7, 9)], residual=True, dynamic=True, kernel="triton")
    compare_compiled("aot_eager", make, [(4, *rest)], residual=True, mask=True, kernel="triton")
    other = lambda: nw.GroupNorm(2, 4, act="silu")  # noqa: E731
    compare_compiled("aot_eager", other, [(3, 4, 5, 2)], residual=True, kernel="triton", training=[True])


def test_compiled_graphs_hold_the_kernels_and_only_where_they_were_demanded():
    """The graph calls the operator with the backend's name, whose gradients are the eager ones bit by bit."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    sizes = [(6, 4, 5, 5), (4,), (6, 4, 5, 5)]
    x, weight, residual = (torch.randn(size, device=DEVICE, requires_grad=True) for size in sizes)
    run = lambda *t: nw.normalize(t[0], BN, t[1], None, act="relu", residual=t[2])  # noqa: E731
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    gradients = []
    with nw.use("triton"):
        for call in (run, compiled, compiled):
            y = call(x, weight, residual)
            gradients.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, residual))))
    assert all(torch.equal(a, b) for found in gradients[1:] for a, b in zip(found, gradients[0], strict=True))
    compiled(x, weight, residual)
    assert len(graphs) == 2
    assert "normwright.forward" in graphs[0]
    assert ", triton)" in graphs[0]
    assert "triton" not in graphs[1]


@pytest.mark.parametrize(
    ("row", "extra"), [("BatchNorm", {"residual": True, "act": "relu", "mask": 1}), ("LayerNorm", {"act": "gelu"})],
    ids=str,
)  # fmt: skip
def test_operators_keep_torchs_rules(row, extra):
    """Schema, fake tensors, autograd registration and tracing, by torch's own check."""
    spec = nw.CATALOG[row].spec
    p = Problem(spec, (6, 3), F32, **extra)
    leaves = p.leaves()
    words = (spec.pattern, spec.affine, True, spec.running, [], [], True, 1e-5, p.act, "triton")
    arguments = (leaves["dx"], leaves["dweight"], leaves["dbias"], None, None, leaves.get("dresidual"), p.mask, *words)
    torch.library.opcheck(torch.ops.normwright.forward.default, arguments)
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    _, statistics, bits = torch.ops.normwright.forward(*detached)
    assert statistics.numel() == 3 * (3 if row == "BatchNorm" else 6)
    assert bits.numel() == (3 if row == "BatchNorm" else 0)
    torch.library.opcheck(torch.ops.normwright.backward.default, (p.dy, bits, statistics, *detached))


# -------------------------------------------------------------------------------- CUDA graphs, streams, several devices


class EveryTensorOn(torch.overrides.TorchFunctionMode):
    """Whatever torch's functions return lies on this device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            assert not isinstance(t, torch.Tensor) or t.device == self.device, function
        return result


@pytest.fixture
def launches(monkeypatch):
    """Kernels that only note their names and where they ran, on a device that has no values to read or to copy."""
    names, entered = [], []

    @contextmanager
    def on(x):
        entered.append(x.device)
        yield
        entered.pop()

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(*arguments, **_):
                assert all(type(size) is int for size in grid)
                assert entered == [torch.device("meta")]
                assert {t.device.type for t in arguments if isinstance(t, torch.Tensor)} == {"meta"}
                names.append(self.name)

            return launch

    triton._kernels()
    from normwright.kernels.triton import kernels

    recorders = SimpleNamespace(**{name: Launch(name) for name in kernels.__all__})
    monkeypatch.setattr(triton, "_kernels", lambda: recorders)
    monkeypatch.setattr(triton, "_runs_on", lambda device: device.type == "meta")
    monkeypatch.setattr(triton, "_on", on)
    return names


@pytest.mark.parametrize("extra", [{}, {"residual": True, "act": "relu"}, {"residual": True, "act": "gelu"}], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nothing_waits_for_the_device_or_leaves_it(extra, masked, dtype, launches, config):
    """On the meta device a number read by the host, or a copy to it, raises: so may no step of a captured graph."""
    for place in [*QUICK, Place("rows", "LayerNorm", (3, 200))]:
        if not maskable(place, masked):
            continue
        p = problem_at(place, dtype, mask=9 if masked else 0, **extra)
        buffers = buffers_of(p, place.spec.center) if place.spec.running and not (masked and p.layout.merged) else {}
        for name in ("x", "weight", "bias", "residual", "mask", "dy"):
            t = getattr(p, name)
            setattr(p, name, None if t is None else t.to("meta"))
        buffers = {name: t.to("meta") for name, t in buffers.items()}
        with nw.use("triton"), EveryTensorOn(torch.device("meta")):
            for evaluate in [False, True] if buffers and isinstance(cut(place, p.x, True), triton.Cut) else [False]:
                leaves = p.leaves()
                y = p.run(leaves, use_batch_stats=not evaluate, **buffers)
                given = list(leaves.values())
                grads = torch.autograd.grad(y, given, p.dy, retain_graph=True)
                assert all(g.shape == t.shape and g.dtype == t.dtype for g, t in zip(grads, given, strict=True))
                first = torch.autograd.grad(y, leaves["dx"], p.dy, create_graph=True)[0]
                torch.autograd.grad(first.sum(), leaves["dweight"], allow_unused=True)
    assert {"forward", "backward_partials", "backward_apply", "backward_rows"} <= set(launches)
    assert config is not SMALL or {"partials", "apply", "backward_row_sums"} <= set(launches)


def test_a_layer_waits_for_nothing_either(launches):
    x = torch.empty(4, 6, 5, 5, device="meta", requires_grad=True)
    layers = [nw.BatchNorm2d(6, act="relu"), nw.GroupNorm(2, 6), nw.InstanceNorm2d(6, track_running_stats=True)]
    with nw.use("triton"), EveryTensorOn(torch.device("meta")):
        for layer in layers:
            for mode in (True, False):
                layer.to("meta").train(mode)(x, residual=x).sum().backward()
    # group norm takes its result from the nest of its parameters; two of the layers have running statistics
    assert (launches.count("forward"), launches.count("partials"), launches.count("apply")) == (2, 2, 4)
    assert x.grad is not None


@pytest.mark.parametrize("kernel", ["cpu", "triton"] if DEVICE == "cpu" else ["triton"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "residual", "mask"])
def test_tensors_on_two_devices_are_refused(kernel, name):
    x = torch.randn(5, 8, device=DEVICE)
    given = {
        "weight": torch.ones(8),
        "bias": torch.ones(8),
        "running_mean": torch.ones(8),
        "running_var": torch.ones(8),
    }
    given |= {"residual": torch.ones(5, 8), "mask": torch.ones(5, dtype=torch.bool)}
    given = {key: t.to("meta" if key == name else x.device) for key, t in given.items()}
    with nw.use(kernel), pytest.raises(RuntimeError, match=f"on {x.device}, and another of its tensors on meta"):
        nw.normalize(x, BN, **given)


@pytest.mark.parametrize(
    ("row", "shape", "layout", "form"),
    [
        ("BatchNorm", (4, 2**16, 2**16 + 3), "contiguous", "nest"),
        ("BatchNorm", (2**18, 2**14), "contiguous", "flat"),
        ("GroupNorm", (3, 4, 2**14, 2**15 - 1), "contiguous", "rows"),
    ],
)
def test_offsets_beyond_two_to_the_31(row, shape, layout, form):
    """The place of the last value of a tensor, by the kernels' own arithmetic."""
    import triton.language as tl

    triton._kernels()
    from normwright.kernels.triton import kernels

    @compiler.jit
    def last(
        out, o, k, A, K, B, R, magic: tl.uint32, shift,
        places: tl.constexpr, FORM: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        r = tl.full([1, 1], 0, tl.int32) + R - 1
        o = tl.zeros([1, 1], tl.int64) + o
        offsets, inside = places(o, k + r * 0, r, A, K, B, R, magic, shift, FORM, WIDE, 1)
        tl.store(out + tl.zeros([1, 1], tl.int32), tl.where(inside, offsets, -1))

    t = triton.cut(
        nw.CATALOG[row].make(**({"g": 2} if row == "GroupNorm" else {})), True, shape,
        torch.empty(shape, device="meta").stride(), F32, 2, triton.CONFIG,
    ).values  # fmt: skip
    assert t.form == form
    assert t.constants["WIDE"] or form == "rows"
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    last[(1,)](out, t.O - 1, t.K - 1, *t.sizes, kernels._places, t.form, t.constants["WIDE"])
    assert int(out) == np.prod(shape) - 1 >= 2**31


def test_division_by_multiplication():
    """r // B by magic and shift, against the quotient, where rounding tells: next to multiples of B, and up to 2³¹."""
    numbers = np.random.default_rng(0)
    sizes = [2, 3, 5, 7, 49, 196, 784, 3136, 2**16 - 1, 2**16 + 1, 2**30 + 1, 2**31 - 2]
    sizes += list(numbers.integers(2, 2**31, 200))
    for B in map(int, sizes):
        t = triton.Tiles(1, 2, 1, B, "nest", 1, 1, 8, False, 1, 8, 4)
        magic, shift = t.sizes[-2:]
        assert 2**31 <= magic < 2**32
        multiples = numbers.integers(0, 2**31 // B + 1, 50) * B
        r = np.concatenate([multiples - 1, multiples, multiples + B - 1, numbers.integers(0, 2**31, 50), [2**31 - 1]])
        r = r[(r >= 0) & (r < 2**31)].astype(object)
        assert ((r * magic >> 32) >> shift == r // B).all()


def test_counts_beyond_what_the_kernels_count_are_refused():
    def refusal(spec, shape):
        strides = torch.empty(shape, device="meta").stride()
        found = triton.cut(spec, True, shape, strides, F32, 2, triton.CONFIG)
        return found if isinstance(found, str) else None

    half = triton.LIMIT - 8
    assert refusal(BN, (4, 2, half // 4)) is None
    assert triton.LIMIT + 128 * (4 * triton.CONFIG.tile) <= 2**31  # the last share of the values hangs over by so much
    assert "2 statistics of 2147483648 values" in refusal(BN, (4, 2, 2**29))
    assert refusal(LN, (half, 8)) is None
    assert "2147483648 statistics of 8 values" in refusal(LN, (2**31, 8))
    group = nw.CATALOG["GroupNorm"].make
    assert refusal(group(g=2**16 - 1), (2, 2**17 - 2)) is None
    assert "65536 groups" in refusal(group(g=2**16), (2, 2**17))


def run_ahead(which, cache):
    script = Path(__file__).with_name("triton_ahead.py")
    run = subprocess.run(
        [sys.executable, script, which],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


needs_assembler = pytest.mark.skipif(
    not (Path(compiler.__file__).parent / "backends/nvidia/bin/ptxas").exists(),
    reason="Triton came without NVIDIA's assembler",
)


@needs_assembler
@pytest.mark.parametrize("which", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_the_kernels_compile_for_a_gpu(which, tmp_path):
    assert int(run_ahead(which, tmp_path).split()[0]) > 10


@needs_assembler
@pytest.mark.slow
def test_the_machine_code_can_keep_up_with_the_memory(tmp_path):
    """In the time that its memory takes for 32 bytes (4.8 TB/s) an H200 issues 7.0 instructions (at 1.98 GHz).

    Images of 7×7 have no two neighbours that always lie together, and need more.
    """
    lines = [json.loads(line) for line in run_ahead("count", tmp_path).splitlines()]
    assert {line["kernel"] for line in lines} >= {
        "forward", "partials", "apply", "backward", "backward_partials", "backward_apply", "backward_rows"
    }  # fmt: skip
    for line in lines:
        side, first = line["shape"][2:3], not line["nhwc"]
        assert line["spilled"] <= 8, line
        assert line["registers"] <= 128, line  # two programs of 256 threads, or four of 128
        assert line["issue"] < (12.5 if side == [7] else 6.0), line
        if not (side == [7] and first):
            assert line["widest"] == min(16, (4 if side == [14] and first else 8) * line["bytes"])


def test_reading_machine_code():
    """A disassembly by hand: a loop of 6 instructions that reads 16 bytes and writes 8, within another."""
    from normwright.kernels.triton import ahead

    code = ahead._read(
        """
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   FADD R8, R8, R9 ;
        /*0040*/                   LDL R5, [R1] ;
        /*0050*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*0060*/                   ISETP.GE.AND P0, PT, R3, 0x4, PT ;
        /*0070*/              @!P0 BRA 0x20 ;
        /*0080*/                   FADD R8, R8, R9 ;
        /*0090*/               @P1 BRA 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
        /*00c0*/                   NOP;
        """,
        40,
    )
    assert (code.registers, code.spilled, code.instructions, code.widest) == (40, 1, 11, 16)
    assert code.moved == {"LDG": 18, "STG": 8}
    (loop,) = code.loops
    assert (loop.instructions, loop.moved, loop.widest) == (6, {"LDG": 16, "STG": 8}, 16)


def test_instructions_a_value_by_hand():
    """A tile of 128 values in 32 threads, 4 tiles a program; the loop, unrolled twice, writes 8 values a thread."""
    from normwright.kernels.triton import ahead

    x = torch.empty(2, 1, 500, device="meta")
    given = {"x": x, "y": x, "chunk": 512, "R": 1000}
    launch = ahead.Launch("apply", (2, 1), (), {"BK": 1, "BR": 128, **given}, 1)
    launch.__dict__["_given"] = given | launch.keywords
    loop = ahead.Loop(80, {"LDG": 32, "STG": 33}, 16)  # a byte of bits is among it
    code = ahead.Code(40, 0, 180, (ahead.Loop(7, {"LDG": 4}, 4), loop), {}, 16)
    assert launch.rounds(loop) == 2
    assert launch.bytes_a_value == 8
    # 100 outside of the loop, 40 for each of 4 tiles, in 2 programs of 32 threads, of 1000 values
    assert launch.per_value(code) == pytest.approx((100 + 160) * 64 / 1000)


def test_where_the_kernels_do_not_run_is_a_sentence():
    x = torch.randn(4, 3, 5, device=DEVICE)
    layer = nw.BatchNorm1d(3).to(DEVICE)
    choice = nw.explain(layer, x).choices[0]
    assert choice.kernel != "triton"
    if DEVICE == "cuda":
        assert "no call like this was timed on this GPU" in choice.refused["triton"]
    else:  # where there is no GPU they are no news
        assert "triton" not in choice.refused
    with nw.use("triton"):
        assert nw.explain(layer, x).kernel == "triton"
        with pytest.raises(RuntimeError, match=r"'triton' was demanded .*there is no kernel for torch.float8"):
            nw.normalize(x.to(torch.float8_e4m3fn), LN, None, None)
        with pytest.raises(RuntimeError, match="the input is empty"):
            nw.normalize(x[:0], BN, None, None)


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETING", False)
    with nw.use("triton"), pytest.raises(RuntimeError, match="only TRITON_INTERPRET=1 runs these kernels"):
        nw.normalize(torch.randn(4, 3), LN, None, None)
    monkeypatch.setattr(triton, "UNAVAILABLE", "triton is not installed")
    with nw.use("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        nw.normalize(torch.randn(4, 3), LN, None, None)
