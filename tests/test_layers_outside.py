"""The layers outside the notation: against the NumPy reference, against closed forms, and what all of them keep."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from scipy import integrate, stats
from tolerances import assert_close
from torch import nn

from normwright import reference_outside as ref
from normwright.functional import ACTIVATIONS
from normwright.layers.batch_renorm import BatchRenorm, schedule_batch_renorm
from normwright.layers.dyt import DyT
from normwright.layers.evonorm import EvoNormB0, EvoNormS0
from normwright.layers.grn import GRN
from normwright.layers.probability_integral import ProbabilityIntegralTransform
from normwright.layers.split_batch_norm import SplitBatchNorm
from normwright.layers.switch_norm import SwitchNorm
from normwright.layers.weight_standardization import (
    ScaledStdConv2d,
    WeightStandardization,
    activation_gain,
    standardize_weights,
)
from normwright.layers.whitening import Whitening

PIT = ProbabilityIntegralTransform
C = 6
SHAPES = [(8, C), (4, C, 5), (4, C, 3, 4), (4, C, 2, 3, 2)]


@dataclass
class Case:
    """One layer: how to build it, and how the reference computes it from the module's own parameters and buffers."""

    make: Any
    forward: Any  # (x, parameters and buffers as arrays, training) -> (y, cache)
    backward: Any
    running: tuple[str, ...] = ()
    shapes: list[tuple[int, ...]] = field(default_factory=lambda: SHAPES)
    condition: float = 1.0  # of what float32 amplifies


CASES = {
    "BatchRenorm": Case(
        lambda **k: BatchRenorm(C, eps=1e-3, r_max=1.2, d_max=0.4, **k),
        lambda x, a, t: ref.batch_renorm_forward(
            x, a["weight"], a["bias"], running_mean=a["running_mean"], running_var=a["running_var"],
            rmax=float(a["r_max"]), dmax=float(a["d_max"]), eps=1e-3, use_batch_stats=t),
        ref.batch_renorm_backward,
        ("running_mean", "running_var"),
    ),
    "SplitBatchNorm": Case(
        lambda **k: SplitBatchNorm(C, 2, eps=1e-3, **k),
        lambda x, a, t: ref.split_batch_norm_forward(
            x, a["weight"], a["bias"], splits=2, split=1, running_mean=a["running_mean"],
            running_var=a["running_var"], eps=1e-3, use_batch_stats=t),
        ref.split_batch_norm_backward,
        ("running_mean", "running_var"),
    ),
    "EvoNormB0": Case(
        lambda **k: EvoNormB0(C, eps=1e-3, **k),
        lambda x, a, t: ref.evonorm_b0_forward(
            x, a["v"], a["weight"], a["bias"], running_var=a["running_var"], eps=1e-3, use_batch_stats=t),
        ref.evonorm_b0_backward,
        ("running_var",),
    ),
    "EvoNormS0": Case(
        lambda **k: EvoNormS0(C, 3, eps=1e-3, **k),
        lambda x, a, t: ref.evonorm_s0_forward(x, a["v"], a["weight"], a["bias"], groups=3, eps=1e-3),
        ref.evonorm_s0_backward,
        condition=30.0,
    ),
    "SwitchNorm": Case(
        lambda **k: SwitchNorm(C, eps=1e-3, **k),
        lambda x, a, t: ref.switch_norm_forward(
            x, a["mean_weight"], a["var_weight"], a["weight"], a["bias"], running_mean=a["running_mean"],
            running_var=a["running_var"], eps=1e-3, use_batch_stats=t),
        ref.switch_norm_backward,
        ("running_mean", "running_var"),
        shapes=SHAPES[1:],
    ),
    "DyT": Case(
        lambda **k: DyT(C, channel_dim=1, **k),
        lambda x, a, t: ref.dyt_forward(x, a["alpha"], a["weight"], a["bias"], channel=1),
        ref.dyt_backward,
    ),
    "GRN": Case(
        lambda **k: GRN(C, **k),
        lambda x, a, t: ref.grn_forward(x, a["weight"], a["bias"]),
        ref.grn_backward,
    ),
    "Whitening": Case(
        lambda **k: Whitening(C, 3, eps=1e-2, **k),
        lambda x, a, t: ref.whitening_forward(
            x, a["weight"], a["bias"], groups=3, running_mean=a["running_mean"],
            running_covariance=a["running_covariance"], eps=1e-2, use_batch_stats=t),
        ref.whitening_backward,
        ("running_mean", "running_covariance"),
        condition=30.0,
    ),
}  # fmt: skip
MAKE = {name: case.make for name, case in CASES.items()} | {"PIT": lambda **k: PIT(C, 4, **k)}
TRACKING = ["BatchRenorm", "SplitBatchNorm", "EvoNormB0", "SwitchNorm", "Whitening", "PIT"]
TAKES_ACT = ["BatchRenorm", "SplitBatchNorm", "SwitchNorm", "Whitening", "PIT"]


def build(name, dtype=torch.float32, **kwargs):
    """The layer with parameters and running statistics off their initial values."""
    torch.manual_seed(1)
    layer = MAKE[name](**kwargs).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.4 * torch.randn_like(p))
        for key, b in layer.named_buffers():
            if key == "running_covariance":
                a = torch.randn_like(b)
                b.copy_(a @ a.mT / 2 + 0.5 * torch.eye(b.size(-1)))
            elif key == "running_quantiles":
                b.copy_((1.5 * b + 0.2 * torch.rand_like(b)).sort(1).values)
            elif key.startswith("running"):
                b.add_(0.5 * torch.rand_like(b))
    if name == "SplitBatchNorm":
        layer.split = 1
    return layer


def make_x(shape, dtype=torch.float32, channels_last=False, seed=2):
    g = torch.Generator().manual_seed(seed)
    x = 0.5 + 1.5 * torch.randn(shape, generator=g, dtype=torch.float64)
    x = x + 0.5 * x.roll(1, 1)  # correlated channels
    x = x.to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x


def arrays(layer):
    return {k: v.detach().to(torch.float64).numpy().copy() for k, v in layer.state_dict().items()}


