"""The CPU kernels, demanded by name, against the NumPy reference in float64: one table of places, one of variants.

A *place* is a spec on a shape and memory layout: it decides the family of kernels and how the work is cut. A *variant*
(family, type, activation, residual, mask) is a pair of compiled kernels, forward and backward, of about a second each;
there are some three hundred. Every variant of a covering design runs on every place of its family: in the quick tests
any two choices meet in some variant, in the slow ones any three do.
"""

from __future__ import annotations

import itertools
import shutil
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from test_functional import Problem
from tolerances import assert_close

import normwright as nw
from normwright import reference
from normwright.catalog import CATALOG
from normwright.functional import ACTIVATIONS
from normwright.kernels import cpu
from normwright.kernels.cpu import build

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(build.UNAVAILABLE is not None, reason=str(build.UNAVAILABLE))

# --------------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Place:
    """A spec on a shape and layout; the family that must run it, and the threads (work is shared out with 2)."""

    family: str
    row: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    sizes: dict[str, int] = field(default_factory=dict)
    threads: int = 1

    @property
    def spec(self) -> nw.NormSpec:
        return CATALOG[self.row].make(**self.sizes) if self.row in CATALOG else PATTERNS[self.row]

    def __str__(self) -> str:
        threads = "-threads" if self.threads > 1 else ""
        return f"{self.row}-{'x'.join(map(str, self.shape))}-{self.layout}{threads}"


# what no named layer has
PATTERNS = {
    "LastTwo": nw.NormSpec("b... [d0 d1]", "d0 d1"),
    "Whole": nw.NormSpec("[a b]"),
    "NoParameters": nw.NormSpec("[b] c [s...]", running="c"),
    "ParametersShared": nw.NormSpec("[b] (k c) [s...]", "c", sizes={"k": 2}),
    "ParametersOfSome": nw.NormSpec("b (k c) [s...]", "c", sizes={"k": 2}),
    "Uncentred": nw.NormSpec("[b] c [s...]", "c", center=False, running="c"),
}

BN, LN = CATALOG["BatchNorm"].spec, CATALOG["LayerNorm"].spec

# SERIAL is lowered in these tests: 1000 elements are shared out
PLACES = [
    # one parameter for a long stretch
    Place("segments", "BatchNorm", (3, 4, 150)),
    Place("segments", "BatchNorm", (2, 2, 65, 70)),  # 4550 contiguous: more than a block
    Place("segments", "BatchNorm", (2, 3, 11, 13), threads=2),
    Place("segments", "BatchNorm", (200, 3), "reversed"),
    Place("segments", "BatchNorm", (4, 3, 9, 20), "sliced"),
    Place("segments", "BatchNorm", (1, 1)),
    Place("segments", "Uncentred", (3, 4, 150)),
    Place("segments", "NoParameters", (3, 4, 150)),
    Place("segments", "GhostBatchNorm", (6, 4, 12, 12), sizes={"n": 3}),
    Place("segments", "PackedBatchNorm", (4, 6, 11, 12), sizes={"k": 3}),
    Place("segments", "InstanceNorm", (3, 4, 5, 2)),
    Place("segments", "InstanceNorm", (2, 3, 71, 59), threads=2),  # 4189 contiguous
    Place("segments", "InstanceNorm", (1, 1, 2)),
    Place("segments", "FilterResponseNorm", (3, 4, 17)),
    Place("segments", "GroupNorm", (3, 4, 5, 2), sizes={"g": 2}),
    Place("segments", "GroupNorm", (2, 6, 47, 50), sizes={"g": 2}, threads=2),  # three segments a stretch
    Place("segments", "GroupNorm", (1, 3, 65, 70), sizes={"g": 1}),  # segments of more than a block
    Place("segments", "Whole", (5, 7)),
    Place("segments", "ParametersShared", (4, 6, 150)),
    Place("segments", "ParametersOfSome", (4, 6, 15)),
    # rows with a parameter for every element
    Place("rows", "LayerNorm", (5, 8)),
    Place("rows", "LayerNorm", (3, 2)),
    Place("rows", "LayerNorm", (2, 3, 7)),
    Place("rows", "LayerNorm", (131, 35), threads=2),  # more rows than are summed in float32
    Place("rows", "LayerNorm", (2, 4200)),  # more than a block
    Place("rows", "LayerNorm", (4, 9), "sliced"),
    Place("rows", "LastTwo", (4, 3, 5)),
    Place("rows", "RMSNorm", (5, 8)),
    Place("rows", "RMSNorm", (70, 31), threads=2),
    Place("rows", "ChannelNorm", (2, 6, 3, 2), "channels_last"),
    Place("rows", "GroupNorm", (3, 4), sizes={"g": 2}),
    Place("rows", "GroupNorm", (70, 6), sizes={"g": 3}),
    # columns
    Place("columns", "BatchNorm", (2, 2)),
    Place("columns", "BatchNorm", (6, 3)),  # six rows taken as one
    Place("columns", "BatchNorm", (7, 33)),
    Place("columns", "BatchNorm", (131, 33), threads=2),  # a prime number of rows: chunks of 65 and 66
    Place("columns", "BatchNorm", (199, 515), threads=2),  # more rows than a tile, in two chunks
    Place("columns", "BatchNorm", (9, 2100), threads=2),  # more columns than a block
    Place("columns", "BatchNorm", (3, 230, 3, 3)),  # nine columns a statistic, blocks of 504
    Place("columns", "BatchNorm", (4, 3, 64, 33), "channels_last", threads=2),  # R > 1 in two chunks
    Place("columns", "BatchNorm", (2, 5, 3, 4), "channels_last"),
    Place("columns", "BatchNorm", (2, 3, 2, 3, 2), "channels_last"),
    Place("columns", "BatchNorm", (4, 3, 5, 2)),
    Place("columns", "BatchNorm", (4, 3, 5, 2), "reversed"),
    Place("columns", "BatchNorm", (1, 1, 64, 128), threads=2),  # one statistic, cut for two threads
    Place("columns", "Uncentred", (9, 5)),
    Place("columns", "Uncentred", (331, 5), threads=2),
    Place("columns", "NoParameters", (6, 3)),
    Place("columns", "GhostBatchNorm", (6, 3), sizes={"n": 2}),
    Place("columns", "GhostBatchNorm", (6, 4, 5, 2), "channels_last", {"n": 3}),
    Place("columns", "PackedBatchNorm", (4, 6, 3, 2), "channels_last", {"k": 3}),
    Place("columns", "InstanceNorm", (3, 4, 5, 2), "channels_last"),
    Place("columns", "InstanceNorm", (1, 12, 17, 9), "channels_last", threads=2),  # chunks of one sample
    Place("columns", "FilterResponseNorm", (2, 4, 5, 2, 3), "channels_last"),
    Place("columns", "GroupNorm", (3, 4, 5, 2), "channels_last", {"g": 2}),
    Place("columns", "GroupNorm", (1, 48, 9, 9), "channels_last", {"g": 4}, threads=2),
    Place("columns", "GroupNorm", (3, 6, 5, 4), "height_first", {"g": 2}),  # three parameters of four columns each
    Place("columns", "ChannelNorm", (2, 6, 3, 2)),  # the parameter is the row
    Place("columns", "ChannelNorm", (2, 40, 30, 20), threads=2),  # … in two blocks
    Place("columns", "LayerNorm", (2, 3, 8), "reversed"),
    Place("columns", "ParametersShared", (4, 6, 5)),
]
FAMILIES = ("segments", "rows", "columns")


