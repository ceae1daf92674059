"""Norm(pattern), GhostBatchNorm, ChannelNorm and FilterResponseNorm, against torch and against their definitions."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from tolerances import assert_close
from torch import nn

import normwright as nw


def randomize(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1 + 0.5 * torch.randn(parameter.shape))
    return module


def grads(y, *inputs):
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, inputs, dy)


def check(ours, theirs, x, *, parameters=True):
    """Same output and gradients."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = ours(a), theirs(b)
    torch.testing.assert_close(ya, yb)
    left = [a, *ours.parameters()] if parameters else [a]
    right = [b, *theirs.parameters()] if parameters else [b]
    for ga, gb in zip(grads(ya, *left), grads(yb, *right), strict=True):
        torch.testing.assert_close(ga, gb.reshape(ga.shape))


# Norm: what torch has, written as axes.

EQUALS = {
    "batch norm": (lambda: nw.Norm("[b] c [s...]", c=4), lambda: nn.BatchNorm2d(4), (3, 4, 5, 6)),
    "batch norm of rows": (lambda: nw.Norm("[b] c", c=4), lambda: nn.BatchNorm1d(4), (6, 4)),
    "layer norm": (lambda: nw.Norm("b... [c]", c=6), lambda: nn.LayerNorm(6), (3, 5, 6)),
    "layer norm of images": (lambda: nw.Norm("b... [h w]", h=5, w=6), lambda: nn.LayerNorm((5, 6)), (2, 3, 5, 6)),
    "rms norm": (
        lambda: nw.Norm("b... [c]", c=6, center=False, eps=1e-6),
        lambda: nn.RMSNorm(6, eps=1e-6),
        (3, 5, 6),
    ),
    "group norm": (lambda: nw.Norm("b (g [c]) [s...]", g=2, c=3), lambda: nn.GroupNorm(2, 6), (3, 6, 4, 5)),
    "instance norm": (lambda: nw.Norm("b c [s...]", c=4), lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 5, 6)),
}