def gradient_of(cache_grads, name):
    return cache_grads["dalpha" if name == "alpha" else f"d{name}"]


# --- against the reference


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_reference_float64(name, training):
    case = CASES[name]
    for shape in case.shapes:
        for channels_last in (False, True)[: 1 + (len(shape) > 3)]:
            layer = build(name, torch.float64).train(training)
            x = make_x(shape, torch.float64, channels_last).requires_grad_()
            before = arrays(layer)
            truth, cache = case.forward(x.detach().numpy(), before, training)
            y = layer(x)
            dy = torch.randn_like(y)
            y.backward(dy)
            grads = case.backward(dy.numpy(), cache)

            def close(actual, wanted, what, shape=shape):
                scale = np.abs(wanted).max()
                np.testing.assert_allclose(
                    actual.detach().numpy(), wanted, rtol=1e-9, atol=1e-9 * scale, err_msg=f"{what} {shape}"
                )

            close(y, truth, "y")
            close(x.grad, grads["dx"], "dx")
            for key, p in layer.named_parameters():
                close(p.grad, gradient_of(grads, key), key)
            after = dict(layer.named_buffers())
            for key in case.running:
                wanted = getattr(cache, key) if training else before[key]
                close(after[key], np.reshape(wanted, after[key].shape), key)
            if case.running:
                assert int(layer.num_batches_tracked) == int(training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_reference_lower_precision(name, dtype, training):
    """Half types with float32 parameters: statistics in float32, output and gradient in the input's type."""
    case = CASES[name]
    shape = case.shapes[-2]
    layer = build(name).train(training)
    x = make_x(shape, dtype).requires_grad_()
    truth, cache = case.forward(x.detach().double().numpy(), arrays(layer), training)
    y = layer(x)
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad.dtype == dtype
    grads = case.backward(dy.double().numpy(), cache)
    n = math.prod(shape)
    assert_close(y, truth, n, condition=case.condition, what="y")
    assert_close(x.grad, grads["dx"], n, condition=case.condition, what="dx")
    for key, p in layer.named_parameters():
        assert p.grad.dtype == torch.float32
        # the gradient of h is rounded to x's type where h is, so parameters see that type's precision
        assert_close(p.grad, gradient_of(grads, key), n, dtype=dtype, condition=case.condition, what=key)
    for key in case.running if training else ():
        buffer = getattr(layer, key)
        assert buffer.dtype == torch.float32
        assert_close(buffer, np.reshape(getattr(cache, key), buffer.shape), n, what=key)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MAKE)
def test_half_input_is_rounded_once(name, training):
    """What float32 computes from the same values, rounded to the input's type."""
    for dtype in (torch.bfloat16, torch.float16):
        x = make_x((4, C, 3, 4), dtype)
        y = build(name).train(training)(x)
        wanted = build(name).train(training)(x.float()).to(dtype)
        # torch's own kernels may order their sums otherwise for half types
        within = torch.finfo(dtype).eps if name in ("BatchRenorm", "SplitBatchNorm") else 0.0
        torch.testing.assert_close(y, wanted, rtol=within, atol=0.0)


def test_probability_integral_at_a_large_mean_in_float32():
    x = (torch.randn(20_000, 1) + 3000).requires_grad_()
    layer, exact = PIT(1, momentum=1.0), PIT(1, momentum=1.0).double()
    assert (layer(x) - exact(x.double())).abs().max() < 1e-5
    assert (layer.running_quantiles - exact.running_quantiles).abs().max() < 3e-4  # rounding of 3000