def lay(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "contiguous":
        return t
    if layout == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]
    order = {
        "reversed": range(t.dim())[::-1],
        "channels_last": (0, *range(2, t.dim()), 1),
        "height_first": (2, 0, 1, 3),
    }[layout]
    return t.permute(tuple(order)).contiguous().permute(np.argsort(order).tolist())


@pytest.fixture(autouse=True)
def _small_tensors_are_shared_out(monkeypatch):
    monkeypatch.setattr(cpu, "SERIAL", 1000)
    cpu.recipe.cache_clear()
    yield
    cpu.recipe.cache_clear()


def recipe(place: Place, x: torch.Tensor, evaluate: bool = False) -> cpu.Recipe | str:
    return cpu.recipe(place.spec, not evaluate, x.shape, x.stride(), x.dtype, place.threads)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_place_is_in_its_family(place):
    found = recipe(place, lay(torch.empty(place.shape), place.layout))
    assert isinstance(found, cpu.Recipe), found
    assert found.family == place.family
    assert found.plan.copy == (place.layout == "sliced")


def test_the_places_reach_every_cut_of_the_work():
    found = [recipe(place, lay(torch.empty(place.shape), place.layout)) for place in PLACES]
    columns = [f for f in found if f.family == "columns"]
    assert len({(f.R > 1, f.chunks > 1) for f in columns}) == 4
    blocks = [(f.columns < f.R * f.plan.K * f.plan.B, f.plan.by_a) for f in columns]
    assert {(True, False), (True, True), (False, True)} <= set(blocks)
    assert any(f.plan.P > 1 and f.plan.S > 1 for f in columns)
    assert any(f.plan.P > 1 and f.plan.S == 1 for f in columns)
    assert any(f.plan.O > 1 and not f.plan.by_a for f in columns)
    assert any(f.workers > 1 and f.chunks == 1 for f in columns)
    for family in FAMILIES:
        assert any(f.parallel for f in found if f.family == family)
    assert any(f.plan.G > 1 for f in found if f.family == "rows")
    assert any(f.plan.P > 1 for f in found if f.family == "segments")


# ------------------------------------------------------------------------------------------------------------- variants

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
F32, F64, BF16, F16 = DTYPES
Variant = tuple[str, torch.dtype, "str | None", bool, bool]  # family, type, activation, residual, mask
# those that the tests of something else run on
USED = [
    *[(family, F32, None, False, mask) for family in FAMILIES for mask in (False, True)],
    ("segments", F64, "sigmoid", True, True),
    ("rows", F64, "tanh", True, False),
    ("columns", F64, "silu", True, True),
    ("columns", F32, "relu", True, False),
]


def covering(strength: int, start: list[Variant]) -> list[Variant]:
    """`start`, and greedily the fewest variants after it until any `strength` choices have met."""
    every = list(itertools.product(FAMILIES, DTYPES, (None, *ACTIVATIONS), (False, True), (False, True)))

    def meetings(variant: Variant) -> set:
        return set(itertools.combinations(enumerate(variant), strength))

    chosen = list(start)
    left = set().union(*map(meetings, every)).difference(*map(meetings, chosen))
    while left:
        best = max(every, key=lambda variant: len(meetings(variant) & left))
        chosen.append(best)
        left -= meetings(best)
    return chosen


PAIRS = covering(2, USED)
TRIPLES = covering(3, PAIRS)[len(PAIRS) :]


