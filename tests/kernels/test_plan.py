"""Plans against hand-computed nests, and against plain indexing: which statistic and parameter each element has."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normwright as nw
from normwright.catalog import CATALOG
from normwright.kernels.plan import NoPlan, Plan, plan

ROWS = [row for row in CATALOG.values() if row.spec is not None]


def arranged(shape: tuple[int, ...], layout: str) -> torch.Tensor:
    """An empty tensor of this shape in the named memory layout."""
    if layout == "contiguous":
        return torch.empty(shape)
    if layout == "channels_last":
        last = (0, *range(2, len(shape)), 1)
        back = (0, len(shape) - 1, *range(1, len(shape) - 1))
        return torch.empty([shape[d] for d in last]).permute(back)
    if layout == "reversed":
        return torch.empty(shape[::-1]).permute(tuple(range(len(shape)))[::-1])
    if layout == "swapped":  # the first two dimensions change places in memory
        return torch.empty((shape[1], shape[0], *shape[2:])).transpose(0, 1)
    assert layout == "sliced"
    return torch.empty((*shape[:-1], shape[-1] + 3))[..., 1:-2]


def make(spec: nw.NormSpec, shape: tuple[int, ...], layout: str = "contiguous") -> Plan:
    return plan(spec, shape, arranged(shape, layout).stride())


# (row, sizes, shape, layout) -> (O, A, K, B), (G, P, S), by_a: computed by hand
BY_HAND = [
    # batch norm: (1, N, C, S), channels_last (1, N·S, C, 1)
    ("BatchNorm", {}, (6, 3), "contiguous", (1, 6, 3, 1), (3, 1, 1), False),
    ("BatchNorm", {}, (6, 3), "reversed", (1, 1, 3, 6), (3, 1, 6), False),
    ("BatchNorm", {}, (4, 3, 5, 2), "contiguous", (1, 4, 3, 10), (3, 1, 10), False),
    ("BatchNorm", {}, (4, 3, 5, 2), "channels_last", (1, 40, 3, 1), (3, 1, 1), False),
    ("BatchNorm", {}, (4, 3, 5, 2), "swapped", (1, 1, 3, 40), (3, 1, 40), False),
    ("BatchNorm", {}, (4, 3, 5, 2), "reversed", (1, 10, 3, 4), (3, 1, 4), False),
    ("BatchNorm", {}, (4, 3, 5, 2), "sliced", (1, 4, 3, 10), (3, 1, 10), False),
    ("BatchNorm", {}, (4, 3, 2, 3, 2), "contiguous", (1, 4, 3, 12), (3, 1, 12), False),
    ("BatchNorm", {}, (4, 3, 2, 3, 2), "channels_last", (1, 48, 3, 1), (3, 1, 1), False),
    ("BatchNorm", {}, (1, 3, 5, 2), "contiguous", (1, 1, 3, 10), (3, 1, 10), False),
    ("BatchNorm", {}, (4, 1, 5, 2), "contiguous", (1, 1, 1, 40), (1, 1, 40), False),
    ("BatchNorm", {}, (4, 3, 1, 1), "contiguous", (1, 4, 3, 1), (3, 1, 1), False),
    ("BatchNorm", {}, (1, 1, 1, 1), "contiguous", (1, 1, 1, 1), (1, 1, 1), False),
    # ghost batch norm: (n, b, C, S)
    ("GhostBatchNorm", {"n": 3}, (6, 4, 5, 2), "contiguous", (3, 2, 4, 10), (4, 1, 10), False),
    ("GhostBatchNorm", {"n": 3}, (6, 4, 5, 2), "channels_last", (3, 20, 4, 1), (4, 1, 1), False),
    ("GhostBatchNorm", {"n": 3}, (6, 4), "contiguous", (3, 2, 4, 1), (4, 1, 1), False),
    # layer norm and RMS norm: (1, 1, rows, D), every element of a row with a parameter of its own
    ("LayerNorm", {}, (5, 8), "contiguous", (1, 1, 5, 8), (1, 8, 1), False),
    ("LayerNorm", {}, (2, 3, 8), "contiguous", (1, 1, 6, 8), (1, 8, 1), False),
    ("LayerNorm", {}, (2, 3, 8), "reversed", (1, 8, 6, 1), (1, 1, 1), True),
    ("LayerNorm", {}, (2, 3, 8), "sliced", (1, 1, 6, 8), (1, 8, 1), False),
    ("LayerNorm", {}, (8,), "contiguous", (1, 1, 1, 8), (1, 8, 1), False),
    ("RMSNorm", {}, (2, 3, 8), "contiguous", (1, 1, 6, 8), (1, 8, 1), False),
    # instance norm: (1, 1, N·C, S), channels_last (N, S, C, 1)
    ("InstanceNorm", {}, (3, 4, 5, 2), "contiguous", (1, 1, 12, 10), (4, 1, 10), False),
    ("InstanceNorm", {}, (3, 4, 5, 2), "channels_last", (3, 10, 4, 1), (4, 1, 1), False),
    ("FilterResponseNorm", {}, (3, 4, 5, 2), "channels_last", (3, 10, 4, 1), (4, 1, 1), False),
    # group norm: K = N·G with B = C/G·S, each of the C/G channels with a parameter for its S places
    ("GroupNorm", {"g": 2}, (3, 4, 5, 2), "contiguous", (1, 1, 6, 20), (2, 2, 10), False),
    ("GroupNorm", {"g": 2}, (3, 4, 5, 2), "channels_last", (3, 10, 2, 2), (2, 2, 1), False),
    ("GroupNorm", {"g": 2}, (3, 4), "contiguous", (1, 1, 6, 2), (2, 2, 1), False),
    ("GroupNorm", {"g": 1}, (3, 4, 5), "contiguous", (1, 1, 3, 20), (1, 4, 5), False),
    ("GroupNorm", {"g": 4}, (3, 4, 5), "contiguous", (1, 1, 12, 5), (4, 1, 5), False),
    # channel norm: (N, C, S, 1), the parameter is `a`; channels_last is a layer norm
    ("ChannelNorm", {}, (2, 6, 3, 2), "contiguous", (2, 6, 6, 1), (1, 1, 1), True),
    ("ChannelNorm", {}, (2, 6, 3, 2), "channels_last", (1, 1, 12, 6), (1, 6, 1), False),
    ("ChannelNorm", {}, (4, 6), "contiguous", (1, 1, 4, 6), (1, 6, 1), False),
    # K networks at once: one batch norm of k·c channels
    ("PackedBatchNorm", {"k": 3}, (4, 6, 3, 2), "contiguous", (1, 4, 6, 6), (6, 1, 6), False),
]


@pytest.mark.parametrize(("name", "sizes", "shape", "layout", "nest", "parameters", "by_a"), BY_HAND)
def test_nests_by_hand(name, sizes, shape, layout, nest, parameters, by_a):
    p = make(CATALOG[name].make(**sizes), shape, layout)
    assert nest == (p.O, p.A, p.K, p.B)
    assert parameters == (p.G, p.P, p.S)
    assert p.by_a == by_a
    assert p.copy == (layout == "sliced")
    assert p.count == math.prod(shape) // (p.O * p.K)
    assert p.parameters == (nest[1] if by_a else parameters[0] * parameters[1])


def by_indexing(spec: nw.NormSpec, shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The statistic and the parameter of every element, numbered in the pattern's order, as they lie in memory."""
    layout = spec.layout(shape)
    found = []
    for view in (layout.stat_shape, layout.affine_view):
        labels = np.broadcast_to(np.arange(math.prod(view)).reshape(view), layout.split)
        found.append(labels.reshape(shape).transpose(order).reshape(-1))
    return found[0], found[1]


