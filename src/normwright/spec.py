"""The notation: a normalization is a choice of axes.

A pattern names the axes of a tensor. Statistics are taken jointly over the axes in brackets, parentheses split one
dimension into several axes, and `s...` stands for any number of dimensions:

    [b] c [s...]         batch norm: one mean per channel, over the batch and every place
    b (g [c]) [s...]     group norm: one mean per sample and group
    b... [c]             layer norm: one mean per row

This module knows no tensors. `NormSpec` is what a layer carries; `NormSpec.layout(shape)` says, for one shape, how
the tensor is split, what is reduced, and how parameters broadcast. Both are hashable and made once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache

__all__ = ["Axis", "Layout", "NormSpec", "Pattern", "PatternError", "parse"]

_TOKEN = re.compile(r"\s*(?:(?P<axis>[A-Za-z_][A-Za-z0-9_]*)(?P<many>\.\.\.)?|(?P<mark>[\[\]()]))")


class PatternError(ValueError):
    """A pattern, or a pattern with a shape, breaks a rule: the text, a caret under the fault, the rule."""

    def __init__(self, rule: str, text: str, at: int | None = None, shape: tuple[int, ...] | None = None) -> None:
        self.rule, self.text, self.at, self.shape = rule, text, at, shape
        lines = [rule, f"    {text}"]
        if at is not None:
            lines.append("    " + " " * at + "^")
        if shape is not None:
            lines.append(f"    met shape {tuple(shape)}")
        super().__init__("\n".join(lines))

    def __reduce__(self):
        return (type(self), (self.rule, self.text, self.at, self.shape))


@dataclass(frozen=True)
class Axis:
    """One named axis of a pattern: `reduced` if it stands in brackets, `many` if it is `name...`."""

    name: str
    reduced: bool = False
    many: bool = False
    at: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: for each dimension of the tensor, the axes that share it (more than one if in parentheses)."""

    text: str
    dims: tuple[tuple[Axis, ...], ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(axis for dim in self.dims for axis in dim)


@cache
def parse(text: str, brackets: bool = True) -> Pattern:
    """Parse a pattern such as `"b (g [c]) [s...]"`; with `brackets=False`, a list of axes such as `"(g c)"`.

    Raises `PatternError` with a caret under the fault. Parsed once per text and cached.
    """
    dims: list[tuple[Axis, ...]] = []
    group: list[Axis] | None = None
    bracket_at = group_at = None
    seen: dict[str, Axis] = {}
    position = 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if match is None:
            at = position + len(text[position:]) - len(text[position:].lstrip())
            raise PatternError("A pattern is made of axis names, `name...`, brackets and parentheses.", text, at)
        position = match.end()
        mark = match["mark"]
        if mark is None:
            name, many, at = match["axis"], match["many"] is not None, match.start("axis")
            if name in seen:
                raise PatternError(f"An axis is named once; {name!r} stands here a second time.", text, at)
            if many and group is not None:
                raise PatternError(f"`{name}...` cannot stand in parentheses: they split one dimension.", text, at)
            if many and any(axis.many for axis in seen.values()):
                raise PatternError(
                    "Only one axis may have `...`: with two it is undecided which takes a dimension.", text, at
                )
            seen[name] = axis = Axis(name, bracket_at is not None, many, at)
            if group is None:
                dims.append((axis,))
            else:
                group.append(axis)
            continue
        at = match.start("mark")
        if mark == "[":
            if not brackets:
                raise PatternError("Brackets belong in the pattern; a list of axes has none.", text, at)
            if bracket_at is not None:
                raise PatternError("Brackets do not nest: an axis is reduced or it is not.", text, at)
            bracket_at = at
        elif mark == "(":
            if group is not None:
                raise PatternError("Parentheses do not nest: name all parts of the dimension in one pair.", text, at)
            group, group_at = [], at
        elif mark == ")":
            if group is None or group_at is None:
                raise PatternError("This parenthesis was never opened.", text, at)
            if not group:
                raise PatternError("Parentheses hold the axes of one dimension; these are empty.", text, group_at)
            if bracket_at is not None and bracket_at > group_at:
                raise PatternError("This bracket was opened inside the parentheses and must close there.", text, at)
            dims.append(tuple(group))
            group = group_at = None
        else:
            if bracket_at is None:
                raise PatternError("This bracket was never opened.", text, at)
            if group_at is not None and bracket_at < group_at:
                raise PatternError("These parentheses were opened inside the bracket and must close there.", text, at)
            if not text[bracket_at + 1 : at].strip():
                raise PatternError("Brackets hold the axes that are reduced; these are empty.", text, bracket_at)
            bracket_at = None
    if bracket_at is not None:
        raise PatternError("This bracket is not closed.", text, bracket_at)
    if group_at is not None:
        raise PatternError("This parenthesis is not closed.", text, group_at)
    if brackets and not dims:
        raise PatternError("A pattern names at least one axis.", text, 0)
    if brackets and not any(axis.reduced for axis in seen.values()):
        raise PatternError("A pattern reduces at least one axis: put brackets around it, as in `[b] c`.", text, 0)
    return Pattern(text, tuple(dims))


def _sublist(pattern: Pattern, text: str, what: str) -> Pattern:
    """Parse `text` as a list of axes of `pattern`, in its order, or say what is wrong."""
    listed = parse(text, brackets=False)
    order = [axis.name for axis in pattern.axes]
    by_name = {axis.name: axis for axis in pattern.axes}
    last = -1
    for axis in listed.axes:
        if axis.name not in by_name:
            raise PatternError(
                f"`{what}` lists axes of the pattern {pattern.text!r}, which has no such axis.", text, axis.at
            )
        if axis.many != by_name[axis.name].many:
            raise PatternError(
                f"`{what}` writes an axis as the pattern {pattern.text!r} does, with or without `...`.", text, axis.at
            )
        if order.index(axis.name) < last:
            raise PatternError(f"`{what}` lists axes in the order of the pattern {pattern.text!r}.", text, axis.at)
        last = order.index(axis.name)
    return listed


@dataclass(frozen=True)
class Layout:
    """A spec on one shape: how to split the tensor, what to reduce, and what shapes everything else has.

    All positions refer to `split`, the shape after parentheses are split; splitting never copies.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]  # one per entry of `split`; `s...` on two dimensions gives s0, s1
    split: tuple[int, ...]
    reduced: tuple[int, ...]
    kept: tuple[int, ...]
    count: int  # values per statistic
    stat_shape: tuple[int, ...]  # `split` with 1 where reduced
    affine_shape: tuple[int, ...]  # the parameter as stored
    affine_view: tuple[int, ...]  # the parameter as it broadcasts on `split`
    running_shape: tuple[int, ...]
    running_view: tuple[int, ...]
    merged: tuple[int, ...]  # kept positions that the running statistics average over
    position_dims: tuple[int, ...]  # dimensions of `shape` without parameters: those that a mask may have
    parts: tuple[int, ...]  # entries of `split` per dimension of `shape`

    def mask_view(self, mask_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which a mask over the leading position axes (`b`, or `b s...`) broadcasts on `split`."""
        allowed = tuple(self.shape[d] for d in self.position_dims)
        k = len(mask_shape)
        if not 1 <= k <= len(allowed) or tuple(mask_shape) != allowed[:k]:
            raise ValueError(
                f"A mask marks valid positions: its shape is {allowed[:1]} or {allowed}, those axes of the input "
                f"{self.shape} that carry no parameters; got {tuple(mask_shape)}."
            )
        view, at = [], 0
        for d, parts in enumerate(self.parts):
            if d in self.position_dims[:k]:
                view.extend(self.split[at : at + parts])
            else:
                view.extend([1] * parts)
            at += parts
        return tuple(view)


@dataclass(frozen=True)
class NormSpec:
    """Which axes a normalization reduces, and where its parameters and running statistics live.

    Formula: `y = (x - mean) / sqrt(var + eps) * weight + bias`, with mean and variance over the bracketed axes;
    with `center=False`, `y = x / sqrt(mean(x^2) + eps) * weight + bias`.

    Arguments:
        pattern: the axes, for example `"b (g [c]) [s...]"`.
        affine: the axes of weight and bias, in the pattern's order, for example `"(g c)"`; `""` for none.
        center: subtract the mean.
        running: the axes of the running statistics; `""` for none. Batch statistics of kept axes that are not
            listed are averaged (instance norm tracks `c` and averages over `b`).
        sizes: sizes of axes that a shape alone does not decide, as `(("g", 8),)`; a dict is accepted.

    Errors: `PatternError` for a pattern that breaks a rule or a shape that does not fit it.
    """

    pattern: str
    affine: str = ""
    center: bool = True
    running: str = ""
    sizes: tuple[tuple[str, int], ...] | Mapping[str, int] = ()

    # parsed once and kept here: torch.compile traces attributes, but warns of cached functions
    parsed: Pattern = field(init=False, repr=False, compare=False)
    parsed_affine: Pattern = field(init=False, repr=False, compare=False)
    parsed_running: Pattern = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)  # a spec is a key of caches asked at every call

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(dict(self.sizes).items()))
        parsed = parse(self.pattern)
        affine = _sublist(parsed, self.affine, "affine")
        running = _sublist(parsed, self.running, "running")
        digest = hash((self.pattern, self.affine, self.center, self.running, self.sizes))
        for name, value in (
            ("parsed", parsed),
            ("parsed_affine", affine),
            ("parsed_running", running),
            ("_hash", digest),
        ):
            object.__setattr__(self, name, value)
        reduced = {axis.name for axis in parsed.axes if axis.reduced}
        for axis in running.axes:
            if axis.name in reduced:
                raise PatternError(
                    f"Running statistics live on kept axes; {axis.name!r} is reduced in {self.pattern!r}.",
                    self.running,
                    axis.at,
                )
        names = {axis.name: axis for axis in parsed.axes}
        for name, size in self.sizes:
            if name not in names:
                raise PatternError(f"A size is given for {name!r}, which the pattern does not name.", self.pattern)
            if names[name].many:
                raise PatternError(
                    f"`{name}...` is any number of dimensions and takes no size.", self.pattern, names[name].at
                )
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise PatternError(
                    f"The size of an axis is a positive integer; got {name}={size!r}.", self.pattern, names[name].at
                )

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self):
        # made anew when unpickled: another process hashes strings differently
        return (type(self), (self.pattern, self.affine, self.center, self.running, self.sizes))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The spec on a tensor of this shape; cached."""
        return _layout(self, tuple(shape))

    def layout_uncached(self, shape: tuple[int, ...]) -> Layout:
        """As `layout`, for tracers: sizes may be symbolic, and no cache is asked."""
        return _layout.__wrapped__(self, tuple(shape))


def _expand(spec: NormSpec, shape: tuple[int, ...]) -> list[list[tuple[str, Axis, int]]]:
    """For each dimension of `shape`, its axes as (expanded name, axis, size)."""
    pattern, sizes = spec.parsed, dict(spec.sizes)
    many = [i for i, dim in enumerate(pattern.dims) if dim[0].many]
    fixed = len(pattern.dims) - len(many)
    if len(shape) < fixed or (not many and len(shape) != fixed):
        need = f"at least {fixed}" if many else f"exactly {fixed}"
        raise PatternError(
            f"The pattern needs {need} dimension{'s' * (fixed != 1)}; the tensor has {len(shape)}.",
            pattern.text,
            None,
            shape,
        )
    dims: list[tuple[str | None, tuple[Axis, ...]]] = []
    for i, dim in enumerate(pattern.dims):
        if many and i == many[0]:
            dims += [(f"{dim[0].name}{j}", dim) for j in range(len(shape) - fixed)]
        else:
            dims.append((None, dim))
    result = []
    for (name, dim), size in zip(dims, shape, strict=True):
        if len(dim) == 1:
            axis = dim[0]
            if sizes.get(axis.name, size) != size:
                raise PatternError(
                    f"Axis {axis.name!r} has size {sizes[axis.name]} by the spec and {size} in the tensor.",
                    pattern.text,
                    axis.at,
                    shape,
                )
            result.append([(name or axis.name, axis, size)])
            continue
        unknown = [axis for axis in dim if axis.name not in sizes]
        known = math.prod([sizes.get(axis.name, 1) for axis in dim])
        if len(unknown) > 1:
            listed = ", ".join(axis.name for axis in unknown)
            raise PatternError(
                f"Of the axes of one dimension all but one need a size; give one of {listed}.",
                pattern.text,
                unknown[0].at,
                shape,
            )
        if size % known if unknown else size != known:
            parts = "·".join(f"{axis.name}={sizes[axis.name]}" for axis in dim if axis.name in sizes)
            rule = "is not divisible by" if unknown else "is not"
            raise PatternError(f"A dimension of size {size} {rule} {parts}.", pattern.text, dim[0].at, shape)
        result.append([(axis.name, axis, sizes.get(axis.name, size // known)) for axis in dim])
    return result


def _stored(listed: Pattern, groups: dict[str, list[tuple[str, int]]]) -> tuple[int, ...]:
    """The shape of a parameter stored on the listed axes: one dimension a token, products for parentheses."""
    shape: list[int] = []
    for dim in listed.dims:
        if dim[0].many:
            shape += [size for _, size in groups[dim[0].name]]
        else:
            shape.append(math.prod([groups[axis.name][0][1] for axis in dim]))
    return tuple(shape)


@lru_cache(maxsize=4096)
def _layout(spec: NormSpec, shape: tuple[int, ...]) -> Layout:
    dims = _expand(spec, shape)
    flat = [entry for dim in dims for entry in dim]
    groups: dict[str, list[tuple[str, int]]] = {axis.name: [] for axis in spec.parsed.axes}
    for name, axis, size in flat:
        groups[axis.name].append((name, size))
    affine, running = spec.parsed_affine, spec.parsed_running
    affine_axes, running_axes = ({axis.name for axis in p.axes} for p in (affine, running))
    split = tuple(size for _, _, size in flat)
    reduced = tuple(i for i, (_, axis, _) in enumerate(flat) if axis.reduced)
    kept = tuple(i for i, (_, axis, _) in enumerate(flat) if not axis.reduced)

    def view(axes: set[str]) -> tuple[int, ...]:
        return tuple(size if axis.name in axes else 1 for _, axis, size in flat)

    return Layout(
        shape=shape,
        names=tuple(name for name, _, _ in flat),
        split=split,
        reduced=reduced,
        kept=kept,
        count=math.prod([split[i] for i in reduced]),  # lists: torch.compile traces no generators into math.prod
        stat_shape=tuple(1 if i in reduced else size for i, size in enumerate(split)),
        affine_shape=_stored(affine, groups),
        affine_view=view(affine_axes),
        running_shape=_stored(running, groups),
        running_view=view(running_axes),
        merged=tuple(i for i in kept if flat[i][1].name not in running_axes),
        position_dims=tuple(d for d, dim in enumerate(dims) if not any(axis.name in affine_axes for _, axis, _ in dim)),
        parts=tuple(len(dim) for dim in dims),
    )