def test_the_design_covers_what_it_says():
    assert len(PAIRS) < 45  # at a second or two each
    for i, j in itertools.combinations(range(5), 2):
        assert len({(v[i], v[j]) for v in PAIRS}) == len({v[i] for v in PAIRS}) * len({v[j] for v in PAIRS})
    assert len({v[:3] for v in PAIRS + TRIPLES}) == 3 * 4 * 7
    assert len(set(PAIRS + TRIPLES)) == len(PAIRS + TRIPLES)


def name_of(variant: Variant) -> str:
    family, dtype, act, residual, mask = variant
    return f"{family}-{str(dtype)[6:]}-{act}{'-residual' * residual}{'-mask' * mask}"


def problem_at(place: Place, dtype, act=None, residual=False, mask=0, **more) -> Problem:
    """The problem of `test_functional` with its tensors in the place's layout."""
    torch.set_num_threads(place.threads)
    param = torch.float64 if dtype == torch.float64 else torch.float32
    p = Problem(place.spec, place.shape, dtype, param=param, act=act, residual=residual, mask=mask, **more)
    p.x = lay(p.x, place.layout)
    p.dy = lay(p.dy, place.layout if place.threads == 1 else "contiguous")  # a gradient of other strides is copied
    return p


def buffers_of(p: Problem, center: bool) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    size, dtype = p.layout.running_shape, p.weight.dtype
    found = {"running_var": (torch.rand(size, generator=g, dtype=torch.float64) + 0.5).to(dtype)}
    if center:
        found["running_mean"] = torch.randn(size, generator=g, dtype=torch.float64).to(dtype)
    return found


def check(p: Problem, place: Place, dtype, masked: bool) -> None:
    """Output, all gradients, running statistics; and evaluation with running statistics."""
    spec = place.spec
    merged_masked = masked and p.layout.merged  # has no kernel, and a test of its own
    with nw.use("cpu"):
        if not spec.running or merged_masked:
            p.check(dtype)
            return
        buffers = buffers_of(p, spec.center)
        old = {name: value.clone() for name, value in buffers.items()}
        p.check(dtype, new_weight=0.3, **buffers)
        _, cache = p.reference(new_weight=0.3, **{name: p.numpy(value) for name, value in old.items()})
        for name, value in buffers.items():
            condition = max(1.0, np.abs(cache.mean * cache.r).max(initial=0.0)) if name == "running_mean" else 1.0
            truth = getattr(cache, name)
            assert_close(value, truth, p.layout.count, condition=condition, scale=0.7, what=name)
            assert not torch.equal(value, old[name])
        found = recipe(place, p.x, evaluate=True)
        if isinstance(found, cpu.Recipe):
            moved = {name: value.clone() for name, value in buffers.items()}
            p.check(dtype, use_batch_stats=False, **moved)
            assert all(torch.equal(moved[name], buffers[name]) for name in moved)


@pytest.mark.parametrize(
    "variant",
    [*(pytest.param(v, id=name_of(v)) for v in PAIRS),
     *(pytest.param(v, id=name_of(v), marks=pytest.mark.slow) for v in TRIPLES)],
)  # fmt: skip
def test_variants(variant):
    family, dtype, act, residual, masked = variant
    for place in PLACES:
        if place.family != family:
            continue
        dims = len(place.spec.layout(place.shape).position_dims)
        masks = [0] if not masked else [1] if dims == 1 else [1, 9]
        for mask in masks if dims else [0]:
            try:
                check(problem_at(place, dtype, act, residual, mask), place, dtype, bool(mask))
            except AssertionError as error:
                raise AssertionError(f"{place}, mask {mask}: {error}") from error


@pytest.mark.parametrize("variant", USED, ids=name_of)
def test_results_written_past_the_cache(variant, monkeypatch):
    """As large results are: every place again, in pieces, with its odd beginnings and ends."""
    monkeypatch.setattr(cpu, "STREAM", 0)
    cpu.recipe.cache_clear()
    family, dtype, act, residual, masked = variant
    for place in PLACES:
        if place.family == family and maskable(place, masked):
            p = problem_at(place, dtype, act, residual, 9 if masked else 0)
            found = recipe(place, p.x)
            assert isinstance(found, cpu.Recipe)
            assert found.stream
            check(p, place, dtype, masked)


# --------------------------------------------------------------------------------------------------------- hard numbers

each_place = pytest.mark.parametrize("place", PLACES, ids=str)
with_and_without_mask = pytest.mark.parametrize("mask", [0, 9], ids=["", "mask"])


def statistic_of(p: Problem) -> torch.Tensor:
    """The number of the statistic that each element belongs to, by plain indexing."""
    layout = p.layout
    numbers = torch.arange(int(np.prod(layout.stat_shape))).reshape(layout.stat_shape)
    return numbers.expand(layout.split).reshape(layout.shape)


def maskable(place: Place, mask: int) -> bool:
    return not mask or bool(place.spec.layout(place.shape).position_dims)


@with_and_without_mask
@each_place
def test_large_mean(place, mask):
    """At mean 3000 and deviation 1 a variance in one pass of float32 is off by a factor of three."""
    if maskable(place, mask):
        p = problem_at(place, F32, mask=mask, mean=3000.0, deviation=1.0)
        check(p, place, F32, bool(mask))