@pytest.mark.parametrize("name", EQUALS)
def test_norm_is_torchs_module(name):
    make_ours, make_theirs, shape = EQUALS[name]
    ours, theirs = make_ours().double(), randomize(make_theirs().double())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    fresh = {key: value.reshape(-1) for key, value in ours.state_dict().items()}
    for key, value in make_theirs().double().state_dict().items():  # same initial state
        assert torch.equal(fresh[key], value.reshape(-1))
    ours.load_state_dict({k: v.reshape(ours.state_dict()[k].shape) for k, v in theirs.state_dict().items()})
    for _ in range(2):
        check(ours, theirs, torch.randn(shape, dtype=torch.float64) * 3 + 1)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value.reshape(ours.state_dict()[key].shape))
    check(ours.eval(), theirs.eval(), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("pattern", ["[b] (k c) [s...]", "[b] (k c)"])
def test_k_networks_are_k_batch_norms(pattern):
    shape = (6, 12, 5) if "s" in pattern else (6, 12)
    packed = randomize(nw.Norm(pattern, k=3, c=4, act="relu"))
    assert packed.weight.shape == packed.running_mean.shape == (12,)
    alone = [nn.BatchNorm1d(4) for _ in range(3)]
    for i, norm in enumerate(alone):
        norm.load_state_dict(
            {k: v if v.dim() == 0 else v[4 * i : 4 * i + 4].clone() for k, v in packed.state_dict().items()}
        )
    for training in (True, True, False):
        packed.train(training)
        x = torch.randn(shape) * 3 + 1
        y = packed(x)
        for i, norm in enumerate(alone):
            part = slice(4 * i, 4 * i + 4)
            assert_close(y[:, part], norm.train(training)(x[:, part]).relu(), 30, scale=1.0)
            assert_close(packed.running_mean[part], norm.running_mean, 30)
            assert_close(packed.running_var[part], norm.running_var, 30)
            assert packed.num_batches_tracked == norm.num_batches_tracked


def test_norm_chooses_affine_and_running_from_the_sizes_given():
    assert nw.Norm("[b] c [s...]", c=4).spec == nw.NormSpec("[b] c [s...]", "c", running="c", sizes={"c": 4})
    assert nw.Norm("b (g [c]) [s...]", g=2, c=3).spec.affine == "(g c)"
    assert nw.Norm("b... [h w]", h=2, w=3).spec.affine == "h w"
    assert nw.Norm("[b] c [s...]", c=4, affine=False).spec.affine == ""
    assert nw.Norm("[b] c [s...]", c=4, affine=False).weight is None
    assert nw.Norm("[b] c [s...]", c=4, running=False).running_mean is None
    # an output that depends on its own sample alone needs no running statistics
    for pattern, sizes in (("b c [s...]", {"c": 4}), ("b... [c]", {"c": 4}), ("b (g [c])", {"g": 2, "c": 2})):
        assert nw.Norm(pattern, **sizes).spec.running == ""
    assert nw.Norm("b c [s...]", c=4, running="c").running_mean.shape == (4,)
    assert nw.Norm("(n [b]) c [s...]", n=2, c=4).spec.running == "c"
    assert nw.Norm("b [c] h w", affine="c h", c=2, h=3).weight.shape == (2, 3)
    uncentred = nw.Norm("[b] c", c=4, center=False)
    assert uncentred.running_mean is None
    assert uncentred.bias is None
    assert uncentred.running_var.shape == (4,)
    assert nw.Norm("b... [c]", c=4, center=False, bias=True).bias is not None
    assert nw.Norm("b... [c]", c=4, bias=False).bias is None


@pytest.mark.parametrize("new_weight", [0.3, 0.0, None])
def test_norm_running_statistics(new_weight):
    ours = nw.Norm("[b] c [s...]", c=4, new_weight=new_weight)
    theirs = nn.BatchNorm1d(4, momentum=new_weight)
    for _ in range(3):
        x = torch.randn(5, 4, 3) + 2
        torch.testing.assert_close(ours(x), theirs(x))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    ours.reset_running_stats()
    assert not ours.running_mean.any()
    assert (ours.running_var == 1).all()
    assert ours.num_batches_tracked == 0


def test_norm_of_uncentred_running_statistics():
    ours = nw.Norm("[b] c", c=3, center=False, affine=False, new_weight=0.25)
    x = torch.randn(6, 3) + 2
    torch.testing.assert_close(ours(x), x / (x.square().mean(0) + 1e-5).sqrt())
    torch.testing.assert_close(ours.running_var, 0.75 + 0.25 * x.square().mean(0))
    torch.testing.assert_close(ours.eval()(x), x / (ours.running_var + 1e-5).sqrt())


def test_norm_refuses_one_value_per_running_statistic():
    ours = nw.Norm("[b] c [s...]", c=4)
    with pytest.raises(ValueError, match="more than 1 value per statistic"):
        ours(torch.randn(1, 4, 1))
    ours.eval()(torch.randn(1, 4, 1))
    assert ours(torch.randn(0, 4, 2)).shape == (0, 4, 2)


NORM_ERRORS = [
    (("[b] c",), {}, "Running statistics live on kept axes and need their sizes"),
    (("[b] c",), {"affine": "c", "running": False}, "'c' needs its size: give c="),
    (("[b c",), {}, "bracket is not closed"),
    (("[b] c",), {"c": 0}, "positive integer; got c=0"),
    (("[b] c",), {"c": 4, "d": 2}, "which the pattern does not name"),
    (("[b] c",), {"c": 4, "affine": "d"}, "no such axis"),
    (("[b] c",), {"c": 4, "running": "b"}, "'b' is reduced"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), NORM_ERRORS)
def test_norm_errors_show_the_pattern(args, kwargs, message):
    with pytest.raises(nw.PatternError, match=message) as caught:
        nw.Norm(*args, **kwargs)
    assert "\n    " in str(caught.value)


def test_norm_refuses_inputs_that_do_not_fit():
    with pytest.raises(nw.PatternError, match="'c' has size 4 by the spec and 5 in the tensor"):
        nw.Norm("[b] c [s...]", c=4, affine=False, running=False)(torch.randn(3, 5))
    with pytest.raises(nw.PatternError, match="is not g=2·c=3"):
        nw.Norm("b (g [c])", g=2, c=3)(torch.randn(3, 8))
    with pytest.raises(nw.PatternError, match="at least 2 dimensions"):
        nw.Norm("[b] c [s...]", c=4)(torch.randn(8))
    with pytest.raises(ValueError, match="act is None or one of"):
        nw.Norm("[b] c", c=4, act="swish")


def test_norm_repr_pickle_and_copy():
    ours = nw.Norm("b (g [c]) [s...]", g=2, c=3, act="gelu")
    assert repr(ours) == "Norm('b (g [c]) [s...]', g=2, c=3, affine='(g c)', running='', eps=1e-05, act='gelu')"
    assert repr(nw.Norm("[b] c", c=4)) == "Norm('[b] c', c=4, affine='c', running='c', eps=1e-05, new_weight=0.1)"
    x = torch.randn(2, 6, 4)
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert torch.equal(again(x), ours(x))
        assert again.spec == ours.spec
    made = nw.Norm("[b] c", c=4, dtype=torch.float64)
    assert made.weight.dtype == made.running_mean.dtype == torch.float64
    assert made.num_batches_tracked.dtype == torch.int64
    assert nw.Norm("[b] c", c=4, device="meta").running_var.is_meta


def test_norm_residual_and_mask():
    ours = randomize(nw.Norm("[b] c [s...]", c=4, act="relu")).double()
    theirs = nn.BatchNorm1d(4).double()
    theirs.load_state_dict(ours.state_dict())
    x, residual = torch.randn(2, 6, 4, 3, dtype=torch.float64).unbind()
    mask = torch.tensor([True, True, False, True, False, True])
    x[~mask] = float("nan")
    y = ours(x, residual, mask)
    torch.testing.assert_close(y[mask], (theirs(x[mask]) + residual[mask]).relu())
    assert not y[~mask].any()
    torch.testing.assert_close(ours.running_var, theirs.running_var)


# GhostBatchNorm.


def test_ghost_batch_norm_is_a_batch_norm_per_chunk():
    ours = randomize(nw.GhostBatchNorm(4, 3, momentum=0.2)).double()
    chunk = nn.BatchNorm2d(4, momentum=0.2).double()
    chunk.load_state_dict(ours.state_dict())
    x = torch.randn(12, 4, 3, 2, dtype=torch.float64) * 2 + 1
    before = copy.deepcopy(chunk.state_dict())
    y, parts, moved = ours(x), [], []
    for part in x.chunk(3):
        chunk.load_state_dict(before)
        parts.append(chunk(part))
        moved.append(copy.deepcopy(chunk.state_dict()))
    torch.testing.assert_close(y, torch.cat(parts))
    for key in ("running_mean", "running_var"):  # each chunk's, averaged: one step and not three
        torch.testing.assert_close(ours.state_dict()[key], sum(m[key] for m in moved) / 3)
    assert ours.num_batches_tracked == 1
    # at evaluation an ordinary batch norm, for any batch size
    chunk.load_state_dict(ours.state_dict())
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), chunk.eval()(x))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 2), (6, 4, 2, 3, 2)])
def test_ghost_batch_norm_takes_any_number_of_places(shape):
    ours = nw.GhostBatchNorm(4, 2, act="tanh")
    x = torch.randn(shape)
    expected = torch.cat([nw.BatchNorm1d(4)(part.flatten(2) if len(shape) > 2 else part) for part in x.chunk(2)])
    torch.testing.assert_close(ours(x), expected.reshape(shape).tanh())
    one = nw.GhostBatchNorm(4, 1)
    plain = nn.BatchNorm1d(4)
    places = x.flatten(2) if len(shape) > 2 else x
    torch.testing.assert_close(one(x).reshape(places.shape), plain(places))
    torch.testing.assert_close(one.running_var, plain.running_var)


