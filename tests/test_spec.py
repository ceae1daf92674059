"""The notation: layouts against a plain index count, and every error with its caret."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normwright.spec import Axis, NormSpec, PatternError, parse

NAMES = "abcdefghijkl"


@st.composite
def cases(draw):
    """A normalization as data: (dims, text, sizes, affine text, running text), made without the parser.

    `dims` has for each dimension of the tensor its list of (name, reduced, size, in affine, in running, dimension of
    the pattern); the text is written from it.
    """
    names = iter(NAMES)
    kinds = draw(st.lists(st.sampled_from(["one", "one", "group"]), min_size=1, max_size=3))
    if draw(st.booleans()):
        kinds.insert(draw(st.integers(0, len(kinds))), "many")
    dims, words, affine, running, sizes = [], [], [], [], {}
    for kind in kinds:
        if kind == "group":
            parts = [
                (next(names), draw(st.booleans()), draw(st.integers(1, 3)), draw(st.booleans()), draw(st.booleans()))
                for _ in range(draw(st.integers(1, 3)))
            ]
            parts = [(n, red, size, aff, run and not red) for n, red, size, aff, run in parts]
            dims.append(parts)
            if all(red for _, red, *_ in parts) and draw(st.booleans()):
                words.append("[(" + " ".join(n for n, *_ in parts) + ")]")
            else:
                words.append("(" + " ".join(f"[{n}]" if red else n for n, red, *_ in parts) + ")")
            deduced = draw(st.sampled_from([None, *(n for n, *_ in parts)]))
            sizes.update({n: size for n, _, size, *_ in parts if n != deduced})
            for listed, which in ((affine, 3), (running, 4)):
                chosen = [part[0] for part in parts if part[which]]
                if len(chosen) > 1 and draw(st.booleans()):
                    listed.append("(" + " ".join(chosen) + ")")
                else:
                    listed.extend(chosen)
        else:
            name, red, aff = next(names), draw(st.booleans()), draw(st.booleans())
            run = draw(st.booleans()) and not red
            count = draw(st.integers(0, 3)) if kind == "many" else 1
            word = name + "..." * (kind == "many")
            for i in range(count):
                size = draw(st.integers(1, 3))
                dims.append([(name + str(i) * (kind == "many"), red, size, aff, run)])
            if kind == "one" and draw(st.booleans()):
                sizes[name] = dims[-1][0][2]
            words.append(f"[{word}]" if red else word)
            affine += [word] * aff
            running += [word] * run
    if not any("[" in word for word in words):
        dims.append([("z", True, draw(st.integers(1, 3)), False, False)])
        words.append("[z]")
    text = " ".join(words)
    if draw(st.booleans()):
        text = text.replace("] [", " ")  # neighbours share a bracket
    if draw(st.booleans()):
        text = text.replace(" ", "  ")
    return dims, text, sizes, " ".join(affine), " ".join(running)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_layout_agrees_with_the_structure_it_was_written_from(case):
    dims, text, sizes, affine, running = case
    flat = [axis for dim in dims for axis in dim]
    shape = tuple(math.prod(axis[2] for axis in dim) for dim in dims)
    layout = NormSpec(text, affine, running=running, sizes=sizes).layout(shape)
    assert layout.shape == shape
    assert layout.names == tuple(axis[0] for axis in flat)
    assert layout.split == tuple(axis[2] for axis in flat)
    assert layout.reduced == tuple(i for i, axis in enumerate(flat) if axis[1])
    assert layout.kept == tuple(i for i, axis in enumerate(flat) if not axis[1])
    assert layout.count == math.prod(axis[2] for axis in flat if axis[1])
    assert layout.stat_shape == tuple(1 if axis[1] else axis[2] for axis in flat)
    assert layout.affine_view == tuple(axis[2] if axis[3] else 1 for axis in flat)
    assert layout.running_view == tuple(axis[2] if axis[4] else 1 for axis in flat)
    assert layout.merged == tuple(i for i, axis in enumerate(flat) if not axis[1] and not axis[4])
    assert layout.position_dims == tuple(d for d, dim in enumerate(dims) if not any(axis[3] for axis in dim))
    assert layout.parts == tuple(len(dim) for dim in dims)
    assert math.prod(layout.running_shape) == math.prod(layout.running_view)
    size_of = {axis[0]: axis[2] for axis in flat}
    stored = []
    for word in re.findall(r"\([^)]*\)|\S+", affine):
        if word.endswith("..."):
            stored += [axis[2] for axis in flat if re.fullmatch(word[:-3] + r"\d", axis[0])]
        else:
            stored.append(math.prod(size_of[name] for name in word.strip("()").split()))
    assert layout.affine_shape == tuple(stored)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_values_meet_in_a_statistic_exactly_if_their_kept_coordinates_agree(case):
    """Every element is placed by division and remainder, one at a time; `layout` does it by one reshape."""
    dims, text, sizes, affine, running = case
    shape = tuple(math.prod(axis[2] for axis in dim) for dim in dims)
    x = np.random.default_rng(0).standard_normal(shape)
    weight_at: dict[tuple[int, ...], int] = {}
    members: dict[tuple[int, ...], list[float]] = {}
    keys = np.empty(shape, dtype=object)
    for index in np.ndindex(*shape):
        kept, parameter = [], []
        for position, dim in zip(index, dims, strict=True):
            for place, (_, reduced, size, in_affine, _) in enumerate(dim):
                inner = math.prod(axis[2] for axis in dim[place + 1 :])
                coordinate = position // inner % size
                if not reduced:
                    kept.append(coordinate)
                if in_affine:
                    parameter.append(coordinate)
        keys[index] = tuple(kept)
        members.setdefault(tuple(kept), []).append(x[index])
        weight_at.setdefault(tuple(parameter), len(weight_at))
    layout = NormSpec(text, affine, running=running, sizes=sizes).layout(shape)
    mean = x.reshape(layout.split).mean(layout.reduced, keepdims=True)
    assert mean.shape == layout.stat_shape
    assert all(len(values) == layout.count for values in members.values())
    spread = np.broadcast_to(mean, layout.split).reshape(shape)
    for index in np.ndindex(*shape):
        assert spread[index] == pytest.approx(np.mean(members[keys[index]]), abs=1e-12)
    assert math.prod(layout.affine_shape) == len(weight_at)


@pytest.mark.parametrize(
    ("pattern", "affine", "running", "sizes", "shape", "expected"),
    [
        (
            "b (g [c]) [s...]",
            "(g c)",
            "",
            {"g": 2},
            (5, 6, 7, 8),
            {
                "names": ("b", "g", "c", "s0", "s1"),
                "split": (5, 2, 3, 7, 8),
                "reduced": (2, 3, 4),
                "kept": (0, 1),
                "count": 168,
                "stat_shape": (5, 2, 1, 1, 1),
                "affine_shape": (6,),
                "affine_view": (1, 2, 3, 1, 1),
                "running_shape": (),
                "merged": (0, 1),
                "position_dims": (0, 2, 3),
                "parts": (1, 2, 1, 1),
            },
        ),
        (
            "(n [b]) c [s...]",
            "c",
            "c",
            {"n": 2},
            (6, 3),
            {
                "split": (2, 3, 3),
                "reduced": (1,),
                "count": 3,
                "stat_shape": (2, 1, 3),
                "affine_shape": (3,),
                "running_shape": (3,),
                "running_view": (1, 1, 3),
                "merged": (0,),
                "position_dims": (0,),
            },
        ),
        (
            "b... [h w]",
            "h w",
            "",
            {},
            (2, 3, 4, 5),
            {"split": (2, 3, 4, 5), "count": 20, "affine_shape": (4, 5), "affine_view": (1, 1, 4, 5)},
        ),
        ("b... [c]", "c", "", {}, (4,), {"names": ("c",), "count": 4, "stat_shape": (1,), "position_dims": ()}),
        ("[b] c [s...]", "c", "c", {}, (0, 3, 4), {"count": 0, "stat_shape": (1, 3, 1), "running_shape": (3,)}),
    ],
)
def test_layouts_worked_out_by_hand(pattern, affine, running, sizes, shape, expected):
    layout = NormSpec(pattern, affine, running=running, sizes=sizes).layout(shape)
    assert {name: getattr(layout, name) for name in expected} == expected


def test_parse_says_which_axis_stands_where():
    pattern = parse("b (g [c]) [s...]")
    assert pattern.dims == (
        (Axis("b"),),
        (Axis("g"), Axis("c", reduced=True)),
        (Axis("s", reduced=True, many=True),),
    )
    assert [axis.at for axis in pattern.axes] == [0, 3, 6, 11]
    assert [axis.name for axis in pattern.axes] == ["b", "g", "c", "s"]


def test_parse_and_layout_are_made_once():
    assert parse("[b] c") is parse("[b] c")
    spec = NormSpec("[b] c", "c")
    assert spec.layout((4, 3)) is NormSpec("[b] c", "c").layout((4, 3))
    assert spec.layout_uncached((4, 3)) == spec.layout((4, 3))


PARSE_ERRORS = [
    ("", "names at least one axis", 0),
    ("b c", "reduces at least one axis", 0),
    ("[b] c;", "made of axis names", 5),
    ("[b]  1c", "made of axis names", 5),
    ("[b] c..", "made of axis names", 5),
    ("[b] b", "named once; 'b'", 4),
    ("[b] (c b)", "named once; 'b'", 7),
    ("b... [s...]", "Only one axis may have", 6),
    ("b (c [s...])", "cannot stand in parentheses", 6),
    ("[b [c]]", "Brackets do not nest", 3),
    ("[b] ((c d))", "Parentheses do not nest", 5),
    ("[b] c)", "parenthesis was never opened", 5),
    ("[b] ()", "these are empty", 4),
    ("[b] (c", "parenthesis is not closed", 4),
    ("b] c", "bracket was never opened", 1),
    ("[] c", "these are empty", 0),
    ("b [ ] c", "these are empty", 2),
    ("c [b", "bracket is not closed", 2),
    ("(a [b) c]", "must close there", 5),
    ("[a (b] c)", "must close there", 5),
]


@pytest.mark.parametrize(("text", "rule", "at"), PARSE_ERRORS)
def test_a_wrong_pattern_is_answered_with_rule_text_and_caret(text, rule, at):
    with pytest.raises(PatternError) as caught:
        NormSpec(text)
    said, shown, caret = str(caught.value).split("\n")
    assert rule in said
    assert shown == "    " + text
    assert caret == "    " + " " * at + "^"
    assert caught.value.at == at


LIST_ERRORS = [
    ({"affine": "d"}, "has no such axis", "d", 0),
    ({"affine": "[c]"}, "Brackets belong in the pattern", "[c]", 0),
    ({"affine": "c s"}, "with or without `...`", "c s", 2),
    ({"affine": "c..."}, "with or without `...`", "c...", 0),
    ({"affine": "s... c"}, "in the order of the pattern", "s... c", 5),
    ({"running": "b c"}, "'b' is reduced", "b c", 0),
    ({"running": "c x"}, "has no such axis", "c x", 2),
    ({"sizes": {"x": 2}}, "which the pattern does not name", "[b] c [s...]", None),
    ({"sizes": {"s": 2}}, "takes no size", "[b] c [s...]", 7),
    ({"sizes": {"c": 0}}, "positive integer; got c=0", "[b] c [s...]", 4),
    ({"sizes": {"c": 2.0}}, "positive integer; got c=2.0", "[b] c [s...]", 4),
    ({"sizes": {"c": True}}, "positive integer; got c=True", "[b] c [s...]", 4),
]


@pytest.mark.parametrize(("arguments", "rule", "text", "at"), LIST_ERRORS)
def test_wrong_lists_and_sizes(arguments, rule, text, at):
    with pytest.raises(PatternError) as caught:
        NormSpec("[b] c [s...]", **arguments)
    lines = str(caught.value).split("\n")
    assert rule in lines[0]
    assert lines[1] == "    " + text
    assert lines[2:] == ([] if at is None else ["    " + " " * at + "^"])


SHAPE_ERRORS = [
    ("[b] c", {}, (3,), "exactly 2 dimensions; the tensor has 1", None),
    ("[b] c", {}, (3, 4, 5), "exactly 2 dimensions; the tensor has 3", None),
    ("[b]", {}, (3, 4), "exactly 1 dimension; the tensor has 2", None),
    ("[b] c [s...]", {}, (3,), "at least 2 dimensions; the tensor has 1", None),
    ("[b] c", {"c": 4}, (2, 3), "'c' has size 4 by the spec and 3 in the tensor", 4),
    ("b (g [c])", {}, (2, 6), "all but one need a size; give one of g, c", 3),
    ("b (g [c])", {"g": 4}, (2, 6), "size 6 is not divisible by g=4", 3),
    ("b (g [c])", {"g": 2, "c": 2}, (2, 6), "size 6 is not g=2·c=2", 3),
]


@pytest.mark.parametrize(("text", "sizes", "shape", "rule", "at"), SHAPE_ERRORS)
def test_a_shape_that_does_not_fit_is_shown(text, sizes, shape, rule, at):
    with pytest.raises(PatternError) as caught:
        NormSpec(text, sizes=sizes).layout(shape)
    lines = str(caught.value).split("\n")
    assert rule in lines[0]
    assert lines[1] == "    " + text
    assert lines[2:-1] == ([] if at is None else ["    " + " " * at + "^"])
    assert lines[-1] == f"    met shape {shape}"


def test_pattern_error_is_a_value_error_and_survives_pickling():
    with pytest.raises(PatternError) as caught:
        NormSpec("[b] c", sizes={"c": 4}).layout((2, 3))
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is PatternError
    assert str(again) == str(caught.value)
    assert (again.text, again.at, again.shape) == ("[b] c", 4, (2, 3))


@pytest.mark.parametrize(
    ("shape", "mask_shape", "view"),
    [
        ((5, 4, 7, 8), (5,), (5, 1, 1, 1, 1)),
        ((5, 4, 7, 8), (5, 7, 8), (5, 1, 1, 7, 8)),
        ((5, 4, 7, 8), (5, 7), (5, 1, 1, 7, 1)),
        ((5, 4), (5,), (5, 1, 1)),
    ],
)
def test_mask_view_broadcasts_over_the_axes_without_parameters(shape, mask_shape, view):
    layout = NormSpec("b (g [c]) [s...]", "(g c)", sizes={"g": 2}).layout(shape)
    assert layout.mask_view(mask_shape) == view


def test_mask_view_splits_a_split_batch():
    layout = NormSpec("(n [b]) c [s...]", "c", sizes={"n": 2}).layout((6, 3, 4))
    assert layout.mask_view((6,)) == (2, 3, 1, 1)
    assert layout.mask_view((6, 4)) == (2, 3, 1, 4)


@pytest.mark.parametrize("wrong", [(), (4,), (3, 2), (3, 5, 1), (3, 2, 5), (1,)])
def test_mask_of_another_shape_is_refused(wrong):
    layout = NormSpec("[b] c [s...]", "c").layout((3, 2, 5))
    with pytest.raises(ValueError, match=r"its shape is \(3,\) or \(3, 5\)") as caught:
        layout.mask_view(wrong)
    assert f"got {wrong}" in str(caught.value)


def test_a_spec_pickled_by_another_process_is_the_same_key():
    """Strings hash differently in every process; a hash that travelled would miss every cache and every dict."""
    code = (
        "import pickle, sys; from normwright.spec import NormSpec; "
        "sys.stdout.buffer.write(pickle.dumps(NormSpec('b (g [c])', '(g c)', sizes={'g': 2})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    pickled = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    spec = NormSpec("b (g [c])", "(g c)", sizes={"g": 2})
    assert hash(pickle.loads(pickled)) == hash(spec)
    assert {spec: 1}[pickle.loads(pickled)] == 1


def test_specs_are_values():
    spec = NormSpec("b (g [c])", "(g c)", sizes={"g": 2})
    same = NormSpec("b (g [c])", "(g c)", sizes=(("g", 2),))
    assert spec == same
    assert hash(spec) == hash(same)
    assert spec != NormSpec("b (g [c])", "(g c)", sizes={"g": 3})
    assert spec != NormSpec("b (g [c])", "(g c)", center=False, sizes={"g": 2})
    for again in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert again == spec
        assert again.layout((2, 4)) == spec.layout((2, 4))
    with pytest.raises(FrozenInstanceError):
        spec.center = False
    assert repr(spec).startswith("NormSpec(pattern='b (g [c])'")