@each_place
def test_a_large_mean_costs_no_precision(place):
    """What a mean of 3000 loses by rounding to float32 is put back: the tolerance without a condition holds."""
    p = problem_at(place, F32, mean=3000.0, deviation=1.0)
    leaves = p.leaves()
    with nw.use("cpu"):
        y = p.run(leaves)
        grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))
    truth, cache = p.reference()
    truths = reference.backward(p.numpy(p.dy), cache)
    assert_close(y, truth, p.layout.count, scale=1.0, what="y")
    rstd = float(cache.r.max())
    assert_close(grads["dx"], truths["dx"], p.layout.count, scale=4.0 * rstd, what="dx")
    shared = max(1, p.x.numel() // max(1, p.weight.numel()))
    assert_close(grads["dweight"], truths["dweight"], shared, scale=shared**0.5, what="dweight")


@with_and_without_mask
@each_place
def test_the_first_value_is_an_outlier(place, mask):
    """Sums are taken about the first value; where it lies far from all others they must be taken again."""
    if not maskable(place, mask):
        return
    p = problem_at(place, F32, mask=mask, mean=3000.0, deviation=1.0)
    order = recipe(place, p.x).plan.order
    flat = statistic_of(p).permute(order).reshape(-1)
    _, first = np.unique(flat.numpy(), return_index=True)
    values = p.x.permute(order).reshape(-1).clone()
    values[torch.as_tensor(first)] = 0.0
    p.x.copy_(values.reshape([place.shape[d] for d in order]).permute(np.argsort(order).tolist()))
    if mask:  # the outlier is valid, whatever was drawn
        p.mask[:] = True
        p.mask.view(-1)[-1] = p.mask.numel() == 1
    check(p, place, F32, bool(mask))
    # the variance itself, to the precision that sums about the mean have
    spec, layout = place.spec, p.layout
    if spec.running and spec.center and not layout.merged:
        var = torch.ones(layout.running_shape)
        with nw.use("cpu"):
            nw.normalize(p.x, spec, running_var=var, new_weight=1.0, mask=p.mask)
        _, cache = p.reference(running_var=np.ones(layout.running_shape), new_weight=1.0)
        assert np.allclose(var.numpy(), cache.running_var, rtol=4e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 2, 3 * 4096), "contiguous"), ((400, 300), "contiguous"), ((300, 5, 8, 6), "channels_last")],
)
def test_the_mean_moves_from_block_to_block(shape, layout):
    """0 in the first third, 3000 ± 1 in the others."""
    p = Problem(BN, shape, F32, mean=3000.0, deviation=1.0)
    early = p.x[..., :4096] if shape[0] == 1 else p.x[: shape[0] // 3]
    early.normal_(std=1e-3)
    p.x = lay(p.x, layout)
    var = torch.ones(shape[1])
    with nw.use("cpu"):
        p.check()
        nw.normalize(p.x, p.spec, running_var=var, new_weight=1.0)
    assert_close(var, p.x.double().movedim(1, 0).reshape(shape[1], -1).var(1), p.layout.count)


@with_and_without_mask
@pytest.mark.parametrize("deviation", [1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("mean", [0.0, 7.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_variance(family, mean, deviation, mask):
    """Below the square root of eps, eps decides; a constant input gives the bias, and no value that is not finite."""
    for place in PLACES:
        if place.family == family and maskable(place, mask):
            p = problem_at(place, F32, mask=mask, mean=mean, deviation=deviation)
            if deviation == 0.0:
                p.x.fill_(mean)
            check(p, place, F32, bool(mask))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_place
def test_one_bad_value_spoils_its_own_statistic_only(place, bad):
    p = problem_at(place, F32, mean=1.0)
    statistic = statistic_of(p)

    def run():
        leaves, buffers = p.leaves(), {}
        if place.spec.running and not p.layout.merged:
            buffers = buffers_of(p, place.spec.center)
        with nw.use("cpu"):
            y = p.run(leaves, **buffers)
            (dx,) = torch.autograd.grad(y, leaves["dx"], p.dy)
        return y.detach(), dx, buffers

    clean_y, clean_dx, clean_buffers = run()
    at = tuple(size // 2 for size in place.shape)
    p.x[at] = bad
    y, dx, buffers = run()
    spoiled = statistic == statistic[at]
    if place.spec.center:
        assert y[spoiled].isnan().all()
    else:  # x / sqrt(mean(x²)): the bad value is NaN, the others are 0 or NaN
        assert y[at].isnan()
    assert dx[spoiled].isnan().all() or not place.spec.center
    assert torch.equal(y[~spoiled], clean_y[~spoiled])
    assert torch.equal(dx[~spoiled], clean_dx[~spoiled])
    for name, value in buffers.items():
        good = torch.ones(value.shape, dtype=torch.bool)
        good[statistic[at] % value.numel()] = False
        assert torch.equal(value[good], clean_buffers[name][good])
        assert not torch.isfinite(value[~good]).any()
        if place.spec.center and name == "running_var":
            assert value[~good].isnan().all()


@pytest.mark.parametrize("variant", [v for v in USED if v[4]], ids=name_of)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_is_never_read(variant, poison):
    family, dtype, act, residual, _ = variant
    for place in PLACES:
        if place.family != family or not maskable(place, 9):
            continue

        def run(value, place=place):
            p = problem_at(place, dtype, act, residual, 9)
            view = p.layout.mask_view(tuple(p.mask.shape))
            padding = ~p.mask.reshape(view).expand(p.layout.split).reshape(place.shape)
            for t in (p.x, p.residual, p.dy):
                if t is not None:
                    t[padding] = value
            buffers = {}
            if place.spec.running and not p.layout.merged:
                buffers = buffers_of(p, place.spec.center)
            leaves = p.leaves()
            with nw.use("cpu"):
                y = p.run(leaves, **buffers)
                grads = torch.autograd.grad(y, list(leaves.values()), p.dy)
            assert not y[padding].any()
            assert not grads[0][padding].any()
            return [y, *grads, *buffers.values()]

        for clean, dirty in zip(run(0.0), run(poison), strict=True):
            assert torch.equal(clean, dirty), str(place)


@pytest.mark.parametrize("variant", [v for v in USED if v[4]], ids=name_of)
def test_everything_masked(variant):
    """A statistic of padding alone: output and gradients are 0, running statistics stay."""
    family, dtype, act, residual, _ = variant
    for place in PLACES:
        if place.family != family or not maskable(place, 1):
            continue
        p = problem_at(place, dtype, act, residual, 1)
        p.mask[:] = False
        buffers = {}
        if place.spec.running and not p.layout.merged:
            buffers = buffers_of(p, place.spec.center)
        old = {name: value.clone() for name, value in buffers.items()}
        leaves = p.leaves()
        with nw.use("cpu"):
            y = p.run(leaves, **buffers)
            grads = torch.autograd.grad(y, list(leaves.values()), p.dy)
        assert not y.any()
        assert not any(grad.any() for grad in grads)
        assert all(torch.equal(buffers[name], old[name]) for name in old)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_statistics_of_half_types_are_float32(dtype):
    """Squares of 1000 overflow float16, and a sum of ones in bfloat16 stops growing after 256 terms."""
    for row, shape in (("BatchNorm", (4, 3, 700)), ("LayerNorm", (3, 1500)), ("BatchNorm", (1500, 4))):
        p = Problem(CATALOG[row].spec, shape, dtype, mean=0.0, deviation=1000.0, param=F32, act="relu")
        with nw.use("cpu"):
            p.check(dtype)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_types_are_rounded_once_to_nearest(dtype):
    """The result in float32, then rounded as torch rounds; a tolerance would not tell it from truncation."""
    p = Problem(LN, (64, 48), dtype, param=F32)
    with nw.use("cpu"):
        y = nw.normalize(p.x, LN, p.weight, p.bias)
        wide = nw.normalize(p.x.float(), LN, p.weight, p.bias)
    # loads are compiled differently, and a last bit of float32 may turn a tie
    assert (y == wide.to(dtype)).float().mean() > 0.999
    assert nw.normalize(torch.full((64, 48), float("nan"), dtype=dtype), LN).isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_parameters_of_half_types(dtype):
    for row, shape in (("BatchNorm", (4, 3, 150)), ("LayerNorm", (3, 15)), ("BatchNorm", (15, 4))):
        p = Problem(CATALOG[row].spec, shape, dtype, act="relu")
        with nw.use("cpu"):
            p.check(dtype)


def test_running_statistics_of_half_types_are_rounded_once():
    p = Problem(CATALOG["BatchNorm"].spec, (15, 4), F32)
    buffers = {"running_mean": torch.zeros(4, dtype=BF16), "running_var": torch.ones(4, dtype=BF16)}
    with nw.use("cpu"):
        nw.normalize(p.x, p.spec, **buffers)
    x = p.x.double()
    assert_close(buffers["running_mean"], 0.1 * x.mean(0), 15)
    assert_close(buffers["running_var"], 0.9 + 0.1 * x.var(0), 15)


# -------------------------------------------------------------------------------------- what has no kernel, and says so


@pytest.mark.parametrize(
    ("spec", "shape", "layout"),
    [
        (nw.NormSpec("a [b] c [d]", "c", running="a c"), (3, 4, 2, 200), "contiguous"),
        (nw.NormSpec("a [b] c [d]", "c", running="a c"), (3, 4, 2, 5), "contiguous"),
        (nw.NormSpec("a c [d]", running="a c"), (3, 4, 20), "cab"),
        (nw.NormSpec("[d] a c", running="a c"), (20, 3, 4), "reversed"),
    ],
)
@pytest.mark.parametrize("evaluate", [False, True])
def test_running_statistics_apart_or_out_of_order(spec, shape, layout, evaluate):
    """Running statistic k is not statistic k of the batch: native runs it, and is right."""
    p = Problem(spec, shape)
    p.x = p.x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "cab" else lay(p.x, layout)
    buffers = buffers_of(p, True)
    old = {name: value.clone() for name, value in buffers.items()}
    with nw.use("cpu"), pytest.raises(RuntimeError, match="axes lie apart or in another order in memory"):
        p.run(p.leaves(), use_batch_stats=not evaluate, **buffers)
    p.check(use_batch_stats=not evaluate, **buffers)
    _, cache = p.reference(use_batch_stats=not evaluate, **{name: value.numpy() for name, value in old.items()})
    for name, value in buffers.items():
        assert_close(value, getattr(cache, name), p.layout.count)
    with nw.use("cpu"):  # without running statistics the nest is as good as any
        p.check()


def merges(place: Place) -> bool:
    layout = place.spec.layout(place.shape)
    return bool(place.spec.running) and any(layout.split[i] > 1 for i in layout.merged)


@pytest.mark.parametrize("place", [place for place in PLACES if merges(place)], ids=str)
def test_merged_running_statistics_with_a_mask_are_native(place):
    p = problem_at(place, F32, mask=1)
    with nw.use("cpu"), pytest.raises(RuntimeError, match="averaged over samples, with a mask, have no kernel"):
        p.run(p.leaves(), **buffers_of(p, True))


def test_a_parameter_of_another_size_is_refused_before_any_kernel_runs():
    x = torch.randn(60, 5)
    for name in ("weight", "bias", "running_mean", "running_var"):
        more = {"running_mean": torch.zeros(5), "running_var": torch.ones(5), name: torch.ones(4)}
        with nw.use("cpu"), pytest.raises(RuntimeError, match=f"{name} should contain 5 elements.*it has 4"):
            nw.normalize(x, CATALOG["BatchNorm"].spec, **more)


# ------------------------------------------------------------------------------------------------------------- autograd

ONE_OF_EACH = [
    Place("segments", "BatchNorm", (3, 2, 130)),
    Place("rows", "LayerNorm", (5, 8)),
    Place("columns", "BatchNorm", (6, 3)),
    Place("columns", "ChannelNorm", (2, 3, 2, 2)),
]
GRADIENT = {v[0]: v for v in USED if v[1] == F64}


@pytest.fixture
def demanded():
    with nw.use("cpu"):
        yield


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("place", ONE_OF_EACH, ids=str)
@pytest.mark.usefixtures("demanded")
def test_first_and_second_order(place, evaluate):
    if evaluate and not place.spec.running:
        return
    _, dtype, act, residual, mask = GRADIENT[place.family]
    p = problem_at(place, dtype, act, residual, 9 if mask else 0)
    more = {"use_batch_stats": False, **buffers_of(p, True)} if evaluate else {}
    leaves = p.leaves()

    def run(*tensors):
        return p.run(dict(zip(leaves, tensors, strict=True)), **more)

    tensors = tuple(leaves.values())
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)
    # differentiating the gradient again starts from the same gradient
    plain = torch.autograd.grad(run(*tensors), tensors, p.dy)
    again = torch.autograd.grad(run(*tensors), tensors, p.dy, create_graph=True)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
@pytest.mark.usefixtures("demanded")
def test_second_order_where_the_slope_is_read_from_the_output(act):
    p = Problem(BN, (6, 3), act=act, residual=True)
    leaves = p.leaves()
    p.bias += 0.0
    tensors = tuple(leaves.values())
    y = p.run(leaves)
    grads = torch.autograd.grad(y, tensors, p.dy, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors, allow_unused=True)
    with nw.use("native"):
        truth = torch.autograd.grad(p.run(leaves), tensors, p.dy, create_graph=True)
        truth2 = torch.autograd.grad(sum(g.square().sum() for g in truth), tensors, allow_unused=True)
    for a, b in zip((*grads, *second), (*truth, *truth2), strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any())
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("place", ONE_OF_EACH, ids=str)
@pytest.mark.usefixtures("demanded")
def test_expanded_and_strided_gradients(place):
    p = problem_at(place, F32)
    for dy in (
        torch.ones(()).expand(place.shape),
        torch.randn(place.shape[::-1]).permute(*range(len(place.shape))[::-1]),
        torch.randn(*place.shape, 2)[..., 1],
        torch.randn(place.shape[0], *[1] * (len(place.shape) - 1)).expand(place.shape),
    ):
        p.dy = dy
        p.check()
    leaves = p.leaves()
    p.run(leaves).sum().backward()
    truths = reference.backward(np.ones(place.shape), p.reference()[1])
    assert_close(leaves["dweight"].grad, truths["dweight"], p.x.numel(), scale=p.x.numel() ** 0.5)
    assert_close(leaves["dx"].grad, truths["dx"], p.x.numel(), scale=1.0)


@pytest.mark.parametrize("extra", [{}, {"residual": True, "act": "relu"}], ids=str)
@pytest.mark.parametrize("three", [False, True], ids=["2d", "3d"])
@pytest.mark.parametrize(
    "row", [r for r in CATALOG.values() if r.spec and "s..." in r.spec.pattern], ids=lambda r: r.name
)
@pytest.mark.usefixtures("demanded")
def test_channels_last_stays_output_and_gradients(row, three, extra):
    shape, format = ((6, 12, 2, 3, 2), torch.channels_last_3d) if three else ((6, 12, 4, 3), torch.channels_last)
    p = Problem(row.make(**row.examples[-1][1]), shape, F32, **extra)
    p.x, p.residual = lay(p.x, "channels_last"), p.residual
    y, grads = p.check()
    for t in (y, grads["dx"], grads.get("dresidual", y)):
        assert t.is_contiguous(memory_format=format)


@pytest.mark.parametrize("extra", [{}, {"residual": True, "act": "relu"}], ids=str)
@pytest.mark.parametrize("place", ONE_OF_EACH, ids=str)
@pytest.mark.usefixtures("demanded")
def test_every_subset_of_gradients(place, extra):
    p = problem_at(place, F32, **extra)
    _, everything = p.check()
    names = list(everything)
    for wanted in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1)):
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in p.leaves().items()}
        grads = torch.autograd.grad(p.run(leaves), [leaves[name] for name in wanted], p.dy)
        for name, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, everything[name], rtol=1e-5, atol=1e-5)
    assert not p.run({name: t.detach() for name, t in p.leaves().items()}).requires_grad


@pytest.mark.parametrize("given", [(), ("weight",), ("bias",)])
@pytest.mark.parametrize("place", [*ONE_OF_EACH, Place("segments", "GroupNorm", (2, 4, 6), sizes={"g": 2})], ids=str)
@pytest.mark.usefixtures("demanded")
def test_one_parameter_or_none(place, given):
    p = problem_at(place, F32)
    numbers = {"weight": p.weight if "weight" in given else None, "bias": p.bias if "bias" in given else None}
    leaves = {name: t.clone().requires_grad_() for name, t in {"x": p.x, **numbers}.items() if t is not None}
    y = nw.normalize(leaves["x"], p.spec, leaves.get("weight"), leaves.get("bias"))
    arrays = {name: p.numpy(value) for name, value in numbers.items()}
    truth, cache = reference.forward(p.numpy(p.x), p.spec, **arrays)
    assert_close(y, truth, p.layout.count, scale=1.0)
    truths = reference.backward(p.numpy(p.dy), cache)
    for name, grad in zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True):
        assert_close(grad, truths["d" + name], p.x.numel(), scale=5.0, what=name)


