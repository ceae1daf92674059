"""Plans: a spec on one shape and memory layout becomes the loop nest `(O, A, K, B)` that every kernel runs.

For each outer `o` and kept `k` there are statistics over `a` and `b`; memory order is o, a, k, b with b contiguous.
Parameters broadcast onto the nest: element (o, a, k, b) has parameter `(k % G)·P + b // S`, S = B / P, or `a` itself.
A plan knows no tensors and no device; it is made once per spec, shape and strides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ..spec import Layout, NormSpec

__all__ = ["NoPlan", "Plan", "plan"]


class NoPlan(ValueError):
    """This layout is no nest; the message says why. Native kernels run it."""


@dataclass(frozen=True)
class Plan:
    """The nest and the place of the parameters on it.

    Arguments:
        O, A, K, B: sizes of the nest; a statistic is over A·B values, there are O·K of them.
        G, P, S: parameter `(k % G)·P + b // S`; P·S = B. Without parameters G = P = 1.
        by_a: the parameter is `a` instead (channel norm with channels outermost).
        copy: the tensor is not dense and is first copied, in the order `order`.
        order: the input's dimensions, outermost in memory first.
        merged: running statistics average over `merged` statistics each (1 for batch norm).
    """

    O: int
    A: int
    K: int
    B: int
    G: int
    P: int
    S: int
    by_a: bool
    copy: bool
    order: tuple[int, ...]
    layout: Layout

    @property
    def count(self) -> int:
        """Values per statistic."""
        return self.A * self.B

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.A if self.by_a else self.G * self.P


@lru_cache(maxsize=4096)
def plan(spec: NormSpec, shape: tuple[int, ...], strides: tuple[int, ...]) -> Plan:
    """The plan of `spec` for a tensor of this shape and strides (in elements); raises `NoPlan` where there is none."""
    layout = spec.layout(shape)
    order = tuple(sorted(range(len(shape)), key=lambda d: (-strides[d], d)))
    copy = not _dense([shape[d] for d in order], [strides[d] for d in order])
    if copy:
        order = tuple(range(len(shape)))
    # entries of `split` in memory order, those of size 1 left out
    starts = [sum(layout.parts[:d]) for d in range(len(shape))]
    entries = [i for d in order for i in range(starts[d], starts[d] + layout.parts[d]) if layout.split[i] != 1]
    runs: list[tuple[bool, list[int]]] = []
    for i in entries:
        reduced = i in layout.reduced
        if not runs or runs[-1][0] != reduced:
            runs.append((reduced, []))
        runs[-1][1].append(i)
    kinds = "".join("R" if reduced else "K" for reduced, _ in runs)
    if kinds not in _NESTS:
        raise NoPlan(f"kept and reduced axes alternate more than four times in memory ({kinds})")
    places: dict[str, list[int]] = {"O": [], "A": [], "K": [], "B": []}
    for place, (_, run) in zip(_NESTS[kinds], runs, strict=True):
        places[place] = run
    sizes = {place: math.prod(layout.split[i] for i in run) for place, run in places.items()}
    G, P, by_a = _parameters(layout, places)
    return Plan(
        **sizes, G=G, P=P, S=sizes["B"] // P if P else 1, by_a=by_a, copy=copy, order=order, layout=layout
    )  # fmt: skip


# kept and reduced runs in memory order -> their places in the nest
_NESTS = {"": "", "K": "K", "R": "B", "KR": "KB", "RK": "AK", "RKR": "AKB", "KRK": "OAK", "KRKR": "OAKB"}


def _dense(shape: list[int], strides: list[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _parameters(layout: Layout, places: dict[str, list[int]]) -> tuple[int, int, bool]:
    """G, P and by_a; `NoPlan` where the parameters are none of the broadcasts that the kernels know."""
    affine = {i for i, size in enumerate(layout.affine_view) if size != 1}
    where = {place: [i for i in run if i in affine] for place, run in places.items()}
    listed = [i for place in "OAKB" for i in where[place]]
    if listed != sorted(listed):
        raise NoPlan("the parameters' axes lie in memory in another order than in the pattern")
    if where["A"]:
        if where["A"] != places["A"] or where["K"] or where["B"] or where["O"]:
            raise NoPlan("the parameters vary along several loops of the nest")
        return 1, 1, True
    if where["O"]:
        raise NoPlan("the parameters vary along the outermost loop")
    if where["K"] and places["K"][-len(where["K"]) :] != where["K"]:
        raise NoPlan("the parameters' axis is not innermost among the kept axes")
    if where["B"] and places["B"][: len(where["B"])] != where["B"]:
        raise NoPlan("the parameters' axis is not outermost among the contiguous reduced axes")
    size = layout.split
    return math.prod(size[i] for i in where["K"]), math.prod(size[i] for i in where["B"]), False
