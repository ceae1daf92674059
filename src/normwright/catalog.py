"""The table: one row per named normalization.

A normalization that the notation can say is its `spec`, and nothing else: the layers, the reference, the kernels, the
tests and `normwright norms` read it here. Rows without a spec are the layers outside the notation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .spec import NormSpec

__all__ = ["CATALOG", "Row", "find"]


@dataclass(frozen=True)
class Row:
    """One named normalization: its axes, what it learns, its formula and where it comes from."""

    name: str
    spec: NormSpec | None
    parameters: str
    formula: str
    source: str
    layers: tuple[str, ...]  # public classes
    examples: tuple[tuple[tuple[int, ...], dict[str, int]], ...] = ()  # (shape, sizes): what the tests run
    note: str = ""

    def make(self, **sizes: int) -> NormSpec:
        """The spec of this row with the sizes that a shape alone does not decide, for example `g=8`."""
        if self.spec is None:
            raise ValueError(f"{self.name} is outside the notation and has no spec; use the layer {self.layers[0]}.")
        return replace(self.spec, sizes=tuple(sizes.items()))


_STANDARDIZE = "y = (x − mean) / sqrt(var + eps) · weight + bias"

CATALOG: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            "BatchNorm",
            NormSpec("[b] c [s...]", affine="c", running="c"),
            "weight, bias: (c); running_mean, running_var: (c)",
            _STANDARDIZE,
            "Ioffe & Szegedy 2015, arXiv:1502.03167",
            ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
            (((6, 3), {}), ((4, 3, 5), {}), ((4, 3, 5, 2), {}), ((2, 3, 2, 3, 2), {})),
            "Running statistics replace the batch's at evaluation.",
        ),
        Row(
            "GhostBatchNorm",
            NormSpec("(n [b]) c [s...]", affine="c", running="c"),
            "weight, bias: (c); running_mean, running_var: (c)",
            _STANDARDIZE,
            "Hoffer, Hubara & Soudry 2017, arXiv:1705.08741",
            ("GhostBatchNorm",),
            (((6, 3), {"n": 2}), ((6, 3, 4, 2), {"n": 3})),
            "A batch norm within each of n chunks of the batch; running statistics average over the chunks.",
        ),
        Row(
            "LayerNorm",
            NormSpec("b... [c]", affine="c"),
            "weight, bias: (c)",
            _STANDARDIZE,
            "Ba, Kiros & Hinton 2016, arXiv:1607.06450",
            ("LayerNorm",),
            (((5, 8), {}), ((2, 3, 8), {})),
            "With normalized_shape of several dimensions: `b... [d0 d1]`.",
        ),
        Row(
            "RMSNorm",
            NormSpec("b... [c]", affine="c", center=False),
            "weight: (c)",
            "y = x / sqrt(mean(x²) + eps) · weight",
            "Zhang & Sennrich 2019, arXiv:1910.07467",
            ("RMSNorm",),
            (((5, 8), {}), ((2, 3, 8), {})),
        ),
        Row(
            "InstanceNorm",
            NormSpec("b c [s...]", affine="c", running="c"),
            "weight, bias: (c), off by default; running statistics: (c), off by default",
            _STANDARDIZE,
            "Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022",
            ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
            (((3, 4, 6), {}), ((3, 4, 5, 2), {}), ((2, 3, 2, 3, 2), {})),
        ),
        Row(
            "GroupNorm",
            NormSpec("b (g [c]) [s...]", affine="(g c)"),
            "weight, bias: (g·c)",
            _STANDARDIZE,
            "Wu & He 2018, arXiv:1803.08494",
            ("GroupNorm",),
            (((3, 4), {"g": 2}), ((3, 6, 5), {"g": 3}), ((3, 4, 5, 2), {"g": 2})),
        ),
        Row(
            "ChannelNorm",
            NormSpec("b [c] s...", affine="c"),
            "weight, bias: (c)",
            _STANDARDIZE,
            "LayerNorm2d, Liu et al. 2022, arXiv:2201.03545; positional norm, Li et al. 2019, arXiv:1907.04312",
            ("ChannelNorm",),
            (((4, 6), {}), ((2, 6, 3, 2), {})),
            "Layer norm over the channels at every place of an image.",
        ),
        Row(
            "FilterResponseNorm",
            NormSpec("b c [s...]", affine="c", center=False),
            "weight, bias, threshold: (c)",
            "y = max(x / sqrt(mean(x²) + eps) · weight + bias, threshold)",
            "Singh & Krishnan 2020, arXiv:1911.09737",
            ("FilterResponseNorm",),
            (((3, 4, 6), {}), ((3, 4, 5, 2), {})),
            "The thresholded unit max(y, threshold) belongs to the layer.",
        ),
        Row(
            "PackedBatchNorm",
            NormSpec("[b] (k c) [s...]", affine="(k c)", running="(k c)"),
            "weight, bias: (k·c); running_mean, running_var: (k·c)",
            _STANDARDIZE,
            "this project",
            ("Norm",),
            (((6, 6), {"k": 2}), ((4, 6, 3, 2), {"k": 3})),
            "K networks at once, channels concatenated: exactly K independent batch norms.",
        ),
        Row(
            "SyncBatchNorm",
            None,
            "weight, bias: (c); running_mean, running_var: (c)",
            f"{_STANDARDIZE}, mean and var over the batches of all processes",
            "Peng et al. 2018, arXiv:1711.07240",
            ("SyncBatchNorm",),
            note="Or over the micro-batches of an accumulated step, by virtual_sync.",
        ),
        Row(
            "BatchRenorm",
            None,
            "weight, bias: (c); running_mean, running_var: (c); r_max, d_max: ()",
            "y = ((x − mean_B) / sd_B · r + d) · weight + bias, "
            "r = clip(sd_B / sd), d = clip((mean_B − mean) / sd), r and d constant",
            "Ioffe 2017, arXiv:1702.03275",
            ("BatchRenorm",),
        ),
        Row(
            "SplitBatchNorm",
            None,
            "weight, bias: (c); running_mean, running_var: (n, c), one row a split",
            "a batch norm for each of n equal parts of the batch (domains)",
            "auxiliary batch norm, Xie et al. 2020, arXiv:1911.09665",
            ("SplitBatchNorm",),
        ),
        Row(
            "EvoNormB0",
            None,
            "weight, bias, v: (c); running_var: (c)",
            "y = x / max(sqrt(var_B + eps), v·x + sqrt(var_I + eps)) · weight + bias",
            "Liu et al. 2020, arXiv:2004.02967",
            ("EvoNormB0",),
        ),
        Row(
            "EvoNormS0",
            None,
            "weight, bias, v: (c)",
            "y = x · sigmoid(v·x) / sqrt(var_G + eps) · weight + bias",
            "Liu et al. 2020, arXiv:2004.02967",
            ("EvoNormS0",),
        ),
        Row(
            "SwitchNorm",
            None,
            "weight, bias: (c); mean_weight, var_weight: (3); running_mean, running_var: (c)",
            "mean and variance are softmax mixtures of the instance's, the layer's and the batch's",
            "Luo et al. 2018, arXiv:1806.10779",
            ("SwitchNorm",),
        ),
        Row(
            "WeightStandardization",
            None,
            "none of its own (a parametrization of a convolution's or linear layer's weight)",
            "w = (v − mean(v)) / sqrt(var(v) + eps), over each output's inputs",
            "Qiao et al. 2019, arXiv:1903.10520; Brock, De & Smith 2021, arXiv:2101.08692",
            ("WeightStandardization", "ScaledStdConv2d"),
        ),
        Row(
            "DyT",
            None,
            "alpha: (); weight, bias: (c)",
            "y = tanh(alpha · x) · weight + bias",
            "Zhu et al. 2025, arXiv:2503.10622",
            ("DyT",),
        ),
        Row(
            "GRN",
            None,
            "weight, bias: (c)",
            "y = weight · x · g / (mean_c(g) + eps) + bias + x, g = sqrt(sum_s x²)",
            "Woo et al. 2023, arXiv:2301.00808",
            ("GRN",),
        ),
        Row(
            "Whitening",
            None,
            "weight, bias: (c); running_mean: (c); running_covariance: (groups, c/groups, c/groups)",
            "y = S^(−1/2) (x − mean), S the covariance + eps·I, by Newton–Schulz iteration within groups of channels",
            "Huang et al. 2018, arXiv:1804.08450 (DBN); 2019, arXiv:1904.03441 (IterNorm)",
            ("Whitening",),
        ),
        Row(
            "ProbabilityIntegralTransform",
            None,
            "weight, bias: (c); running_quantiles: (c, q)",
            "y = Φ⁻¹(F(x)) · weight + bias, F the channel's distribution function",
            "Rosenblatt 1952, doi:10.1214/aoms/1177729394; rank-based normal scores, van der Waerden 1952",
            ("ProbabilityIntegralTransform",),
        ),
        Row(
            "LocalResponseNorm",
            None,
            "none",
            "y = x / (k + alpha · mean of x² over neighbouring channels)^beta",
            "Krizhevsky, Sutskever & Hinton 2012",
            ("LocalResponseNorm",),
            note="torch's own module under this package's name.",
        ),
    )
}


def find(name: str) -> list[Row]:
    """Rows whose name or layer contains `name`, case ignored."""
    wanted = name.lower().replace("_", "").replace("-", "")
    exact = [row for row in CATALOG.values() if row.name.lower() == wanted]
    return exact or [row for row in CATALOG.values() if any(wanted in word.lower() for word in (row.name, *row.layers))]