@pytest.mark.parametrize("place", ONE_OF_EACH, ids=str)
@pytest.mark.usefixtures("demanded")
def test_retained_graphs_and_accumulation(place):
    p = problem_at(place, F32)
    leaves = p.leaves()
    y = p.run(leaves)
    once = torch.autograd.grad(y, list(leaves.values()), p.dy, retain_graph=True)
    y.backward(p.dy, retain_graph=True)
    y.backward(p.dy)
    for leaf, grad in zip(leaves.values(), once, strict=True):
        assert torch.equal(leaf.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(p.dy)


@pytest.mark.usefixtures("demanded")
def test_checkpoint_and_saved_tensor_hooks():
    p = Problem(BN, (6, 3), F32, act="relu", residual=True)
    _, plain = p.check()

    def compare(y, leaves):
        for name, grad in zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True):
            assert torch.equal(grad, plain[name])

    for reentrant in (False, True):
        leaves = p.leaves()
        call = lambda *t, leaves=leaves: p.run(dict(zip(leaves, t, strict=True)))  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(call, *leaves.values(), use_reentrant=reentrant)
        if reentrant:  # which allows .backward() only
            y.backward(p.dy)
            assert all(torch.equal(leaf.grad, plain[name]) for name, leaf in leaves.items())
        else:
            compare(y, leaves)
    with torch.autograd.graph.save_on_cpu():
        leaves = p.leaves()
        compare(p.run(leaves), leaves)
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        leaves = p.leaves()
        compare(p.run(leaves), leaves)
    assert p.x.shape in packed