def by_nest(sizes: tuple[int, ...], parameters: tuple[int, ...], by_a: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same by the formula that the kernels use."""
    O, A, K, B = sizes
    G, P, S = parameters
    o, a, k, b = (index.reshape(-1) for index in np.indices((O, A, K, B)))
    return o * K + k, a if by_a else (k % G) * P + b // S


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a and b number the same groups, perhaps in another order."""
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


def check(spec: nw.NormSpec, shape: tuple[int, ...], strides: tuple[int, ...]) -> Plan:
    p = plan(spec, shape, strides)
    statistic, parameter = by_indexing(spec, shape, p.order)
    got, got_parameter = by_nest((p.O, p.A, p.K, p.B), (p.G, p.P, p.S), p.by_a)
    assert same_partition(statistic, got)
    assert np.array_equal(parameter, got_parameter)
    if p.order == tuple(range(len(shape))):
        assert np.array_equal(statistic, got)
    return p


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed", "swapped", "sliced"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_by_indexing(row, layout):
    for shape, sizes in row.examples:
        for one in (None, 0, len(shape) - 1):  # a dimension of size 1 too, where the sizes allow it
            with_one = tuple(1 if d == one else size for d, size in enumerate(shape))
            try:
                row.make(**sizes).layout(with_one)
            except nw.PatternError:
                continue
            t = arranged(with_one, layout)
            try:
                p = check(row.make(**sizes), with_one, t.stride())
            except NoPlan:
                # the only rows whose parameters cannot follow: channels in pieces between other axes
                assert layout in ("reversed", "swapped")
                continue
            assert [t.stride(d) for d in p.order if t.size(d) > 1] == sorted(
                (t.stride(d) for d in p.order if t.size(d) > 1), reverse=True
            ) or p.copy


def some_nest(statistic: np.ndarray, parameter: np.ndarray) -> bool:
    """Whether any nest at all has these statistics and parameters, by trying every one.

    With K = 1 the nest could cut one reduced run in two, A and B, for the parameters' sake; a plan does not.
    """
    n = statistic.size
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    for O, A, K in itertools.product(divisors, repeat=3):
        if n % (O * A * K) or (K == 1 and A > 1 and n > O * A):
            continue
        B = n // (O * A * K)
        if not same_partition(statistic, by_nest((O, A, K, B), (1, 1, B), False)[0]):
            continue
        if np.array_equal(parameter, by_nest((O, A, K, B), (1, 1, B), True)[1]):
            return True
        for G, P in itertools.product(divisors, repeat=2):
            cut = K % G == 0 and B % P == 0 and parameter.max() + 1 == G * P
            if cut and np.array_equal(parameter, by_nest((O, A, K, B), (G, P, B // P), False)[1]):
                return True
    return False


@st.composite
def problems(draw):
    """A pattern of up to five axes in up to four dimensions, affine axes, sizes, and an order of memory."""
    dims, names, size_of, shape = [], iter("abcde"), {}, []
    reduced, affine = {}, []
    for _ in range(draw(st.integers(1, 4))):
        axes = [name for name, _ in zip(names, range(draw(st.integers(1, 2))), strict=False)]
        if not axes:
            break
        for axis in axes:
            size_of[axis] = draw(st.sampled_from([1, 2, 3]))
            reduced[axis] = draw(st.booleans())
            if draw(st.booleans()):
                affine.append(axis)
        dims.append(axes)
        shape.append(math.prod(size_of[axis] for axis in axes))
    if not any(reduced.values()):
        reduced["a"] = True
    words = [" ".join(f"[{axis}]" if reduced[axis] else axis for axis in axes) for axes in dims]
    pattern = " ".join(f"({word})" if len(axes) > 1 else word for word, axes in zip(words, dims, strict=True))
    spec = nw.NormSpec(pattern, " ".join(affine), sizes=size_of)
    order = tuple(draw(st.permutations(range(len(shape)))))
    return spec, tuple(shape), order, draw(st.booleans())


@settings(max_examples=400, deadline=None)
@given(problems())
def test_any_pattern_and_order_by_indexing(problem):
    spec, shape, order, sliced = problem
    lying = [shape[d] for d in order]
    t = torch.empty([*lying, 2])[..., 0] if sliced else torch.empty(lying)
    t = t.permute([order.index(d) for d in range(len(shape))])
    try:
        p = check(spec, shape, t.stride())
    except NoPlan:
        in_memory = tuple(range(len(shape))) if sliced and t.numel() > 1 else order
        assert not some_nest(*by_indexing(spec, shape, in_memory))
    else:
        assert p.copy == (sliced and t.numel() > 1)


@pytest.mark.parametrize(
    ("pattern", "affine", "shape", "layout", "why"),
    [
        ("[a] b [c] d [e]", "", (2, 2, 2, 2, 2), "contiguous", "alternate more than four times in memory"),
        ("a [b] c [d] e", "", (2, 2, 2, 2, 2), "contiguous", "alternate more than four times in memory"),
        ("[a] b", "a b", (2, 3), "contiguous", "vary along several loops"),
        ("[a b] c", "a", (2, 3, 4), "contiguous", "vary along several loops"),
        ("a [b] c", "a", (2, 3, 4), "contiguous", "outermost loop"),
        ("a b [c]", "a", (2, 3, 4), "contiguous", "not innermost among the kept axes"),
        ("a [b c]", "c", (2, 3, 4), "contiguous", "not outermost among the contiguous reduced axes"),
        ("a [b c]", "b c", (2, 3, 4), "reversed", "another order than in the pattern"),
    ],
)
def test_no_plan_says_why(pattern, affine, shape, layout, why):
    spec = nw.NormSpec(pattern, affine)
    with pytest.raises(NoPlan, match=why):
        make(spec, shape, layout)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_empty_tensors_have_a_plan_without_elements(shape):
    p = make(CATALOG["BatchNorm"].spec, shape)
    assert p.O * p.A * p.K * p.B == 0


def test_expanded_tensors_are_copied():
    t = torch.empty(3, 1, 4).expand(3, 5, 4)
    p = plan(CATALOG["BatchNorm"].spec, (3, 5, 4), t.stride())
    assert p.copy
    assert (p.O, p.A, p.K, p.B, p.order) == (1, 3, 5, 4, (0, 1, 2))


def test_a_plan_is_made_once():
    spec = CATALOG["BatchNorm"].spec
    assert plan(spec, (4, 3, 5), (15, 5, 1)) is plan(
        nw.NormSpec("[b] c [s...]", "c", running="c"), (4, 3, 5), (15, 5, 1)
    )
    assert plan(spec, (4, 3, 5), (15, 5, 1)) is not plan(spec, (4, 3, 5), (15, 1, 3))


def test_a_shape_that_does_not_fit_is_the_patterns_error():
    with pytest.raises(nw.PatternError):
        make(CATALOG["GroupNorm"].make(g=4), (2, 6, 3))