@pytest.mark.parametrize("name", ["BatchRenorm", "EvoNormB0", "SwitchNorm", "EvoNormS0", "Whitening"])
def test_large_mean_in_float32(name):
    """Mean 3000, deviation 1: no variance in one pass."""
    case = CASES[name]
    layer = build(name)
    x = make_x((16, C, 6, 5)) + 3000
    truth, _ = case.forward(x.double().numpy(), arrays(layer), True)
    assert_close(layer(x), truth, x.numel() // C, condition=3000 * case.condition**0.5, what=name)


def pit_reference(x, knots, bandwidth, eps, q, training=True):
    """The transform written as its docstring, one channel and one value at a time."""
    n = len(x)
    if training:
        s = np.sort(x)
        knots = np.array([s[j * n // q : -(-(j + 1) * n // q)].mean() for j in range(q)])
    m, sd = knots.mean(), math.sqrt(knots.var() + eps)
    k = (knots - m) / sd
    p = (1 / (1 + np.exp(-np.clip((k[:, None] - k[None, :]) / bandwidth, -700, 700)))).mean(1)
    z = stats.norm.ppf(p)
    y = np.interp((x - m) / sd, k, z)
    low, high = (min((z[j + 1] - z[j]) / (k[j + 1] - k[j]), 1.0) for j in (0, q - 2))
    u = (x - m) / sd
    y = np.where(u < k[0], z[0] + low * (u - k[0]), y)
    return np.where(u > k[-1], z[-1] + high * (u - k[-1]), y), knots


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(96, C), (12, C, 7), (8, C, 5, 4), (8, C, 2, 3, 2)], ids=str)
def test_probability_integral_against_numpy(shape, training):
    layer = PIT(C, 9, eps=1e-3, bandwidth=0.03).double().train(training)
    layer.running_quantiles.copy_(2 * layer.running_quantiles + 0.1)
    x = make_x(shape, torch.float64) ** 3
    before = layer.running_quantiles.clone()
    y = layer(x)
    for c in range(C):
        column = x[:, c].reshape(-1).numpy()
        wanted, knots = pit_reference(column, before[c].numpy(), 0.03, 1e-3, 9, training)
        np.testing.assert_allclose(y[:, c].detach().reshape(-1).numpy(), wanted, rtol=1e-9, atol=1e-9)
        new = 0.9 * before[c].numpy() + 0.1 * knots if training else before[c].numpy()
        np.testing.assert_allclose(layer.running_quantiles[c].numpy(), new, rtol=1e-12, atol=1e-12)
    single = copy.deepcopy(layer).float()
    single.running_quantiles.copy_(before)
    assert_close(single(x.float()), y, x.numel() // C, condition=30.0)


# --- what all of them keep


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MAKE)
def test_channels_last_stays(name, training):
    for shape, last in (((4, C, 3, 4), torch.channels_last), ((4, C, 2, 3, 2), torch.channels_last_3d)):
        first, second = build(name).train(training), build(name).train(training)
        a = make_x(shape).requires_grad_()
        b = make_x(shape, channels_last=True).requires_grad_()
        ya, yb = first(a), second(b)
        assert ya.is_contiguous()
        assert yb.is_contiguous(memory_format=last)
        dy = torch.randn(shape)
        ya.backward(dy)
        yb.backward(dy.contiguous(memory_format=last))
        assert b.grad.is_contiguous(memory_format=last)
        # piecewise and iterated functions amplify the order of sums a little
        torch.testing.assert_close(ya, yb, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_strided_and_expanded(name):
    """Views and the expanded gradient of a sum are ordinary tensors."""
    layer, same = build(name).double(), build(name).double()
    base = make_x((8, 2 * C, 3, 4), torch.float64).requires_grad_()
    clone = base.detach()[::2, ::2].clone().requires_grad_()
    y = layer(base[::2, ::2])
    y.sum().backward()
    wanted = same(clone)
    wanted.backward(torch.ones_like(wanted))
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(base.grad[::2, ::2], clone.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MAKE)
def test_empty_input(name, training):
    for shape in ((0, C, 3, 4), (4, C, 0, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            layer = build(name).train(training)
            before = copy.deepcopy(layer.state_dict())
            x = torch.empty(shape, dtype=dtype, requires_grad=True)
            y = layer(x)
            assert y.shape == x.shape
            assert y.dtype == dtype
            y.sum().backward()
            assert x.grad.shape == x.shape
            for p in layer.parameters():
                assert torch.equal(p.grad, torch.zeros_like(p))
            for key, value in layer.state_dict().items():
                wanted = before[key] + int(training) if key == "num_batches_tracked" else before[key]
                assert torch.equal(value, wanted), key


@pytest.mark.parametrize("name", MAKE)
def test_state_copies_and_pickles(name):
    layer = build(name).eval()
    x = make_x((4, C, 3, 4))
    fresh = MAKE[name]().eval()
    if name == "SplitBatchNorm":
        fresh.split = 1
    assert not torch.equal(fresh(x), layer(x))
    assert not fresh.load_state_dict(layer.state_dict()).missing_keys
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)
        assert {p.data_ptr() for p in other.parameters()}.isdisjoint(p.data_ptr() for p in layer.parameters())


@pytest.mark.parametrize("name", MAKE)
def test_reset_parameters(name):
    layer = build(name)
    layer(make_x((4, C, 3, 4)))
    layer.reset_parameters()
    fresh = MAKE[name]()
    for key, value in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key


def test_initial_values():
    """The identity of each before training: what a fresh layer means."""
    x = make_x((4, C, 3, 4))
    assert torch.equal(GRN(C)(x), x)
    assert torch.equal(DyT(C, channel_dim=1)(x), torch.tanh(0.5 * x))
    for layer in (BatchRenorm(C, eps=0), SplitBatchNorm(C, eps=0), Whitening(C, eps=0)):
        torch.testing.assert_close(layer.eval()(x), x, rtol=1e-5, atol=1e-5)
    # normal data of mean 0 and deviation 1 is left alone but for the knots' resolution
    z = torch.randn(4000, 1)
    assert (PIT(1).eval()(z) - z)[z.abs() < 2].abs().max() < 0.03


@pytest.mark.parametrize("name", MAKE)
def test_repr_says_the_arguments(name):
    layer = MAKE[name]()
    text = layer.extra_repr()
    assert text.startswith(f"{C}, ")
    for word in layer._shown:
        assert f"{word}={getattr(layer, word)!r}" in text
    if name in TAKES_ACT:
        assert MAKE[name](act="gelu").extra_repr().startswith(text.partition(", r_max")[0])
        assert "act='gelu'" in MAKE[name](act="gelu").extra_repr()


def test_repr_in_full():
    assert repr(Whitening(8, 2)) == ("Whitening(8, num_groups=2, eps=1e-05, momentum=0.1, affine=True, iterations=20)")
    assert repr(BatchRenorm(8, act="relu")) == (
        "BatchRenorm(8, eps=1e-05, momentum=0.1, affine=True, act='relu', r_max=3, d_max=5)"
    )
    assert repr(GRN(8)) == "GRN(8, eps=1e-06)"


@pytest.mark.parametrize("name", MAKE)
def test_device_and_dtype(name):
    layer = MAKE[name](device="meta", dtype=torch.float64)
    for key, value in layer.state_dict().items():
        assert value.device.type == "meta"
        assert value.dtype == (torch.long if key == "num_batches_tracked" else torch.float64), key


@pytest.mark.parametrize("name", [name for name in MAKE if name != "GRN"])
def test_without_affine(name):
    plain, affine = MAKE[name](affine=False), MAKE[name]()
    assert plain.weight is None
    assert plain.bias is None
    x = make_x((4, C, 3, 4))
    torch.testing.assert_close(plain(x), affine(x))  # weight 1, bias 0
    assert set(affine.state_dict()) - set(plain.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TAKES_ACT)
def test_act(name, training):
    x = make_x((4, C, 3, 4))
    plain = build(name).train(training)(x)
    for act, f in ACTIVATIONS.items():
        torch.testing.assert_close(build(name, act=act).train(training)(x), f(plain))


@pytest.mark.parametrize("name", TRACKING)
def test_running_statistics_move_only_in_training(name):
    x = make_x((4, C, 3, 4))
    layer = build(name).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), before.values(), strict=True))
    with torch.inference_mode():
        layer.train()(x)
    after = layer.state_dict()
    assert int(after["num_batches_tracked"]) == 1
    for key in before:
        if key.startswith("running"):
            assert not torch.equal(after[key], before[key]), key
    frozen = build(name, momentum=0.0)
    start = copy.deepcopy(frozen.state_dict())
    frozen(x)
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, start[key] + (key == "num_batches_tracked")), key


