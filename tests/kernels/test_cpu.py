"""The CPU kernels, demanded by name, against the NumPy reference in float64: one table of places, one of variants.

A *place* is a spec on a shape and memory layout: it decides the family of kernels and how the work is cut. A *variant*
(family, type, activation, residual, mask) is a pair of compiled kernels, forward and backward, of about a second each;
there are some three hundred. Every variant of a covering design runs on every place of its family: in the quick tests
any two choices meet in some variant, in the slow ones any three do.
"""

from __future__ import annotations

import itertools
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

# ------------------------------------------------------------------------------------------------------------- places


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
    assert {(f.R > 1, f.chunks > 1) for f in columns} == {(False, False), (False, True), (True, False), (True, True)}
    blocks = [(f.R * f.plan.K * f.plan.B > f.columns, f.plan.by_a) for f in columns]
    assert {(True, False), (True, True), (False, True)} <= set(blocks)
    assert any(f.plan.P > 1 and f.plan.S > 1 for f in columns)
    assert any(f.plan.P > 1 and f.plan.S == 1 for f in columns)
    assert any(f.plan.O > 1 and not f.plan.by_a for f in columns)
    assert any(f.workers > 1 and f.chunks == 1 for f in columns)
    for family in FAMILIES:
        assert any(f.parallel for f in found if f.family == family)
    assert any(f.plan.G > 1 for f in found if f.family == "rows")
    assert any(f.plan.P > 1 for f in found if f.family == "segments")


# ----------------------------------------------------------------------------------------------------------- variants

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
