"""Numerics of norms: overflow, statistics in half precision, missing eps, constant channels, cancellation."""

import pytest
import torch
from torch import nn

import normwright as nw


class ByHand(nn.Module):
    """A layer norm or RMS norm by hand, with its choices as arguments."""

    def __init__(self, *, center=True, eps=1e-5, wide=False, one_pass=False, clamp=True):
        super().__init__()
        self.center, self.eps, self.wide, self.one_pass, self.clamp = center, eps, wide, one_pass, clamp

    def forward(self, x):
        h = x.float() if self.wide else x
        mean = h.mean(-1, keepdim=True) if self.center else 0.0
        if self.one_pass:
            var = (h * h).mean(-1, keepdim=True) - mean * mean
            var = var.clamp_min(0) if self.clamp else var
        else:
            var = ((h - mean) * (h - mean)).mean(-1, keepdim=True)
        return ((h - mean) / (var + self.eps).sqrt()).to(x.dtype)


def found(model, inputs=None, **given):
    return nw.diagnose(model, inputs, select=["NW6"], **given).findings


def said(model, inputs=None, **given):
    return [(f.code, f.where, f.severity) for f in found(model, inputs, **given)]


# ----------------------------------------------------------------------------------------------------------- overflow


def test_squares_in_half_precision_overflow_at_256():
    # 100 and its square times 64 values: infinite in float16; 8 is not, and twice 8 neither
    big, small = torch.full((4, 64), 400.0).half(), torch.full((4, 64), 8.0).half()
    noise = torch.randn(4, 64).half()
    assert said(nn.Sequential(ByHand(center=False)), big + noise) == [("NW601", ("0",), "error")]
    assert said(nn.Sequential(ByHand(center=False)), small + noise) == []
    assert said(nn.Sequential(ByHand(center=False, wide=True)), big + noise) == []
    assert said(nn.Sequential(nn.RMSNorm(64).half()), big + noise) == []


def test_a_doubling_from_overflow_is_a_warning():
    x = (150 + torch.randn(4, 64)).half()
    [finding] = found(nn.Sequential(ByHand(center=False)), x)
    assert (finding.code, finding.severity) == ("NW601", "warning")
    assert finding.numbers["overflows at times the input"] == 2


def test_an_input_near_the_end_of_float16_is_measured():
    x = torch.randn(4, 64).half()
    x[0, 0] = 40000.0
    [finding] = found(nn.Sequential(nn.LayerNorm(64).half()), x)
    assert (finding.code, finding.severity) == ("NW601", "warning")
    assert finding.numbers["headroom"] == pytest.approx(65504 / 40000, rel=1e-3)
    x[0, 0] = torch.inf
    assert ("NW601", ("0",), "error") in said(nn.Sequential(nn.LayerNorm(64).half()), x)
    x[0, 0] = 30000.0
    assert said(nn.Sequential(nn.LayerNorm(64).half()), x) == []


def test_bfloat16_has_the_range_of_float32():
    assert said(nn.Sequential(nn.LayerNorm(64).bfloat16()), 1e6 * torch.randn(4, 64).bfloat16()) == []


# -------------------------------------------------------------------------------------------- statistics in half


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_the_shift_by_rounding_is_half_a_unit_of_the_mean(dtype, bits):
    norm = nn.BatchNorm1d(4, eps=0.0, affine=False).to(dtype)
    norm.running_mean.fill_(3 * 2.0**bits)
    norm.running_var.fill_(4.0)
    [finding] = found(nn.Sequential(norm))
    assert (finding.code, finding.severity) == ("NW602", "warning")
    # a mean of 3 · 2^bits lies in a binade whose units are 4: half of one is one deviation of 2
    assert finding.numbers["shift by rounding, deviations"] == pytest.approx(1.0)
    shifted = norm.running_mean.double() + 2
    assert torch.equal(shifted.to(dtype).double() % 4, torch.zeros(4, dtype=torch.float64))


def test_variances_out_of_range_are_an_error():
    norm = nn.BatchNorm1d(4)
    norm.running_var.copy_(torch.tensor([1.0, 1e6, 1e-9, 2.0]))
    [finding] = found(nn.Sequential(norm).half())
    assert (finding.code, finding.severity) == ("NW602", "error")
    assert finding.numbers["variances lost"] == 2
    assert said(nn.Sequential(nn.BatchNorm1d(4)).half()) == []


def test_half_models_with_float32_norms_and_ordinary_half_models_are_silent():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    for _ in range(50):
        model(torch.randn(64, 4) + 1)
    assert said(model.bfloat16(), torch.randn(64, 4).bfloat16()) == []
    model[1].running_mean.fill_(300.0)
    assert said(model) == [("NW602", ("1",), "warning")]
    model[1].float()
    assert said(model) == []


# ---------------------------------------------------------------------------------------------------------------- eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_eps_divides_zero_by_zero(dtype):
    x = torch.randn(8, 16).to(dtype)
    [finding] = found(nn.Sequential(ByHand(eps=0.0)), x)
    assert (finding.code, finding.severity, finding.evidence) == ("NW603", "warning", "proved")
    x[3] = 2.0
    [finding] = found(nn.Sequential(ByHand(eps=0.0)), x)
    assert (finding.code, finding.severity) == ("NW603", "error")
    assert finding.numbers["share not finite"] == pytest.approx(1 / 8)
    assert said(nn.Sequential(ByHand(eps=1e-5)), x) == []


def test_an_eps_that_float16_does_not_hold_is_none():
    x = torch.randn(8, 16).half()
    assert said(nn.Sequential(ByHand(eps=1e-12)), x) == [("NW603", ("0",), "warning")]
    assert said(nn.Sequential(ByHand(eps=1e-12, wide=True)), x) == []
    assert said(nn.Sequential(ByHand(eps=1e-12)), x.float()) == []
    assert said(nn.Sequential(nn.LayerNorm(16, eps=1e-12).half()), x) == []