@pytest.mark.parametrize("name", TRACKING)
def test_momentum_none_is_the_average(name):
    """Cumulative average = mean of what one batch alone leaves with momentum 1."""
    batches = [make_x((4, C, 3, 4), seed=s) for s in range(5)]
    layer = MAKE[name](momentum=None)
    singles = [MAKE[name](momentum=1.0) for _ in batches]
    for single, x in zip(singles, batches, strict=True):
        layer(x)
        single(x)
    for key, value in layer.named_buffers():
        if key.startswith("running"):
            wanted = torch.stack([dict(single.named_buffers())[key] for single in singles]).mean(0)
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert int(layer.num_batches_tracked) == 5


def gradcheck_layer(name):
    if name != "BatchRenorm":
        extra = {"momentum": 0.0} if name in TRACKING else {}
        return build(name, torch.float64, **extra)
    # differences see r and d move, the gradient by definition does not; where both are clipped they agree
    layer = build(name, torch.float64, momentum=0.0)
    layer.running_mean.fill_(50.0)
    layer.running_var.fill_(1e-4)
    return layer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MAKE)
def test_gradcheck_first_and_second_order(name, training):
    layer = gradcheck_layer(name).train(training)
    x = make_x((4, C, 3) if name != "PIT" else (6, C, 3), torch.float64).requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    names = [n for n, _ in layer.named_parameters()]

    def f(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *parameters), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_compile(name):
    x = make_x((4, C, 3, 4)).requires_grad_()
    for training in (True, False):
        eager, compiled = build(name).train(training), build(name).train(training)
        torch._dynamo.reset()
        run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        dy = torch.randn(4, C, 3, 4)
        results = []
        for f, layer in ((eager, eager), (run, compiled)):
            y = f(x)
            grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
            results.append([y, *grads, *layer.buffers()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_limits_change_without_recompiling():
    torch._dynamo.reset()
    layer = build("BatchRenorm")
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(layer, fullgraph=True, backend=counter)
    x = make_x((4, C, 3, 4))
    for step in (0, 10, 20):
        schedule_batch_renorm(layer, step, start=5, r_end=15, d_end=15)
        run(x)
    assert counter.frame_count == 1


# --- what they refuse


@pytest.mark.parametrize("name", MAKE)
def test_wrong_input_is_answered(name):
    layer = build(name)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"num_features=6.*got (shape )?\(4, 5, 3\)"):
        layer(torch.randn(4, 5, 3))
    with pytest.raises(ValueError, match=r"got (shape )?\(6,\)"):
        layer(torch.randn(6))
    with pytest.raises(ValueError, match=r"floating input; got torch.int64. Convert it with x.float\(\)"):
        layer(torch.ones(4, C, 3, dtype=torch.long))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", TRACKING)
def test_one_value_per_channel(name):
    layer = build(name)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2 if name == "SplitBatchNorm" else 1, C, 1)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.* got an input of shape .*larger batch"):
        layer(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert layer.eval()(x).isfinite().all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BatchRenorm(0), "positive integer; got 0"),
        (lambda: GRN(2.0), "positive integer; got 2.0"),
        (lambda: GRN(2, eps=-1.0), "not negative; got -1.0"),
        (lambda: BatchRenorm(4, momentum=1.5), "from 0 to 1, or None .*got 1.5"),
        (lambda: BatchRenorm(4, r_max=0.5), "r_max is at least 1.*got r_max=0.5"),
        (lambda: BatchRenorm(4, d_max=-1), "d_max at least 0.*d_max=-1"),
        (lambda: BatchRenorm(4, act="swish"), "act is None or one of"),
        (lambda: SplitBatchNorm(4, 0), "num_splits is the number of parts.*got 0"),
        (lambda: EvoNormS0(48), "num_groups=32 for num_features=48. Give a divisor of 48"),
        (lambda: Whitening(8, 3), "num_groups=3 for num_features=8"),
        (lambda: Whitening(8, iterations=0), "at least 1; got 0"),
        (lambda: PIT(8, 1), "at least 2; got 1"),
        (lambda: PIT(8, bandwidth=0), "positive part.*got 0"),
        (lambda: schedule_batch_renorm(BatchRenorm(4), 3, start=10, r_end=5), "got start=10, r_end=5"),
    ],
)
def test_wrong_arguments_are_answered(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_split_and_group_errors():
    layer = SplitBatchNorm(4, 3)
    with pytest.raises(ValueError, match=r"num_splits=3 equal parts; got 8 samples. Drop the last batch"):
        layer(torch.randn(8, 4))
    layer.split = 3
    with pytest.raises(ValueError, match=r"one of 3 domains, 0 to 2; got 3"):
        layer.eval()(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"more than 1 value per sample and group; got .* in 4 groups"):
        EvoNormS0(4, 4)(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"places for the instance's statistics; got \(8, 4\)"):
        SwitchNorm(4)(torch.randn(8, 4))


# --- batch renormalization


def test_batch_renorm_without_correction_is_batch_norm():
    ours, torchs = BatchRenorm(C, r_max=1, d_max=0).double(), nn.BatchNorm2d(C).double()
    with torch.no_grad():
        torchs.weight.uniform_(0.5, 2)
        torchs.bias.normal_()
    ours.load_state_dict(torchs.state_dict(), strict=False)
    for seed in range(3):
        x = make_x((4, C, 3, 4), torch.float64, seed=seed)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = ours(a), torchs(b)
        torch.testing.assert_close(ya, yb, rtol=1e-12, atol=1e-12)
        ya.square().sum().backward()
        yb.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours.running_var, torchs.running_var)
    torch.testing.assert_close(ours.weight.grad, torchs.weight.grad)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_batch_renorm_unclipped_trains_as_it_evaluates():
    layer = build("BatchRenorm", torch.float64)
    layer.set_limits(1e6, 1e6)
    x = make_x((4, C, 3, 4), torch.float64)
    evaluated = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), evaluated, rtol=1e-12, atol=1e-12)