def test_ghost_batch_norm_errors():
    ours = nw.GhostBatchNorm(4, 3)
    with pytest.raises(nw.PatternError, match="A dimension of size 8 is not divisible by n=3"):
        ours(torch.randn(8, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel and chunk"):
        ours(torch.randn(3, 4))
    assert ours(torch.randn(3, 4, 2)).shape == (3, 4, 2)
    assert ours(torch.randn(0, 4)).shape == (0, 4)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        ours(torch.randn(4))
    for wrong in (0, -1, 2.0):
        with pytest.raises(ValueError, match="positive integer"):
            nw.GhostBatchNorm(4, wrong)


def test_ghost_batch_norm_state_repr_and_tracking():
    ours = nw.GhostBatchNorm(4, 2, 1e-3, 0.2, act="relu")
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    assert list(ours.state_dict()) == list(nn.BatchNorm1d(4).state_dict())
    assert repr(ours) == (
        "GhostBatchNorm(4, num_chunks=2, eps=0.001, momentum=0.2, affine=True, bias=True, track_running_stats=True, "
        "act='relu')"
    )
    assert torch.equal(pickle.loads(pickle.dumps(ours)).eval()(torch.ones(2, 4)), ours.eval()(torch.ones(2, 4)))
    untracked = nw.GhostBatchNorm(4, 2, track_running_stats=False).eval()
    x = torch.randn(6, 4)
    torch.testing.assert_close(untracked(x), torch.cat([nw.BatchNorm1d(4)(part) for part in x.chunk(2)]))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_ghost_batch_norm_is_not_scripted_as_a_plain_batch_norm():
    with pytest.raises((RuntimeError, NotImplementedError), match="GhostBatchNorm has no TorchScript form"):
        torch.jit.script(nw.GhostBatchNorm(4, 2))


# ChannelNorm.


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 5, 4), (2, 6, 2, 3, 4)])
@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"affine": False}, {"eps": 0.1}], ids=str)
def test_channel_norm_is_layer_norm_with_channels_moved_last(shape, kwargs):
    ours = randomize(nw.ChannelNorm(6, **kwargs)).double()
    theirs = nn.LayerNorm(
        6,
        eps=kwargs.get("eps", 1e-5),
        elementwise_affine=kwargs.get("affine", True),
        bias=kwargs.get("bias", True),
    ).double()
    theirs.load_state_dict(ours.state_dict())

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = theirs

        def forward(self, x):
            return self.norm(x.movedim(1, -1)).movedim(-1, 1)

    check(ours, Moved(), torch.randn(shape, dtype=torch.float64) * 2 + 1)