@pytest.mark.usefixtures("demanded")
def test_autocast_leaves_types_alone_and_half_inputs_half():
    layer, x = nw.BatchNorm1d(5), torch.randn(60, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32
        y = layer(torch.nn.functional.linear(x, torch.eye(5)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("extra", [{}, {"act": "relu"}, {"residual": True, "act": "relu"}], ids=str)
@pytest.mark.usefixtures("demanded")
def test_what_was_saved_may_not_be_overwritten(extra):
    p = Problem(BN, (6, 3), F32, **extra)
    for victim in ("dx", "dweight", "output"):
        leaves = p.leaves()
        inputs = {name: t * 1 for name, t in leaves.items()}
        y = p.run(inputs)
        if victim == "output":
            y.mul_(2)
            if not extra.get("residual"):
                y.backward(p.dy)  # the output is saved only where its sign tells the slope
                continue
        else:
            inputs[victim].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(p.dy)


@pytest.mark.parametrize("shape", [(6, 3), (3, 2, 130)])
@pytest.mark.usefixtures("demanded")
def test_versions_of_buffers_rise(shape):
    """Whoever saved a running statistic before it moved is told."""
    x = torch.randn(shape)
    buffers = {"running_mean": torch.zeros(shape[1]), "running_var": torch.ones(shape[1])}
    before = {name: value._version for name, value in buffers.items()}
    nw.normalize(x, BN, **buffers)
    assert all(value._version > before[name] for name, value in buffers.items())
    weight = torch.ones(shape[1], requires_grad=True)
    product = weight * buffers["running_var"]
    nw.normalize(x, BN, **buffers)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    before = {name: value._version for name, value in buffers.items()}
    nw.normalize(x, BN, use_batch_stats=False, **buffers)
    assert all(value._version == before[name] for name, value in buffers.items())


@pytest.mark.usefixtures("demanded")
def test_inference_mode_and_no_grad_move_the_buffers():
    x, plain = torch.randn(60, 5), torch.nn.BatchNorm1d(5)
    truth = plain(x)
    for mode in (torch.inference_mode, torch.no_grad):
        layer = nw.BatchNorm1d(5)
        with mode():
            y = layer(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, truth.detach())
        torch.testing.assert_close(layer.running_var, plain.running_var)
        layer(x.clone().requires_grad_()).sum().backward()  # and training goes on
    with torch.inference_mode():
        layer = nw.BatchNorm1d(5)
        layer(x)
        torch.testing.assert_close(layer.running_var, plain.running_var)


@pytest.mark.parametrize("extra", [{}, {"residual": True, "act": "relu"}], ids=str)
@pytest.mark.usefixtures("demanded")
def test_backward_frees_what_forward_saved(extra):
    p = Problem(BN, (6, 3), F32, **extra)
    leaves = p.leaves()
    inputs = {name: t * 1 for name, t in leaves.items()}
    y = p.run(inputs)
    saved = weakref.ref(inputs["dx"])
    del inputs
    assert saved() is not None
    y.backward(p.dy)
    assert saved() is None


@pytest.mark.usefixtures("demanded")
def test_no_reference_cycle_keeps_the_graph():
    p = Problem(BN, (6, 3), F32, residual=True, act="relu")
    x = p.x.clone().requires_grad_() * 1
    gone = weakref.ref(x)
    y = nw.normalize(x, BN, p.weight, p.bias, act="relu", residual=p.residual)
    del x, y
    assert gone() is None


# ------------------------------------------------------------------------------------- torch.compile, export, functorch


def step(layer, x, residual=None, mask=None):
    x = x.clone().requires_grad_()
    y = layer(x, residual, mask)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), dx


LAYERS = {
    "batch": (lambda: nw.BatchNorm2d(3, act="relu"), (4, 3, 5, 6)),
    "instance": (lambda: nw.InstanceNorm2d(3, affine=True, track_running_stats=True), (4, 3, 5, 6)),
    "group": (lambda: nw.GroupNorm(2, 4), (3, 4, 5, 2)),
    "layer": (lambda: nw.LayerNorm(8), (5, 8)),
    "rms": (lambda: nw.RMSNorm(8), (5, 8)),
    "ghost": (lambda: nw.GhostBatchNorm(3, 2), (6, 3, 4, 2)),
}


def compare_compiled(
    backend,
    make,
    shapes,
    memory="contiguous",
    residual=False,
    mask=False,
    dynamic=None,
    kernel="cpu",
    training=(True, False),
):
    torch._dynamo.reset()
    eager, traced = make(), make()
    traced.load_state_dict(eager.state_dict())
    compiled = torch.compile(traced, backend=backend, fullgraph=True, dynamic=dynamic)
    for mode in training:
        for layer in (eager, traced, compiled):
            layer.train(mode)
        for shape in shapes:
            x = lay(torch.randn(shape) + 2, memory)
            r = torch.randn(shape) if residual else None
            m = torch.rand(shape[0]) > 0.3 if mask else None
            with nw.use("native"):
                truth = step(eager, x, r, m)
            with nw.use(kernel):
                got = step(compiled, x, r, m)
            for a, b in zip(got, truth, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
                assert a.stride() == x.stride()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(traced.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_compiled_is_eager(kind, memory):
    make, shape = LAYERS[kind]
    if memory == "contiguous" or len(shape) == 4:
        compare_compiled("aot_eager", make, [shape], memory)


def test_compiled_with_residual_mask_and_changing_batches():
    make, (_, *rest) = LAYERS["batch"]
    compare_compiled("aot_eager", make, [(4, *rest), (7, *rest), (9, *rest)], residual=True, dynamic=True)
    compare_compiled("aot_eager", make, [(4, *rest)], mask=True)


def test_compiled_running_statistics_of_another_memory_order():
    """Statistics of channels outermost in memory: the operator must hand them over in the pattern's order."""
    torch._dynamo.reset()
    eager, traced = (nw.Norm("b c [s...]", affine="", running="c", c=4) for _ in range(2))
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    x = (torch.randn(4, 3, 20) * torch.arange(1.0, 5)[:, None, None]).transpose(0, 1)
    with nw.use("native"):
        truth = eager(x)
    with nw.use("cpu"):
        got = compiled(x)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(traced.running_var, eager.running_var)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_inductor_is_eager(memory):
    compare_compiled("inductor", LAYERS["batch"][0], [LAYERS["batch"][1]], memory, residual=True)


@pytest.mark.parametrize("extra", [{}, {"residual": True, "act": "relu"}, {"mask": 1}], ids=str)
def test_operators_keep_torchs_rules(extra):
    """Schema, fake tensors, autograd registration and tracing, by torch's own check."""
    p = Problem(BN, (6, 3), F32, **extra)
    leaves = p.leaves()
    rest = (leaves.get("dresidual"), p.mask, BN.pattern, BN.affine, True, BN.running, [], [], True, 1e-5, p.act, "cpu")
    arguments = (leaves["dx"], leaves["dweight"], leaves["dbias"], None, None, *rest)
    torch.library.opcheck(torch.ops.normwright.forward.default, arguments)
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    y, statistics, _ = torch.ops.normwright.forward(*detached)
    torch.library.opcheck(torch.ops.normwright.backward.default, (p.dy, y, statistics, *detached))


def test_exported_programs_hold_torchs_own_operators():
    layer, x = nw.BatchNorm2d(3, act="relu").eval(), torch.randn(4, 3, 40, 60)
    program = torch.export.export(layer, (x,))
    assert "normwright" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), torch.relu(torch.nn.functional.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias)))  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own decompositions
def test_function_transforms_and_forward_mode_are_native():
    x, weight = torch.randn(40, 300), torch.randn(300)
    run = lambda x: nw.normalize(x, LN, weight)  # noqa: E731
    truth = torch.nn.functional.layer_norm(x, (300,), weight)
    torch.testing.assert_close(torch.func.vmap(run)(x.view(4, 10, 300)).view(40, 300), truth)
    tangent = torch.randn_like(x)
    _, forward = torch.func.jvp(run, (x,), (tangent,))
    _, pull = torch.func.vjp(run, x)
    cotangent = torch.randn_like(x)
    torch.testing.assert_close((forward * cotangent).sum(), (pull(cotangent)[0] * tangent).sum(), rtol=1e-3, atol=1e-2)
    with nw.use("cpu"), pytest.raises(RuntimeError, match="a function transform or forward-mode differentiation"):
        torch.func.jvp(run, (x,), (tangent,))


def test_first_gradients_with_a_graph_follow_one_path_each_where_inputs_depend_on_one_another():
    gradients = []
    for kernel in ("native", "cpu"):
        torch.manual_seed(0)
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
        with nw.use(kernel):
            y = nw.normalize(x, nw.CATALOG["BatchNorm"].spec, weight=x.mean((0, 2, 3)), act="silu", residual=x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(dx.square().sum(), x)
        gradients.append((dx.detach(), again))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