def test_batch_renorm_schedule():
    model = nn.Sequential(nn.Linear(4, 4), BatchRenorm(4), nn.Sequential(BatchRenorm(4)))
    assert schedule_batch_renorm(model, 0) == (1.0, 0.0)
    assert schedule_batch_renorm(model, 5_000) == (1.0, 0.0)
    assert schedule_batch_renorm(model, 15_000) == pytest.approx((1 + 2 * 10 / 35, 2.5))
    assert float(model[2][0].d_max) == 2.5
    assert float(model[1].r_max) == pytest.approx(1 + 2 * 10 / 35)
    assert schedule_batch_renorm(model, 10**6) == (3.0, 5.0)
    fresh = BatchRenorm(4, r_max=1, d_max=0)
    fresh.load_state_dict(model[1].state_dict())  # the schedule survives a checkpoint
    assert (float(fresh.r_max), float(fresh.d_max)) == (3.0, 5.0)


# --- split batch norm


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_split_batch_norm_is_a_batch_norm_per_chunk(shared):
    layer = SplitBatchNorm(C, 3, shared_affine=shared).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    norms = [nn.BatchNorm2d(C).double() for _ in range(3)]
    for i, norm in enumerate(norms):
        norm.weight.data.copy_(layer.weight if shared else layer.weight[i])
        norm.bias.data.copy_(layer.bias if shared else layer.bias[i])
    for seed in range(2):
        x = make_x((6, C, 3, 4), torch.float64, seed=seed) * torch.arange(1, 7).view(6, 1, 1, 1)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = layer(a)
        wanted = torch.cat([norm(part) for norm, part in zip(norms, b.chunk(3), strict=True)])
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
        y.pow(3).sum().backward()
        wanted.pow(3).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-9)
    grads = torch.stack([norm.weight.grad for norm in norms])
    torch.testing.assert_close(layer.weight.grad, grads.sum(0) if shared else grads, rtol=1e-8, atol=1e-9)
    layer.eval()
    for i, norm in enumerate(norms):
        torch.testing.assert_close(layer.running_mean[i], norm.running_mean)
        torch.testing.assert_close(layer.running_var[i], norm.running_var)
        layer.split = i
        torch.testing.assert_close(layer(x), norm.eval()(x))


def test_split_batch_norm_loads_a_batch_norm():
    norm = nn.BatchNorm1d(C)
    norm(make_x((8, C)))
    norm.weight.data.uniform_(0.5, 2)
    state = norm.state_dict()
    x = make_x((8, C), seed=9)
    for shared in (True, False):
        layer = SplitBatchNorm(C, 3, shared_affine=shared)
        layer.load_state_dict(state)
        for layer.split in range(3):
            torch.testing.assert_close(layer.eval()(x), norm.eval()(x))
    assert state["running_mean"].shape == (C,)  # the caller's dict is as it was
    with pytest.raises(RuntimeError, match="size mismatch"):
        SplitBatchNorm(C + 1, 3).load_state_dict(state)


def test_split_batch_norm_residual_and_mask():
    layer = SplitBatchNorm(C, 2, act="relu").double()
    x, residual = make_x((8, C, 5), torch.float64), make_x((8, C, 5), torch.float64, seed=3)
    mask = torch.rand(8, 5) > 0.3
    y = layer(x, residual, mask)
    for part in (slice(0, 4), slice(4, 8)):
        valid = x[part].transpose(1, 2)[mask[part]]  # (values, C)
        h = F.batch_norm(valid, None, None, training=True)
        wanted = torch.relu(h + residual[part].transpose(1, 2)[mask[part]])
        torch.testing.assert_close(y[part].transpose(1, 2)[mask[part]], wanted)
        assert not y[part].transpose(1, 2)[~mask[part]].any()


# --- EvoNorm and switchable norm


def test_evonorm_by_hand():
    x = torch.tensor([[[1.0, 3.0]], [[-1.0, 5.0]]], dtype=torch.float64)  # var_B = 5, var_I = 1 and 9
    layer = EvoNormB0(1, eps=0.0, momentum=1.0).double()
    wanted = [[1 / math.sqrt(5), 3 / 4], [-1 / math.sqrt(5), 5 / 8]]
    torch.testing.assert_close(layer(x), torch.tensor(wanted, dtype=torch.float64).view(2, 1, 2))
    torch.testing.assert_close(layer.running_var, torch.tensor([20 / 3], dtype=torch.float64))
    s0 = EvoNormS0(1, 1, eps=0.0).double()
    wanted = [[1 / (1 + math.exp(-1)), 3 / (1 + math.exp(-3))], [-1 / (1 + math.e) / 3, 5 / (1 + math.exp(-5)) / 3]]
    torch.testing.assert_close(s0(x), torch.tensor(wanted, dtype=torch.float64).view(2, 1, 2))


def test_switch_norm_concentrated_is_each_of_the_three():
    x = make_x((4, C, 3, 4), torch.float64)
    wanted = [
        F.instance_norm(x),
        F.layer_norm(x, x.shape[1:]),
        F.batch_norm(x, None, None, training=True),
    ]
    for k in range(3):
        layer = SwitchNorm(C).double()
        with torch.no_grad():
            layer.mean_weight.fill_(-1e3)[k] = 0
            layer.var_weight.fill_(-1e3)[k] = 0
        torch.testing.assert_close(layer(x), wanted[k], rtol=1e-10, atol=1e-10)
    # the last was the batch's: at evaluation it is batch norm's
    norm = nn.BatchNorm2d(C).double()
    norm(x)
    torch.testing.assert_close(layer.eval()(x), norm.eval()(x))


# --- DyT and GRN