def test_channel_norm_default_state_repr_and_errors():
    ours = nw.ChannelNorm(6)
    assert torch.equal(ours.weight, torch.ones(6))
    assert torch.equal(ours.bias, torch.zeros(6))
    assert repr(ours) == "ChannelNorm(6, eps=1e-05, affine=True, bias=True)"
    assert repr(nw.ChannelNorm(6, act="silu", bias=False)) == (
        "ChannelNorm(6, eps=1e-05, affine=True, bias=False, act='silu')"
    )
    for shape in ((6,), (3, 5), (3, 6, 5)[:1]):
        with pytest.raises(RuntimeError, match=r"Expected input of shape \(N, 6, …\)"):
            ours(torch.randn(shape))
    with pytest.raises(ValueError, match="act is None or one of"):
        nw.ChannelNorm(6, act="swish")
    again = pickle.loads(pickle.dumps(ours))
    x = torch.randn(2, 6, 3)
    assert torch.equal(again(x), ours(x))
    assert nw.ChannelNorm(6, dtype=torch.float64, device="meta").weight.is_meta


def test_channel_norm_padding_and_format():
    ours = randomize(nw.ChannelNorm(6, act="gelu"))
    x = torch.randn(3, 6, 4, 5).to(memory_format=torch.channels_last)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)
    mask = torch.rand(3, 4, 5) > 0.4
    dirty = x.masked_fill(~mask[:, None], float("nan")).requires_grad_()
    y = ours(dirty, mask=mask)
    torch.testing.assert_close(y, ours(x) * mask[:, None])  # each place has its own statistic
    y.sum().backward()
    assert torch.isfinite(dirty.grad).all()


# FilterResponseNorm.


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 2), (2, 4, 2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_filter_response_norm_is_its_formula(shape, dtype):
    ours = randomize(nw.FilterResponseNorm(4, eps=1e-4))
    x = (torch.randn(shape) * 2 + 1).to(dtype).requires_grad_()
    wide = copy.deepcopy(ours).double()
    ours = ours.to(torch.float64 if dtype == torch.float64 else torch.float32)
    view = (4, *(1 for _ in shape[2:]))
    leaf = x.detach().double().requires_grad_()
    nu2 = leaf.square().mean(tuple(range(2, len(shape))), keepdim=True)
    weight, bias, threshold = (p.view(view) for p in (wide.weight, wide.bias, wide.threshold))
    truth = torch.maximum(leaf / (nu2 + 1e-4).sqrt() * weight + bias, threshold)
    y = ours(x)
    assert y.dtype == dtype
    n = leaf[0, 0].numel()
    assert_close(y, truth, n)
    # where rounding may turn the maximum over, the gradient is anybody's
    clear = (leaf / (nu2 + 1e-4).sqrt() * weight + bias - threshold).abs() > 0.05
    dy = torch.randn(shape, dtype=torch.float64).to(dtype).double() * clear
    got = torch.autograd.grad(y, [x, *ours.parameters()], dy.to(dtype))
    want = torch.autograd.grad(truth, [leaf, *wide.parameters()], dy)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, n * shape[0], dtype=dtype, scale=2.0)