def test_torch_layers_with_eps_zero_are_run_too():
    assert said(nn.Sequential(nn.LayerNorm(16, eps=0.0)), torch.randn(8, 16)) == [("NW603", ("0",), "warning")]


def test_a_length_without_eps_is_advice():
    class Unit(nn.Module):
        def forward(self, x):
            return x / x.norm(dim=-1, keepdim=True)

    [finding] = found(nn.Sequential(Unit()), torch.randn(8, 16))
    assert (finding.code, finding.severity, finding.evidence) == ("NW603", "advice", "advice")


def test_an_eps_that_underflows_is_no_overflow():
    x = torch.randn(16, 64).half()
    x[3:7] = 0
    [finding] = found(nn.Sequential(ByHand(eps=1e-12)), x)
    assert (finding.code, finding.severity) == ("NW603", "error")
    assert finding.numbers["share not finite"] == pytest.approx(4 / 16)
    # rows of zeros beside rows that overflow, each under its own name
    x[8:] *= 400
    assert {code for code, _, _ in said(nn.Sequential(ByHand(eps=1e-12, center=False)), x)} == {"NW601", "NW603"}
    assert {code for code, _, _ in said(nn.Sequential(ByHand(center=False)), x)} == {"NW601"}


# --------------------------------------------------------------------------------------------------- constant channels


def dead(share):
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.BatchNorm1d(8))
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].weight[: int(8 * share)].neg_()
    return model


def test_a_layer_that_gets_constants_is_a_warning_and_some_channels_are_advice():
    loader = [torch.rand(64, 4) for _ in range(4)]
    [finding] = found(dead(1.0), loader=loader)
    assert (finding.code, finding.severity, finding.evidence) == ("NW604", "warning", "measured")
    assert finding.numbers["batches"] == 4
    [finding] = found(dead(0.5), loader=loader)
    assert (finding.severity, finding.evidence) == ("advice", "advice")
    assert finding.numbers["constant channels"] == 4
    assert said(dead(0.0), loader=loader) == []


def test_one_batch_is_weak_evidence():
    [finding] = found(dead(1.0), torch.rand(64, 4))
    assert (finding.code, finding.severity, finding.evidence) == ("NW604", "advice", "advice")


def test_channels_that_are_constant_in_each_batch_and_differ_between_them_vary():
    loader = [torch.full((64, 4), float(i)) for i in range(4)]
    assert said(nn.Sequential(nn.BatchNorm1d(4)), loader=loader) == []


def test_constant_rows_of_a_layer_norm_are_padding():
    x = torch.randn(8, 5, 16)
    x[:, 3:] = 0
    assert said(nn.Sequential(nn.LayerNorm(16)), x) == []


# ------------------------------------------------------------------------------------------------------- cancellation


def test_one_pass_variance_at_a_large_mean():
    x = torch.randn(16, 64) + 3000
    [finding] = found(nn.Sequential(ByHand(one_pass=True)), x)
    assert (finding.code, finding.severity, finding.evidence) == ("NW605", "error", "measured")
    own, true = ByHand(one_pass=True)(x).double(), torch.nn.functional.layer_norm(x.double(), (64,))
    error = float((own - true).square().mean().sqrt() / true.std())
    assert finding.numbers["error, deviations of the output"] == pytest.approx(error, rel=1e-3)
    assert said(nn.Sequential(ByHand(one_pass=True)), x - 3000) == []
    assert said(nn.Sequential(ByHand()), x) == []
    assert said(nn.Sequential(nn.LayerNorm(64)), x) == []


def test_a_variance_that_comes_out_negative():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) + 8000
    one_pass = ByHand(one_pass=True, clamp=False)
    variance = (x * x).mean(-1) - x.mean(-1).square()
    negative = float((variance + 1e-5 <= 0).double().mean())
    assert 0 < negative < 1
    assert float(x.double().var(-1, correction=0).min()) > 0.5
    [finding] = found(nn.Sequential(one_pass), x)
    assert (finding.code, finding.severity, finding.evidence) == ("NW605", "error", "measured")
    assert finding.numbers["share not finite"] == pytest.approx(negative)
    assert said(nn.Sequential(one_pass), x - 8000) == []
    # constant rows are NW603's where eps is 0, whatever their mean
    y = torch.randn(8, 16)
    y[3] = 4.0
    assert said(nn.Sequential(ByHand(eps=0.0, one_pass=True)), y) == [("NW603", ("0",), "error")]


def test_half_precision_means():
    x = (torch.randn(16, 64) + 100).bfloat16()
    assert [code for code, _, _ in said(nn.Sequential(ByHand()), x)] == ["NW605"]
    assert said(nn.Sequential(ByHand(wide=True)), x) == []
    assert said(nn.Sequential(ByHand()), (x - 100)) == []


# ------------------------------------------------------------------------------------------------------------- healthy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)), (4, 3, 8, 8)),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nw.BatchNorm2d(8, act="relu"), nn.GroupNorm(2, 8)), (4, 3, 8, 8)),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (4, 6, 16)),
        (lambda: nn.Sequential(nn.Linear(16, 16), ByHand(), nn.ReLU()), (4, 6, 16)),
        (lambda: nn.Sequential(nn.Linear(16, 16), ByHand(center=False, eps=1e-6, wide=True)), (4, 6, 16)),
    ],
)
def test_healthy_models_are_silent_in_every_precision(dtype, make, size):
    report = nw.diagnose(make().to(dtype), torch.randn(size).to(dtype), select=["NW6"])
    assert [(f.code, f.message) for f in report.findings] == []
    assert report.not_run == []
