"""The table of normalizations against the design, the papers' definitions, and the layers that it names."""

from __future__ import annotations

import re

import pytest
import torch

import normwright as nw
from normwright.catalog import CATALOG, find

IN_NOTATION = [row for row in CATALOG.values() if row.spec is not None]
EXAMPLES = [
    pytest.param(row, shape, sizes, id=f"{row.name}-{'x'.join(map(str, shape))}")
    for row in IN_NOTATION
    for shape, sizes in row.examples
]

# name: pattern, affine, centred, running, as the design's table and the papers have them
DESIGN = {
    "BatchNorm": ("[b] c [s...]", "c", True, "c"),
    "GhostBatchNorm": ("(n [b]) c [s...]", "c", True, "c"),
    "LayerNorm": ("b... [c]", "c", True, ""),
    "RMSNorm": ("b... [c]", "c", False, ""),
    "InstanceNorm": ("b c [s...]", "c", True, "c"),
    "GroupNorm": ("b (g [c]) [s...]", "(g c)", True, ""),
    "ChannelNorm": ("b [c] s...", "c", True, ""),
    "FilterResponseNorm": ("b c [s...]", "c", False, ""),
    "PackedBatchNorm": ("[b] (k c) [s...]", "(k c)", True, "(k c)"),
}


def test_the_table_is_the_design():
    assert {
        row.name: (row.spec.pattern, row.spec.affine, row.spec.center, row.spec.running) for row in IN_NOTATION
    } == DESIGN


def test_rows_say_what_they_are():
    for name, row in CATALOG.items():
        assert row.name == name
        assert row.layers
        assert row.parameters
        assert "y = " in row.formula or "w = " in row.formula or row.formula.startswith(("a batch norm", "mean and"))
        assert row.source == "this project" or re.search(r"\b(19|20)\d\d\b", row.source), name
        for number in re.findall(r"arXiv:(\S+?)(?=[,;) ]|$)", row.source):
            assert re.fullmatch(r"\d{4}\.\d{4,5}", number), name
        assert bool(row.examples) == (row.spec is not None), name


@pytest.mark.parametrize(("name", "layer"), [(row.name, layer) for row in CATALOG.values() for layer in row.layers])
def test_every_layer_of_the_table_is_public(name, layer):
    assert issubclass(getattr(nw, layer), torch.nn.Module)


def test_every_public_twin_stands_in_the_table():
    listed = {layer for row in CATALOG.values() for layer in row.layers}
    for name in nw.__all__:
        layer = getattr(nw, name)
        if isinstance(layer, type) and issubclass(layer, torch.nn.Module) and not name.startswith("Lazy"):
            assert name in listed, f"{name} has no row"


# which values share a statistic: the index of a value (sample, channel, places…) to the name of its statistic, written
# as in the papers and not as in the notation
STATISTIC = {
    "BatchNorm": lambda i, shape, sizes: i[1],
    "GhostBatchNorm": lambda i, shape, sizes: (i[0] // (shape[0] // sizes["n"]), i[1]),
    "LayerNorm": lambda i, shape, sizes: i[:-1],
    "RMSNorm": lambda i, shape, sizes: i[:-1],
    "InstanceNorm": lambda i, shape, sizes: (i[0], i[1]),
    "GroupNorm": lambda i, shape, sizes: (i[0], i[1] // (shape[1] // sizes["g"])),
    "ChannelNorm": lambda i, shape, sizes: (i[0], i[2:]),
    "FilterResponseNorm": lambda i, shape, sizes: (i[0], i[1]),
    "PackedBatchNorm": lambda i, shape, sizes: i[1],
}


@pytest.mark.parametrize(("row", "shape", "sizes"), EXAMPLES)
def test_examples_by_hand(row, shape, sizes):
    """Each value is put into its statistic by its index; the result is compared with `nw.normalize`."""
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    members: dict[object, list[float]] = {}
    keys = {}
    for index in map(tuple, torch.cartesian_prod(*map(torch.arange, shape)).tolist()):
        keys[index] = STATISTIC[row.name](index, shape, sizes)
        members.setdefault(keys[index], []).append(x[index].item())
    truth = torch.empty_like(x)
    for index, key in keys.items():
        values = members[key]
        mean = sum(values) / len(values) if row.spec.center else 0.0
        var = sum((v - mean) ** 2 for v in values) / len(values)
        truth[index] = (x[index].item() - mean) / (var + 1e-5) ** 0.5
    got = nw.normalize(x, row.make(**sizes))
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


def test_make_takes_sizes_and_refuses_rows_outside_the_notation():
    assert CATALOG["GroupNorm"].make(g=8).sizes == (("g", 8),)
    assert CATALOG["GroupNorm"].spec.sizes == ()
    with pytest.raises(nw.PatternError, match="'h', which the pattern does not name"):
        CATALOG["GroupNorm"].make(h=8)
    with pytest.raises(ValueError, match="DyT is outside the notation and has no spec; use the layer DyT"):
        CATALOG["DyT"].make()


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("BatchNorm", ["BatchNorm"]),  # exact, though other rows contain the word
        ("batch_norm", ["BatchNorm"]),
        ("group", ["GroupNorm"]),
        ("BatchNorm2d", ["BatchNorm"]),  # by layer
        ("instance-norm", ["InstanceNorm"]),
        ("evonorm", ["EvoNormB0", "EvoNormS0"]),
        ("nothing", []),
    ],
)
def test_find(word, names):
    assert [row.name for row in find(word)] == names