def test_dyt_closed_form():
    layer = DyT(3, alpha_init=0.7)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        layer.bias.copy_(torch.tensor([0.0, 0.5, 1.0]))
    x = torch.tensor([[0.0, 1.0, -2.0], [50.0, -50.0, 0.1]])
    wanted = [[0.0, 2 * math.tanh(0.7) + 0.5, math.tanh(1.4) + 1.0], [1.0, -1.5, 1.0 - math.tanh(0.07)]]
    torch.testing.assert_close(layer(x), torch.tensor(wanted))
    first = DyT(3, 0.7, channel_dim=1)
    first.load_state_dict(layer.state_dict())
    torch.testing.assert_close(first(x.t().reshape(1, 3, 2)), layer(x).t().reshape(1, 3, 2))


def test_grn_by_hand():
    layer = GRN(2, eps=0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.0, -1.0]))
    x = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])  # g = 5 and 1, their mean 3
    wanted = torch.tensor([[[3 + 5.0, 4 + 20 / 3], [-1.0, 1 + 2 / 3 - 1]]])
    torch.testing.assert_close(layer(x), wanted)


def test_grn_of_a_dead_channel_has_finite_derivatives():
    layer = build("GRN", torch.float64)
    x = make_x((2, C, 4), torch.float64)
    x[:, 0] = 0.0
    x[1] = 0.0
    x.requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all()
    assert second.isfinite().all()


# --- weight standardization


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 8)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
        (nn.Linear(5, 3), (2, 5)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_weight_standardization_against_reference(layer, x):
    layer = layer.double()
    plain = copy.deepcopy(layer)
    v = layer.weight.detach().numpy().copy()
    names = standardize_weights(nn.Sequential(layer), (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear), eps=1e-3)
    assert names == ["0"]
    truth, cache = ref.weight_standardization_forward(v, eps=1e-3)
    np.testing.assert_allclose(layer.weight.detach().numpy(), truth, rtol=1e-9, atol=1e-12)
    dw = torch.randn_like(layer.weight)
    layer.weight.backward(dw)
    raw = layer.parametrizations.weight.original
    wanted = ref.weight_standardization_backward(dw.numpy(), cache)["dv"]
    np.testing.assert_allclose(raw.grad.numpy(), wanted, rtol=1e-9, atol=1e-9)
    # the layer computes with the standardized weight
    data = torch.randn(x, dtype=torch.float64)
    plain.weight.data.copy_(torch.from_numpy(truth))
    torch.testing.assert_close(layer(data), plain(data))


def test_standardize_weights_chooses_layers():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 3, padding=1)),
        nn.ConvTranspose2d(8, 8, 2),
        nn.Linear(8, 8),
        ScaledStdConv2d(8, 8, 3),
    )
    with pytest.raises(ValueError, match=r"got a weight of shape \(8, 1, 1, 1\) in '1.0'; name it in skip="):
        standardize_weights(model)
    assert type(model[0]) is nn.Conv2d  # all or none
    with pytest.raises(ValueError, match=r"none called '1.7'"):
        standardize_weights(model, skip=("1.7",))
    with pytest.raises(TypeError, match="got ConvTranspose2d"):
        standardize_weights(model, (nn.ConvTranspose2d,))
    assert standardize_weights(model, skip=("1.0",)) == ["0", "1.1"]
    assert standardize_weights(model, skip=("1.0",)) == []  # a second time changes nothing
    assert len(model[0].parametrizations.weight) == 1
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(other[0](x), model[0](x))
    model[0].weight = torch.full((8, 3, 3, 3), 2.0)  # assigning sets v
    assert torch.equal(model[0].parametrizations.weight.original, torch.full((8, 3, 3, 3), 2.0))
    assert not model[0].weight.any()


def test_weight_standardization_types_and_second_order():
    layer = WeightStandardization(eps=1e-3)
    assert repr(layer) == "WeightStandardization(eps=0.001)"
    v = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, v)
    assert torch.autograd.gradgradcheck(layer, v)
    half = (100 + torch.randn(4, 64)).bfloat16()
    truth, _ = ref.weight_standardization_forward(half.double().numpy(), eps=1e-3)
    assert_close(layer(half), truth, 64, condition=100)


@pytest.mark.parametrize("kwargs", [{}, {"groups": 2, "stride": 2, "padding": 1, "padding_mode": "reflect"}], ids=str)
def test_scaled_std_conv(kwargs):
    layer = ScaledStdConv2d(4, 6, 3, gamma="relu", eps=1e-4, gain_init=0.5, **kwargs).double()
    assert torch.equal(layer.gain, torch.full((6, 1, 1, 1), 0.5))
    layer.gain.data.normal_()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    scale = math.sqrt(2 / (1 - 1 / math.pi)) / math.sqrt(layer.weight[0].numel())
    truth, cache = ref.weight_standardization_forward(
        layer.weight.detach().numpy(), layer.gain.detach().flatten().numpy(), scale=scale, eps=1e-4
    )
    plain = nn.Conv2d(4, 6, 3, **kwargs).double()
    plain.weight.data.copy_(torch.from_numpy(truth))
    plain.bias.data.copy_(layer.bias.data)
    y, wanted = layer(x), plain(x)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    y.square().sum().backward()
    wanted.square().sum().backward()
    grads = ref.weight_standardization_backward(plain.weight.grad.numpy(), cache)
    np.testing.assert_allclose(layer.weight.grad.numpy(), grads["dv"], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(layer.gain.grad.flatten().numpy(), grads["dgain"], rtol=1e-8, atol=1e-9)


def test_scaled_std_conv_as_a_module():
    layer = ScaledStdConv2d(3, 4, 3)
    assert isinstance(layer, nn.Conv2d)
    assert sorted(layer.state_dict()) == ["bias", "gain", "weight"]
    layer.gain.data.fill_(3.0)
    other = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(other(x), layer(x))
    assert "gamma=1, eps=1e-06" in repr(layer)
    layer.reset_parameters()
    assert torch.equal(layer.gain, torch.ones(4, 1, 1, 1))
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    empty = layer(torch.empty(0, 3, 5, 5))
    assert empty.shape == (0, 4, 3, 3)
    empty.sum().backward()
    assert not layer.weight.grad.any()
    assert not layer.gain.grad.any()
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), layer(x))
    with pytest.raises(ValueError, match=r"more than 1 weight per output.*got a weight of shape \(4, 1, 1, 1\)"):
        ScaledStdConv2d(4, 4, 1, groups=4)


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_activation_gain(act):
    f = (lambda z: z) if act is None else lambda z: float(ACTIVATIONS[act](torch.tensor(z, dtype=torch.float64)))
    moments = [
        sum(integrate.quad(lambda z: f(z) ** k * stats.norm.pdf(z), *piece)[0] for piece in ((-12, 0), (0, 12)))  # noqa: B023
        for k in (1, 2)
    ]
    assert activation_gain(act) == pytest.approx((moments[1] - moments[0] ** 2) ** -0.5, rel=1e-10)