def test_filter_response_norm_starts_as_a_relu_and_checks_its_input():
    ours = nw.FilterResponseNorm(4)
    assert list(ours.state_dict()) == ["weight", "bias", "threshold"]
    assert [p.unique().tolist() for p in ours.parameters()] == [[1.0], [0.0], [0.0]]
    x = torch.randn(3, 4, 50)
    torch.testing.assert_close(ours(x), (x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt()).relu())
    assert repr(ours) == "FilterResponseNorm(4, eps=1e-06)"
    for shape in ((3, 4), (3, 5, 2), (4,)):
        with pytest.raises(RuntimeError, match=r"Expected input of shape \(N, 4, places…\)"):
            ours(torch.randn(shape))
    assert ours(torch.randn(0, 4, 3)).shape == (0, 4, 3)


@pytest.mark.parametrize("positions", [(3,), (3, 5), (3, 5, 2)])
def test_filter_response_norm_padding(positions):
    ours = randomize(nw.FilterResponseNorm(4)).double()
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    mask = torch.rand(positions) > 0.4
    mask.view(-1)[:2] = torch.tensor([True, False])
    spread = mask.view(3, 1, *positions[1:], *(1 for _ in range(3 - len(positions)))).expand(x.shape)
    dirty = x.masked_fill(~spread, float("nan")).requires_grad_()
    y = ours(dirty, mask=mask)
    grads_ = grads(y, dirty, *ours.parameters())
    assert all(torch.isfinite(g).all() for g in grads_)
    assert not y[~spread].any()
    assert not grads_[0][~spread].any()
    kept = x * spread
    nu2 = kept.square().sum((2, 3), keepdim=True) / spread.sum((2, 3), keepdim=True).clamp(min=1)
    weight, bias, threshold = (p.view(4, 1, 1) for p in ours.parameters())
    truth = torch.maximum(kept / (nu2 + 1e-6).sqrt() * weight + bias, threshold) * spread
    torch.testing.assert_close(y, truth)


# Transforms, once for each layer.

LAYERS = {
    "Norm": (lambda: nw.Norm("[b] c [s...]", c=4, act="relu"), (6, 4, 5)),
    "GhostBatchNorm": (lambda: nw.GhostBatchNorm(4, 2, act="relu"), (6, 4, 5)),
    "ChannelNorm": (lambda: nw.ChannelNorm(4, act="relu"), (6, 4, 5)),
    "FilterResponseNorm": (lambda: nw.FilterResponseNorm(4), (6, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_compile_and_export(name):
    torch._dynamo.reset()
    make, shape = LAYERS[name]
    ours = randomize(make())
    twin, exported = copy.deepcopy(ours), copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(shape)
    check(compiled, twin, x)
    for a, b in zip(ours.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    module = torch.export.export(exported.eval(), (x,)).module(check_guards=False)
    torch.testing.assert_close(module(x), exported(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward_of_layers(name):
    make, shape = LAYERS[name]
    ours = randomize(make().double())
    if hasattr(ours, "act"):
        ours.act = "tanh" if ours.act else None
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ours, (x,), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_onnx(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    make, shape = LAYERS[name]
    ours = randomize(make()).eval()
    path = tmp_path / "norm.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxscript's own
        torch.onnx.export(ours, (torch.randn(shape),), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(shape)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.as_tensor(y), ours(x), x.numel(), scale=1.0)


def test_affine_of_another_type_is_said():
    with pytest.raises(TypeError, match=r"affine says which axes have weight and bias.* got None. .* affine=False"):
        nw.Norm("b [c]", c=3, affine=None)  # type: ignore[arg-type]