def test_scaled_std_conv_keeps_the_variance():
    layer = ScaledStdConv2d(64, 64, 3, gamma="relu", bias=False)
    y = layer(torch.relu(torch.randn(4, 64, 16, 16)))
    assert float(y.detach().var()) == pytest.approx(1.0, abs=0.1)


# --- whitening


def covariance(y, groups=1):
    t = y.movedim(1, 0).flatten(1).double()
    t = t - t.mean(1, keepdim=True)
    t = t.unflatten(0, (groups, -1))
    return t @ t.mT / t.size(2)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_whitening_gives_the_identity(groups):
    mix = torch.randn(8, 8, dtype=torch.float64)
    x = torch.einsum("nchw,dc->ndhw", torch.randn(16, 8, 5, 5, dtype=torch.float64), mix) + 7
    y = Whitening(8, groups, eps=1e-12, affine=False, iterations=30).double()(x)
    eye = torch.eye(8 // groups, dtype=torch.float64).expand(groups, -1, -1)
    torch.testing.assert_close(covariance(y, groups), eye, rtol=1e-8, atol=1e-8)
    assert y.mean((0, 2, 3)).abs().max() < 1e-12
    # ZCA by eigenvectors, group by group
    for part, out in zip(x.chunk(groups, 1), y.chunk(groups, 1), strict=True):
        values, vectors = torch.linalg.eigh(covariance(part)[0])
        root = vectors @ torch.diag(values**-0.5) @ vectors.T
        centred = part - part.mean((0, 2, 3), keepdim=True)
        torch.testing.assert_close(out, torch.einsum("nchw,dc->ndhw", centred, root), rtol=1e-8, atol=1e-8)


def test_whitening_turns_and_permutes_with_its_input():
    layer = Whitening(8, affine=False).double()
    x = torch.randn(64, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    torch.testing.assert_close(layer(x @ turn), layer(x) @ turn, rtol=1e-8, atol=1e-8)
    order = torch.randperm(8)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=1e-8, atol=1e-8)


def test_whitening_of_single_channels_is_batch_norm():
    layer, norm = Whitening(C, C).double(), nn.BatchNorm2d(C).double()
    x = make_x((4, C, 3, 4), torch.float64)
    torch.testing.assert_close(layer(x), norm(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_covariance.flatten(), norm.running_var)
    torch.testing.assert_close(layer.eval()(x), norm.eval()(x), rtol=1e-10, atol=1e-10)


def test_whitening_of_few_steps_is_iternorm():
    """P ← (3 P − P³ S)/2 from P = I, the paper's uncoupled form, five times."""
    x = torch.randn(32, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    S = covariance(x)[0] + 1e-5 * torch.eye(4, dtype=torch.float64)
    P = torch.eye(4, dtype=torch.float64)
    for _ in range(5):
        P = 0.5 * (3 * P - P @ P @ P @ S / S.trace())
    wanted = (x - x.mean(0)) @ P / S.trace().sqrt()
    torch.testing.assert_close(Whitening(4, iterations=5).double()(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_whitening_is_stable_in_float32(scale):
    """Condition 100 at large means and scales; and dead or doubled channels stay finite and bounded."""
    mix = torch.diag(torch.logspace(0, -1, 16)) @ torch.linalg.qr(torch.randn(16, 16)).Q
    x = (torch.randn(1000, 16) @ mix + 10) * scale
    y = Whitening(16, eps=1e-12, affine=False)(x)
    assert (covariance(y)[0] - torch.eye(16)).abs().max() < 1e-3
    x[:, 1] = x[:, 0]
    x[:, 2] = 5.0
    layer = Whitening(16, affine=False)
    x.requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert y.abs().max() < 8
    assert x.grad.isfinite().all()
    # few values: the covariance is singular
    assert Whitening(16)(torch.randn(5, 16) * scale).abs().max() < 8


def test_whitening_under_autocast():
    x = make_x((16, C, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = build("Whitening")(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, build("Whitening")(x))


# --- probability integral transform

SAMPLES = {
    "normal": lambda n: torch.randn(n),
    "uniform": lambda n: torch.rand(n),
    "exponential": lambda n: -torch.rand(n).log(),
    "lognormal": lambda n: torch.randn(n).exp(),
    "two humps": lambda n: torch.where(torch.rand(n) > 0.5, 3 + 0.2 * torch.randn(n), torch.randn(n) - 3),
    "heavy tails": lambda n: torch.randn(n) / (-torch.rand(n).log()).sqrt(),
}


def ks(y):
    """Kolmogorov–Smirnov distance to the standard normal distribution."""
    return stats.kstest(y.detach().flatten().numpy(), "norm").statistic


@pytest.mark.parametrize("sample", SAMPLES)
def test_probability_integral_makes_it_normal(sample):
    layer = PIT(1, affine=False, momentum=None)
    for _ in range(8):
        y = layer(SAMPLES[sample](8000).view(-1, 1)).detach()
    assert ks(y) < 0.018
    assert float(y.std()) == pytest.approx(1.0, abs=0.03)
    assert y.abs().max() < 20  # heavy tails arrive at up to 200 of their quartiles
    # fresh data of the same distribution under running quantiles: the noise of 8000 values is 0.015
    assert ks(layer.eval()(SAMPLES[sample](8000).view(-1, 1))) < 0.025


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_probability_integral_is_increasing(training):
    layer = PIT(1, 16).double()
    x = torch.randn(500, 1, dtype=torch.float64).exp().sort(0).values
    layer(x)
    if not training:
        layer.eval()
        x = torch.linspace(-20, 40, 3000, dtype=torch.float64).view(-1, 1)
    assert (layer(x).diff(dim=0) > 0).all()


def test_probability_integral_of_as_many_values_as_knots_is_ranks():
    """Each value its own knot and a narrow kernel: Hazen's normal scores Φ⁻¹((rank − 1/2)/n), ties at their middle."""
    for n in (32, 8):  # a batch of fewer values than knots, too
        x = torch.randn(n, 1, dtype=torch.float64).exp()
        x[3] = x[5] = x[6]
        layer = PIT(1, 32, bandwidth=1e-7, eps=0.0, affine=False).double()
        wanted = stats.norm.ppf((stats.rankdata(x.flatten().numpy()) - 0.5) / n)
        np.testing.assert_allclose(layer(x).detach().flatten().numpy(), wanted, atol=1e-9)
        torch.testing.assert_close(layer(x.exp()), layer(x))  # any increasing function before it is undone
    shifted = PIT(1, 8, eps=0.0).double()
    y = shifted(x)
    torch.testing.assert_close(shifted(3 * x - 5), y)
    torch.testing.assert_close(shifted(-x), -y)


def test_probability_integral_of_ties_and_constants():
    layer = PIT(2, affine=False, momentum=1.0)
    x = torch.stack([torch.full((400,), 2.5), torch.randn(400).relu()], 1).requires_grad_()
    y = layer(x)
    y.pow(3).sum().backward()
    assert x.grad.isfinite().all()
    assert not y[:, 0].any()
    zeros = x[:, 1] == 0
    share = zeros.float().mean().item()
    # half the values are tied: all get the score of their middle rank
    assert y[zeros, 1].std() < 1e-5
    assert float(y[zeros, 1][0].detach()) == pytest.approx(stats.norm.ppf(share / 2), abs=0.03)
    # where nothing was seen, evaluation goes on
    out = layer.eval()(torch.tensor([[2.4, -100.0], [2.6, 100.0]]))
    assert out.isfinite().all()
    assert (out[1] > out[0]).all()
    # below tied knots it goes on like standardization
    below = layer(torch.tensor([[0.0, -2.0], [0.0, -1.0]]))[:, 1]
    sd = layer.running_quantiles[1].var(correction=0).add(1e-5).sqrt()
    assert float((below[1] - below[0]).detach()) == pytest.approx(1 / float(sd), rel=1e-4)


def test_probability_integral_memory_is_linear():
    """What autograd keeps grows with n, not n²."""

    def saved(n):
        total = 0

        def pack(t):
            nonlocal total
            total += t.numel()
            return t

        layer, x = PIT(2, 16), torch.randn(n, 2, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return total

    assert saved(8000) < 2.2 * saved(4000)


# --- running statistics converge to the population


def test_running_statistics_converge():
    """200 batches of 64 of a known distribution; the error of a mean of 12,800 values is about 0.009 deviations."""
    torch.manual_seed(3)
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.7], [0.3, 0.0, 2.0]])
    mean = torch.tensor([1.0, -2.0, 30.0])
    batches = [torch.randn(64, 3, 1) for _ in range(200)]
    batches = [torch.einsum("dc,ncs->nds", mix, z) + mean.view(3, 1) for z in batches]
    cov = mix @ mix.T
    layers = {
        "BatchRenorm": BatchRenorm(3, momentum=None),
        "SplitBatchNorm": SplitBatchNorm(3, 2, momentum=None),
        "EvoNormB0": EvoNormB0(3, momentum=None),
        "SwitchNorm": SwitchNorm(3, momentum=None),
        "Whitening": Whitening(3, momentum=None),
    }
    for layer in layers.values():
        for x in batches:
            layer(x)
        assert int(layer.num_batches_tracked) == 200
    for name in ("BatchRenorm", "SwitchNorm", "Whitening"):
        torch.testing.assert_close(layers[name].running_mean, mean, rtol=0, atol=0.07)
    for name in ("BatchRenorm", "EvoNormB0", "SwitchNorm"):
        torch.testing.assert_close(layers[name].running_var, cov.diagonal(), rtol=0.05, atol=0)
    split = layers["SplitBatchNorm"]
    torch.testing.assert_close(split.running_mean, mean.expand(2, 3), rtol=0, atol=0.1)
    torch.testing.assert_close(split.running_var, cov.diagonal().expand(2, 3), rtol=0.08, atol=0)
    torch.testing.assert_close(layers["Whitening"].running_covariance[0], cov, rtol=0, atol=0.2)
    whitened = layers["Whitening"].eval()(torch.cat(batches))
    torch.testing.assert_close(covariance(whitened)[0].float(), torch.eye(3), rtol=0, atol=0.05)
    # the mean of a normal variable within each sixteenth; outer ones need batches of several values beyond them
    quantiles = PIT(3, 16, momentum=None)
    for i in range(0, 200, 8):
        quantiles(torch.cat(batches[i : i + 8]))
    edges = np.linspace(0, 1, 17)
    within = -np.diff(stats.norm.pdf(stats.norm.ppf(edges))) * 16
    wanted = mean[:, None] + cov.diagonal().sqrt()[:, None] * torch.tensor(within, dtype=torch.float32)
    torch.testing.assert_close(quantiles.running_quantiles, wanted, rtol=0, atol=0.1)


# --- torch's own


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_local_response_norm_is_torchs(size):
    x = torch.randn(2, C, 4, dtype=torch.float64, requires_grad=True)
    y = nn.LocalResponseNorm(size, alpha=0.1, beta=0.6, k=1.5)(x)
    truth, cache = ref.local_response_norm_forward(x.detach().numpy(), size, alpha=0.1, beta=0.6, k=1.5)
    np.testing.assert_allclose(y.detach().numpy(), truth, rtol=1e-12)
    dy = torch.randn_like(y)
    y.backward(dy)
    np.testing.assert_allclose(
        x.grad.numpy(), ref.local_response_norm_backward(dy.numpy(), cache)["dx"], rtol=1e-10, atol=1e-12
    )
