"""The torch twins against torch's own modules: construction, numbers, running statistics, state, transforms, export.

The section "Semantics a twin keeps" of the design, sentence by sentence; `make` builds a pair with equal state.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch import nn

import normwright as nw
from normwright import reference
from normwright.functional import ACTIVATIONS

ACT_MODULES = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
}

# name: (positional arguments, input shapes)
TABLE = {
    "BatchNorm1d": ((4,), [(6, 4), (5, 4, 7)]),
    "BatchNorm2d": ((4,), [(3, 4, 5, 6)]),
    "BatchNorm3d": ((4,), [(2, 4, 3, 2, 5)]),
    "InstanceNorm1d": ((4,), [(5, 4, 7), (4, 7)]),
    "InstanceNorm2d": ((4,), [(3, 4, 5, 6), (4, 5, 6)]),
    "InstanceNorm3d": ((4,), [(2, 4, 3, 2, 5), (4, 3, 2, 5)]),
    "LayerNorm": ((6,), [(3, 5, 6), (6,)]),
    "RMSNorm": ((6,), [(3, 5, 6), (6,)]),
    "GroupNorm": ((2, 4), [(3, 4), (5, 4, 7), (3, 4, 5, 6)]),
    "LazyBatchNorm1d": ((), [(6, 4), (5, 4, 7)]),
    "LazyBatchNorm2d": ((), [(3, 4, 5, 6)]),
    "LazyBatchNorm3d": ((), [(2, 4, 3, 2, 5)]),
    "LazyInstanceNorm1d": ((), [(5, 4, 7)]),
    "LazyInstanceNorm2d": ((), [(3, 4, 5, 6)]),
    "LazyInstanceNorm3d": ((), [(2, 4, 3, 2, 5)]),
}
ALL = list(TABLE)
EAGER = [name for name in TABLE if not name.startswith("Lazy")]
LAZY = [name for name in TABLE if name.startswith("Lazy")]
BATCH = [name for name in EAGER if name.startswith("BatchNorm")]
INSTANCE = [name for name in EAGER if name.startswith("InstanceNorm")]

_NORM = [{}, {"eps": 0.1, "momentum": 0.3}, {"momentum": None}, {"affine": False}, {"affine": True, "bias": False},
         {"affine": True, "track_running_stats": True}, {"track_running_stats": False}]  # fmt: skip
VARIANTS = {
    **{name: _NORM for name in TABLE if "Batch" in name or "Instance" in name},
    "LayerNorm": [{}, {"eps": 0.1}, {"elementwise_affine": False}, {"bias": False}],
    "RMSNorm": [{}, {"eps": 0.1}, {"elementwise_affine": False}],
    "GroupNorm": [{}, {"eps": 0.1}, {"affine": False}, {"bias": False}],
}
PAIRS = [pytest.param(name, kwargs, id=f"{name}-{kwargs}") for name in ALL for kwargs in VARIANTS[name]]
EAGER_PAIRS = [pytest.param(name, kwargs, id=f"{name}-{kwargs}") for name in EAGER for kwargs in VARIANTS[name]]
SHAPED = [
    pytest.param(name, shape, id=f"{name}-{'x'.join(map(str, shape))}") for name in EAGER for shape in TABLE[name][1]
]


def randomize(module: nn.Module) -> None:
    """Parameters and running statistics that are not their defaults."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1 + 0.5 * torch.randn(parameter.shape))
        for name, buffer in module.named_buffers():
            if name.endswith("var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape))
            elif buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape))


def make(name: str, *args, act: str | None = None, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, with the same random state."""
    args = args or TABLE[name][0]
    ours, theirs = getattr(nw, name)(*args, act=act, **kwargs), getattr(nn, name)(*args, **kwargs)
    if not name.startswith("Lazy"):
        randomize(theirs)
        ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Output, every gradient and every buffer after one call."""
    x = x.detach().requires_grad_()
    y = module(x)
    dy = torch.ones_like(y) if dy is None else dy
    tensors = {"dx": x, **{f"d{name}": p for name, p in module.named_parameters()}}
    grads = torch.autograd.grad(y, list(tensors.values()), dy)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return {"y": y.detach(), **dict(zip(tensors, grads, strict=True)), **buffers}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal names, types and shapes; values to the accuracy of their type."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}")


# Construction.


@pytest.mark.parametrize("name", ALL)
def test_is_a_torch_module_of_that_name(name):
    ours, torchs = getattr(nw, name), getattr(nn, name)
    assert issubclass(ours, torchs)
    assert ours.__name__ == name
    assert isinstance(make(name)[0], torchs)
    assert ours.__doc__
    assert ours._version == torchs._version


@pytest.mark.parametrize("name", ALL)
def test_signature_is_torchs_and_act(name):
    ours = inspect.signature(getattr(nw, name)).parameters
    theirs = inspect.signature(getattr(nn, name)).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()][:-1] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    act = ours["act"]
    assert list(ours)[-1] == "act"
    assert act.kind is inspect.Parameter.KEYWORD_ONLY
    assert act.default is None
    forward = list(inspect.signature(getattr(nw, name).forward).parameters.values())[1:]
    assert [p.name for p in forward] == ["x", "residual", "mask"]
    assert [p.default for p in forward[1:]] == [None, None]


def test_a_subclass_of_a_twin_shows_its_own_signature():
    class Mine(nw.BatchNorm2d):
        def __init__(self, width: int, scale: float = 2.0) -> None:
            super().__init__(width)
            self.scale = scale

    assert list(inspect.signature(Mine).parameters) == ["width", "scale"]
    assert Mine(3).num_features == 3

    class Plain(nw.LayerNorm):
        pass

    assert inspect.signature(Plain) == inspect.signature(nw.LayerNorm)


@pytest.mark.parametrize("name", EAGER)
def test_positional_arguments(name):
    positional = {
        "LayerNorm": (6, 0.1, True, False),
        "RMSNorm": (6, 0.1, False),
        "GroupNorm": (2, 4, 0.1, True),
    }.get(name, (4, 0.1, 0.3, True, True))
    ours, theirs = getattr(nw, name)(*positional), getattr(nn, name)(*positional)
    assert repr(ours) == repr(theirs)
    with pytest.raises(TypeError):
        getattr(nw, name)(*positional, None, None, "relu")


@pytest.mark.parametrize(("name", "kwargs"), PAIRS)
def test_repr_state_and_attributes_are_torchs(name, kwargs):
    args = TABLE[name][0]
    ours, theirs = getattr(nw, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    assert repr(ours) == repr(theirs)
    assert str(nn.Sequential(ours)) == str(nn.Sequential(theirs))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    for key, value in theirs.__dict__.items():
        if not key.startswith("_"):
            assert getattr(ours, key) == value, key
    if name in LAZY:
        x = torch.randn(TABLE[name][1][0])
        torch.testing.assert_close(ours(x), theirs(x))
        assert type(ours) is getattr(nw, name[4:])
        assert isinstance(ours, getattr(nn, name[4:]))
        assert repr(ours) == repr(theirs)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert a._metadata == b._metadata
    for key in b:
        torch.testing.assert_close(a[key], b[key])
        assert a[key].dtype == b[key].dtype
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    with_act = getattr(nw, name)(*args, act="leaky_relu", **kwargs)
    assert with_act.extra_repr() == getattr(nn, name)(*args, **kwargs).extra_repr() + ", act='leaky_relu'"


@pytest.mark.parametrize("name", BATCH)
def test_keys(name):
    ours = make(name)[0]
    assert list(ours.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert ours.num_batches_tracked.dtype == torch.int64
    assert ours.num_batches_tracked.shape == ()
    assert ours._version == 2
    assert list(make(name, affine=False)[0].state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(make(name, track_running_stats=False)[0].state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("name", INSTANCE)
def test_instance_norm_has_neither_parameters_nor_statistics_by_default(name):
    ours = getattr(nw, name)(4)
    assert (ours.affine, ours.track_running_stats) == (False, False)
    assert not ours.state_dict()


@pytest.mark.parametrize("name", EAGER)
def test_device_and_dtype_arguments(name):
    args = TABLE[name][0]
    kwargs = {"affine": True, "track_running_stats": True} if "Instance" in name else {}
    for factory in ({"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}):
        ours, theirs = getattr(nw, name)(*args, **kwargs, **factory), getattr(nn, name)(*args, **kwargs, **factory)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)


@pytest.mark.parametrize("name", EAGER)
def test_reset_parameters(name):
    kwargs = {"affine": True, "track_running_stats": True} if "Instance" in name else {}
    ours = make(name, **kwargs)[0]
    ours.reset_parameters()
    for key, value in getattr(nn, name)(*TABLE[name][0], **kwargs).state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("act", ["Relu", "swish", "", 3])
def test_an_unknown_activation_is_refused_when_built(name, act):
    with pytest.raises(ValueError, match="act is None or one of 'relu', 'leaky_relu'") as caught:
        getattr(nw, name)(*TABLE[name][0], act=act)
    assert repr(act) in str(caught.value)


def test_constructor_errors_are_torchs():
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        nw.GroupNorm(3, 4)
    with pytest.raises(TypeError):
        nw.BatchNorm2d(4, unknown=1)


@pytest.mark.parametrize("name", ALL)
def test_spec_says_the_axes(name):
    patterns = {"Batch": "[b] c [s...]", "Instance": "b c [s...]", "Group": "b (g [c]) [s...]"}
    expected = next((p for word, p in patterns.items() if word in name), "b... [c]")
    spec = make(name)[0].spec
    assert spec.pattern == expected
    assert spec.center == (name != "RMSNorm")
    assert spec.sizes == ((("g", 2),) if name == "GroupNorm" else ())


# Numbers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "kwargs"), EAGER_PAIRS)
def test_forward_backward_and_buffers_are_torchs(name, kwargs, training, dtype):
    for shape in TABLE[name][1]:
        ours, theirs = (module.train(training) for module in make(name, dtype=dtype, **kwargs))
        for _ in range(2):
            x, dy = torch.randn(shape, dtype=dtype) * 3 + 1, torch.randn(shape, dtype=dtype)
            assert_same(step(ours, x, dy), step(theirs, x, dy))


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("kwargs", [{}, {"affine": True, "track_running_stats": True}], ids=str)
def test_lazy_forms_become_the_twin(name, kwargs):
    ours, theirs = make(name, act="relu", **kwargs)
    for _ in range(2):
        x = torch.randn(TABLE[name][1][0]) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x).relu())
    assert type(ours) is getattr(nw, name[4:])
    assert ours.act == "relu"
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalized_shape", [6, (6,), [5, 6], torch.Size((3, 5, 6))], ids=str)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_normalized_shapes(name, normalized_shape):
    ours, theirs = make(name, normalized_shape)
    assert repr(ours) == repr(theirs)
    assert ours.normalized_shape == theirs.normalized_shape
    for shape in ((3, 5, 6), (2, 3, 5, 6)):
        x, dy = torch.randn(shape), torch.randn(shape)
        assert_same(step(ours, x, dy), step(theirs, x, dy))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("name", "shape"), SHAPED)
def test_activation_and_residual_are_one_after_the_other(name, shape, act):
    ours, theirs = make(name, act=act)
    x, residual, dy = torch.randn(3, *shape).double().unbind()
    ours, theirs = ours.double(), theirs.double()
    for given in (None, residual.requires_grad_()):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya = ours(a, given)
        yb = ACT_MODULES[act](theirs(b) if given is None else theirs(b) + given)
        torch.testing.assert_close(ya, yb)
        leaves_a, leaves_b = (
            [t, *m.parameters(), *([given] * (given is not None))] for t, m in ((a, ours), (b, theirs))
        )
        for ga, gb in zip(
            torch.autograd.grad(ya, leaves_a, dy), torch.autograd.grad(yb, leaves_b, dy), strict=True
        ):  # fmt: skip
            torch.testing.assert_close(ga, gb)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("param", [torch.float32, None], ids=["float32 parameters", "all half"])
@pytest.mark.parametrize(("name", "shape"), SHAPED)
def test_half_types(name, shape, param, dtype):
    """Output and input gradient take the input's type, parameter gradients theirs; float32 inside, by the reference."""
    kwargs = {"affine": True, "track_running_stats": True} if "Instance" in name else {}
    ours = make(name, **kwargs)[0]
    ours = ours if param else ours.to(dtype)
    x = (torch.randn(shape) * 2 + 5).to(dtype)
    dy = torch.randn(shape).to(dtype)
    arrays = {k: v.detach().double().numpy() for k, v in ours.state_dict().items() if k != "num_batches_tracked"}
    got = step(ours, x, dy)
    unbatched = "Instance" in name and len(shape) != len(TABLE[name][1][0])
    as_batch = (1, *shape) if unbatched else shape
    eps = ours.eps or torch.finfo(torch.float32).eps
    truth, cache = reference.forward(x.double().numpy().reshape(as_batch), ours.spec, eps=eps, **arrays)
    grads = reference.backward(dy.double().numpy().reshape(as_batch), cache)
    n, condition = ours.spec.layout(as_batch).count, float(np.abs(cache.mean * cache.r).max())
    assert got["y"].dtype == got["dx"].dtype == dtype
    assert got["dweight"].dtype == (param or dtype)
    assert_close(got["y"], truth.reshape(shape), n, condition=condition, what="y")
    assert_close(got["dx"], grads["dx"].reshape(shape), n, condition=condition, what="dx", scale=float(cache.r.max()))
    for key in ("dweight", "dbias"):
        if key in got:
            # torch's layer norm rounds these sums to the input's type on the way
            assert_close(got[key], grads[key], x.numel() // 4, dtype=dtype, condition=condition, what=key)
    for key in ("running_mean", "running_var"):
        if key in got:
            assert got[key].dtype == (param or dtype)
            assert_close(got[key], getattr(cache, key), n, condition=condition, what=key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_without_eps_uses_that_of_the_type_that_computes(dtype):
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    x = (torch.randn(4, 6) * eps**0.5).to(dtype)
    if dtype == torch.float16:
        x = x * 8  # clear of the smallest float16 numbers
    ours, theirs = nw.RMSNorm(6, dtype=dtype), nn.RMSNorm(6, dtype=dtype)
    assert ours.eps is None
    wide = x.double()
    assert_close(ours(x), wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt(), 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("name", "shape"), SHAPED)
def test_large_mean(name, shape):
    """Mean 3000, deviation 1: a variance in one pass of float32 is off by a factor of three."""
    shape = tuple(size if size in (4, 6) else size * 5 for size in shape)
    ours = make(name)[0]
    truth = copy.deepcopy(ours).double()  # in float64 the same module, itself compared with the reference
    x = 3000 + torch.randn(shape)
    y = ours(x)
    assert_close(y, truth(x.double()), x.numel(), condition=3000.0)
    if name in BATCH:
        assert_close(ours.running_var, truth.running_var, x.numel(), condition=3000.0)


# Double backward.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [None, "tanh"])
@pytest.mark.parametrize(("name", "shape"), SHAPED)
def test_double_backward(name, shape, act, training):
    kwargs = {"affine": True} if "Instance" in name else {}
    ours, theirs = (module.train(training) for module in make(name, act=act, dtype=torch.float64, **kwargs))
    x, dy = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def second(run):
        leaves = [x, *run.parameters(), dy]
        grads = torch.autograd.grad(run(x), leaves[:-1], dy, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in grads), leaves, materialize_grads=True)

    behind = nn.Sequential(theirs, nn.Tanh()) if act else theirs
    for a, b in zip(second(ours), second(behind), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# Memory: strides, formats, expanded and empty tensors.

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in EAGER for shape in TABLE[name][1] if len(shape) > 3 and shape[1] == 4],
)
def test_channels_last_stays_channels_last(name, shape, affine, residual, training, dtype):
    ours = make(name, affine=affine)[0].train(training)
    plain = copy.deepcopy(ours)
    form = FORMATS[len(shape)]
    x, dy, r = torch.randn(3, *shape).to(dtype).unbind()
    r = r if residual else None
    a = x.to(memory_format=form).requires_grad_()
    b = x.clone().requires_grad_()
    ya, yb = ours(a, None if r is None else r.to(memory_format=form)), plain(b, r)
    assert ya.is_contiguous(memory_format=form)
    assert yb.is_contiguous()
    (gb,) = torch.autograd.grad(yb, b, dy, retain_graph=True)
    if name not in INSTANCE:  # whatever the layout of the incoming gradient
        for other in (dy, torch.ones((), dtype=dtype).expand(shape)):
            (given,) = torch.autograd.grad(ya, a, other, retain_graph=True)
            assert given.is_contiguous(memory_format=form)
            assert_close(given, torch.autograd.grad(yb, b, other, retain_graph=True)[0], x.numel(), scale=1.0)
    (ga,) = torch.autograd.grad(ya, a, dy.to(memory_format=form))
    assert ga.is_contiguous(memory_format=form)
    assert gb.is_contiguous()
    assert_close(ya, yb, x.numel(), scale=1.0)
    assert_close(ga, gb, x.numel(), scale=1.0)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "shape"), SHAPED)
def test_any_strides(name, shape, training):
    ours = make(name, dtype=torch.float64)[0].train(training)
    x, dy = torch.randn(2, *shape, dtype=torch.float64).unbind()
    before = copy.deepcopy(ours.state_dict())
    expected = step(ours, x, dy)
    order = tuple(range(len(shape)))[::-1]

    def sliced(t):
        big = torch.full([s + 1 for s in shape], float("nan"), dtype=t.dtype)
        big[tuple(slice(1, None) for _ in shape)] = t
        return big[tuple(slice(1, None) for _ in shape)]

    def transposed(t):
        return t.permute(order).contiguous().permute(order)

    def strided(t):
        return torch.stack([t, t * float("nan")], -1)[..., 0]

    for shaped in (sliced, transposed, strided):
        for shaped_dy in (shaped, lambda t: t):
            ours.load_state_dict(before)
            got = step(ours, shaped(x), shaped_dy(dy))
            for key in expected:
                torch.testing.assert_close(got[key], expected[key], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "shape"), SHAPED)
def test_expanded_inputs_and_gradients(name, shape):
    ours, theirs = make(name, dtype=torch.float64)
    last = torch.randn((*shape[:-1], 1), dtype=torch.float64).expand(shape)
    first = torch.randn((1, *shape[1:]), dtype=torch.float64).expand(shape)
    for x in (first, last, torch.randn((), dtype=torch.float64).expand(shape)):
        for dy in (torch.ones((), dtype=torch.float64).expand(shape), torch.randn(shape, dtype=torch.float64)):
            a, b = step(ours, x, dy), step(theirs, x, dy)
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-9)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours(x).sum().backward()
    got, x.grad = x.grad, None
    theirs(x).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize("kwargs", [{}, {"affine": True, "track_running_stats": True}], ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_empty_batch(name, kwargs, act, training):
    """Empty output, buffers unchanged, zero parameter gradients, counter +1."""
    if name in ("LayerNorm", "RMSNorm", "GroupNorm"):
        kwargs = {}
    ours, theirs = (module.train(training) for module in make(name, act=act, **kwargs))
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(0, *TABLE[name][1][0][1:])
    got = step(ours, x)
    if "Instance" not in name or not kwargs:  # where torch's raises, for it selects from the empty batch
        assert_same(got, step(theirs, x))
    assert got["y"].shape == x.shape
    for key, value in got.items():
        if key.startswith("d") and key != "dx":
            assert torch.equal(value, torch.zeros_like(value))
    after = ours.state_dict()
    for key in before:
        counted = key == "num_batches_tracked" and training and name in BATCH
        assert torch.equal(after[key], before[key] + counted), key


@pytest.mark.parametrize("name", [name for name in EAGER if name not in ("LayerNorm", "RMSNorm")])
def test_no_places(name):
    shape = (3, 4, *([0] * (int(name[-2]) if name[-1] == "d" else 1)))
    ours, theirs = make(name)
    got, expected = step(ours, torch.randn(shape)), step(theirs, torch.randn(shape))
    if name == "GroupNorm":  # torch's gradients are NaN there
        expected.update(dweight=torch.zeros(4), dbias=torch.zeros(4))
    assert_same(got, expected)


# Running statistics.


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, 0, 0.0, None])
@pytest.mark.parametrize("name", BATCH)
def test_momentum(name, momentum):
    ours, theirs = make(name, momentum=momentum, dtype=torch.float64)
    ours.reset_running_stats()
    theirs.reset_running_stats()
    shape = TABLE[name][1][0]
    batches = [torch.randn(shape, dtype=torch.float64) * (i + 1) + i for i in range(3)]
    for x in batches:
        ours(x)
        theirs(x)
    assert_same(buffers(ours), buffers(theirs))
    assert ours.num_batches_tracked.item() == 3  # momentum 0 counts too
    over = [0, *range(2, len(shape))]
    if momentum is None:  # each batch weighs the same
        assert_close(ours.running_mean, sum(x.mean(over) for x in batches) / 3, 10)
        assert_close(ours.running_var, sum(x.var(over, correction=1) for x in batches) / 3, 10)
    elif momentum == 0:
        assert not ours.running_mean.any()
        assert (ours.running_var == 1).all()
    else:
        mean, var = torch.zeros(4).double(), torch.ones(4).double()
        for x in batches:
            mean = (1 - momentum) * mean + momentum * x.mean(over)
            var = (1 - momentum) * var + momentum * x.var(over, correction=1)  # n / (n − 1)
        assert_close(ours.running_mean, mean, 10)
        assert_close(ours.running_var, var, 10)


def test_running_mean_is_a_tenth_of_the_first_batch():
    """The 0.059 after one batch of mean 0.59; and the output is normalized by the biased variance."""
    ours = nw.BatchNorm1d(1)
    x = torch.tensor([[0.09], [1.09], [0.59]])
    y = ours(x)
    assert ours.running_mean.item() == pytest.approx(0.059)
    assert ours.running_var.item() == pytest.approx(0.9 + 0.1 * 0.25)  # (0.25 + 0.25 + 0) / 2
    assert y[1].item() == pytest.approx(0.5 / (0.5 / 3 + 1e-5) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.3, 0.0, None])
@pytest.mark.parametrize(("name", "shape"), [(n, s) for n in INSTANCE for s in TABLE[n][1]])
def test_instance_norm_tracks_but_never_counts(name, shape, momentum):
    ours, theirs = make(name, momentum=momentum, track_running_stats=True, dtype=torch.float64)
    before = buffers(ours)
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))
    assert_same(buffers(ours), buffers(theirs))
    assert ours.num_batches_tracked.item() == 0
    assert torch.allclose(ours.running_mean, before["running_mean"], rtol=1e-12) == (not momentum)
    assert torch.allclose(ours.running_var, before["running_var"], rtol=1e-12) == (not momentum)


@pytest.mark.parametrize("name", BATCH)
def test_the_counter_rises_before_the_input_is_checked(name):
    ours, theirs = make(name)
    one = torch.randn(1, 4, *(1 for _ in TABLE[name][1][-1][2:]))
    wrong = torch.randn(3, 5, *TABLE[name][1][-1][2:])
    for x, error in ((one, ValueError), (wrong, RuntimeError)):
        for module in (ours, theirs):
            with pytest.raises(error):
                module(x)
    assert ours.num_batches_tracked.item() == theirs.num_batches_tracked.item() == 2


@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_more_than_one_value_per_channel(name, training):
    """Required wherever batch statistics are used, evaluation without buffers included."""
    x = torch.randn(1, 4, *(1 for _ in TABLE[name][1][-1][2:]))
    for track in (True, False):
        ours, theirs = (module.train(training) for module in make(name, track_running_stats=track))
        if training or not track:
            for module in (ours, theirs):
                with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input"):
                    module(x)
        else:
            torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_statistics_when_training_or_when_both_buffers_are_none(name, training):
    ours, theirs = (module.train(training) for module in make(name))
    x = torch.randn(TABLE[name][1][-1]) * 2 + 3
    by_buffers = not training
    assert torch.allclose(ours(x).mean(), theirs(x).mean())
    normalized = (ours(x) - _affine(ours.bias, x)) / _affine(ours.weight, x)
    assert (normalized.mean().abs() < 1e-5) == (not by_buffers)
    for module in (ours, theirs):
        module.running_mean = module.running_var = None
    torch.testing.assert_close(ours(x), theirs(x))
    normalized = (ours(x) - _affine(ours.bias, x)) / _affine(ours.weight, x)
    assert normalized.mean().abs() < 1e-5


def _affine(parameter, x):
    return parameter.view(-1, *(1 for _ in x.shape[2:]))


@pytest.mark.parametrize("name", BATCH)
def test_one_buffer_alone_is_an_error_at_evaluation(name):
    for missing in ("running_mean", "running_var"):
        ours = make(name)[0].eval()
        setattr(ours, missing, None)
        with pytest.raises(ValueError, match="running mean and variance are needed and one is missing"):
            ours(torch.randn(TABLE[name][1][-1]))


@pytest.mark.parametrize("name", BATCH + INSTANCE)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_tracking_switched_off_later(name, training):
    """Training does not update and does not count; evaluation still uses the old buffers (batch norm)."""
    ours, theirs = (module.train(training) for module in make(name, track_running_stats=True))
    for module in (ours, theirs):
        module.track_running_stats = False
    before = buffers(ours)
    x = torch.randn(TABLE[name][1][0]) * 2 + 3
    torch.testing.assert_close(ours(x), theirs(x))
    assert_same(buffers(ours), buffers(theirs))
    if name in BATCH:
        assert all(torch.equal(value, before[key]) for key, value in buffers(ours).items())
        assert (ours(x).mean() - ours.eval()(x).mean()).abs() > 1e-3 or not training


@pytest.mark.parametrize("name", BATCH)
def test_tracking_switched_on_later_without_buffers(name):
    ours, theirs = make(name, track_running_stats=False)
    for module in (ours, theirs):
        module.track_running_stats = True
    x = torch.randn(TABLE[name][1][0])
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("how", ["requires_grad=False", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", BATCH + INSTANCE)
def test_statistics_move_without_gradients_too(name, how):
    ours, theirs = make(name, track_running_stats=True)
    for module in (ours, theirs):
        module.requires_grad_(False)
    before = buffers(ours)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    x = torch.randn(TABLE[name][1][0]) + 2
    with context():
        torch.testing.assert_close(ours(x), theirs(x))
    assert_same(buffers(ours), buffers(theirs))
    assert not torch.equal(ours.running_mean, before["running_mean"])
    # the buffers are ordinary tensors afterwards
    ours(x.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("name", BATCH + INSTANCE)
def test_evaluation_leaves_the_buffers_alone(name):
    ours = make(name, track_running_stats=True)[0].eval()
    before = buffers(ours)
    ours(torch.randn(TABLE[name][1][0]))
    assert all(torch.equal(value, before[key]) for key, value in buffers(ours).items())


@pytest.mark.parametrize("name", BATCH)
def test_the_buffers_are_updated_in_place(name):
    ours = make(name)[0]
    held = ours.running_mean, ours.running_var, ours.num_batches_tracked
    ours(torch.randn(TABLE[name][1][0]))
    assert all(a is b for a, b in zip(held, ours.buffers(), strict=True))


# Errors.


@pytest.mark.parametrize("name", INSTANCE)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_instance_norm_needs_more_than_one_place_at_evaluation_too(name, training):
    ours, theirs = (module.train(training) for module in make(name))
    for batch in ((3,), (), (0,)):
        x = torch.randn(*batch, 4, *(1 for _ in TABLE[name][1][0][2:]))
        for module in (ours, theirs):
            with pytest.raises(ValueError, match="Expected more than 1 spatial element when training"):
                module(x)
    ours, theirs = (module.eval() for module in make(name, track_running_stats=True))
    x = torch.randn(3, 4, *(1 for _ in TABLE[name][1][0][2:]))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("shape", "fails"), [((1, 4), True), ((1, 4, 1, 1), True), ((2, 4), False), ((1, 4, 2), False)]
)
def test_group_norm_checks_the_size_at_evaluation_too(shape, fails, training):
    ours, theirs = (module.train(training) for module in make("GroupNorm", 4, 4))
    x = torch.randn(shape)
    if not fails:
        torch.testing.assert_close(
            ours(x), theirs(x), atol=2e-3, rtol=0
        )  # one value a group: rounding times 1/sqrt(eps)
        return
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
            module(x)


@pytest.mark.parametrize("name", EAGER)
def test_inputs_that_torch_refuses_are_refused_with_the_same_error(name):
    wrong = {
        "LayerNorm": [(3, 5), (), (6, 3)],
        "RMSNorm": [(3, 5), (6, 3)],
        "GroupNorm": [(4,), (3, 5), (3, 2, 4)],
        "BatchNorm1d": [(4,), (3, 4, 5, 6), (3, 5), (3, 5, 7)],
        "BatchNorm2d": [(3, 4), (3, 4, 5), (3, 5, 2, 2)],
        "BatchNorm3d": [(3, 4), (3, 4, 5, 6), (3, 5, 2, 2, 2)],
        "InstanceNorm1d": [(4,), (3, 4, 5, 6)],
        "InstanceNorm2d": [(4, 5), (3, 4, 5, 6, 7)],
        "InstanceNorm3d": [(4, 5, 6), (4,)],
    }[name]
    ours, theirs = make(name)
    for shape in wrong:
        errors = []
        for module in (ours, theirs):
            with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
                module(torch.randn(shape))
            errors.append(caught.value)
        assert isinstance(errors[0], type(errors[1])), f"{shape}: {errors}"


@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize("eps", [0.0, -1.0])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_eps_must_be_positive_in_training_and_not_negative_at_evaluation(name, eps, training):
    ours, theirs = (module.train(training) for module in make(name, eps=eps))
    x = torch.randn(TABLE[name][1][0])
    if not training and eps == 0:
        torch.testing.assert_close(ours(x), theirs(x))
        return
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="eps must be"):
            module(x)


@pytest.mark.parametrize("name", INSTANCE)
def test_instance_norm_of_other_channels(name):
    x = torch.randn(2, 5, *TABLE[name][1][0][2:])
    for module in make(name, affine=True):
        with pytest.raises(ValueError, match=r"to match num_features \(4\), but got: 5"):
            module(x)
    ours, theirs = make(name)
    with pytest.warns(UserWarning, match="does not match num_features. You can silence"):
        a = ours(x)
    with pytest.warns(UserWarning, match="does not match num_features. You can silence"):
        b = theirs(x)
    torch.testing.assert_close(a, b)


def position_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes without parameters: all but the channels, or the leading ones of layer and RMS norm."""
    if name in ("LayerNorm", "RMSNorm"):
        return shape[:-1]
    channel = len(shape) - len(TABLE[name][1][0]) + 1 if "Instance" in name else 1
    return shape[:channel] + shape[channel + 1 :]


@pytest.mark.parametrize(("name", "shape"), [p.values for p in SHAPED if len(p.values[1]) > 1])
def test_wrong_masks_and_residuals(name, shape):
    ours = make(name)[0].eval()
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="A mask marks valid positions: its shape is"):
        ours(x, mask=torch.ones(99, dtype=torch.bool))
    with pytest.raises(ValueError, match="A mask marks valid positions"):
        ours(x, mask=torch.ones(*shape, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="A mask is bool"):
        ours(x, mask=torch.ones(position_shape(name, shape)))
    with pytest.raises(ValueError, match="residual is added element by element"):
        ours(x, residual=torch.randn(shape)[:1, :1])


# Padding: each twin against itself or torch on the valid positions alone.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [None, "sigmoid"])
@pytest.mark.parametrize(("name", "shape"), [p.values for p in SHAPED if len(p.values[1]) > 1])
def test_padding(name, shape, act, training):
    """NaN in padding reaches nothing; valid positions see the statistics of valid positions (reference); zeros else."""
    kwargs = {"affine": True, "track_running_stats": True} if "Instance" in name else {}
    ours = make(name, act=act, dtype=torch.float64, **kwargs)[0].train(training)
    arrays = {k: v.detach().numpy().copy() for k, v in ours.state_dict().items() if k != "num_batches_tracked"}
    unbatched = "Instance" in name and len(shape) != len(TABLE[name][1][0])
    as_batch = (1, *shape) if unbatched else shape
    positions = position_shape(name, shape)
    mask = torch.rand(positions) > 0.3
    mask.view(-1)[:2] = torch.tensor([True, False])
    channel = {"LayerNorm": -1, "RMSNorm": -1}.get(
        name, len(shape) - len(TABLE[name][1][0]) + 1 if "Instance" in name else 1
    )
    spread = mask.unsqueeze(channel).expand(shape)
    x, residual, dy = (torch.randn(shape, dtype=torch.float64).masked_fill(~spread, float("nan")) for _ in range(3))
    leaves = [x.requires_grad_(), residual.requires_grad_(), *ours.parameters()]
    y = ours(x, residual, mask)
    grads = torch.autograd.grad(y, leaves, dy)
    assert not y[~spread].any()
    assert not grads[0][~spread].any()
    assert not grads[1][~spread].any()
    truth, cache = reference.forward(
        x.detach().numpy().reshape(as_batch),
        ours.spec,
        eps=ours.eps or torch.finfo(torch.float64).eps,
        act=act,
        residual=residual.detach().numpy().reshape(as_batch),
        mask=mask.numpy().reshape((1, *positions) if unbatched else positions),
        use_batch_stats=training or "running_mean" not in arrays,
        **arrays,
    )
    truths = reference.backward(dy.numpy().reshape(as_batch), cache)
    for a, b in zip(
        [y, *grads], [truth, *(truths[k] for k in ("dx", "dresidual", "dweight", "dbias") if k in truths)], strict=True
    ):
        torch.testing.assert_close(a.detach(), torch.as_tensor(b).reshape(a.shape), rtol=1e-9, atol=1e-9)
    for key in ("running_mean", "running_var"):
        if key in arrays:
            torch.testing.assert_close(ours.state_dict()[key], torch.as_tensor(getattr(cache, key)))


@pytest.mark.parametrize("name", BATCH)
def test_batch_norm_with_masked_rows_is_torch_on_the_others(name):
    ours, theirs = make(name, dtype=torch.float64)
    x = torch.randn(8, *TABLE[name][1][-1][1:], dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, True, True, False])
    torch.testing.assert_close(ours(x, mask=mask)[mask], theirs(x[mask]))
    assert_same(buffers(ours), buffers(theirs))
    before = buffers(ours)
    assert not ours(x, mask=torch.zeros(8, dtype=torch.bool)).any()
    after = buffers(ours)
    assert torch.equal(after["running_mean"], before["running_mean"])
    assert torch.equal(after["running_var"], before["running_var"])


# State: checkpoints, versions, pickles, copies.


@pytest.mark.parametrize(("name", "kwargs"), EAGER_PAIRS)
def test_checkpoints_go_both_ways(name, kwargs):
    ours, theirs = make(name, **kwargs)
    randomize(ours)
    fresh = getattr(nn, name)(*TABLE[name][0], **kwargs)
    fresh.load_state_dict(ours.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)
    stream = io.BytesIO()
    torch.save(theirs.state_dict(), stream)
    stream.seek(0)
    ours.load_state_dict(torch.load(stream, weights_only=True))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("name", BATCH + INSTANCE)
def test_version_one_state_has_no_counter(name, version):
    ours, theirs = make(name, affine=True, track_running_stats=True)
    state = theirs.state_dict()
    del state["num_batches_tracked"]
    state._metadata = {"": {} if version is None else {"version": version}}
    ours.num_batches_tracked.fill_(7)
    theirs.num_batches_tracked.fill_(7)
    for module in (ours, theirs):
        module.load_state_dict(copy.deepcopy(state))
    assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)
    assert torch.equal(ours.running_mean, theirs.running_mean)
    state._metadata = {"": {"version": 2}}
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(state)


@pytest.mark.parametrize("name", INSTANCE)
def test_instance_norm_refuses_statistics_that_it_does_not_track(name):
    state = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    for module in make(name):
        with pytest.raises(RuntimeError, match="Unexpected running stats buffer"):
            module.load_state_dict(dict(state))


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("name", ALL)
def test_pickles_and_deep_copies(name, act):
    ours = make(name, act=act)[0]
    x = torch.randn(TABLE[name][1][0])
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    copies = [pickle.loads(pickle.dumps(ours)), torch.load(stream, weights_only=False)]
    if name in EAGER:  # torch refuses to copy parameters that have no size yet
        copies += [copy.deepcopy(ours), copy.copy(ours)]
    expected = ours.eval()(x)
    for again in copies:
        assert type(again) is getattr(nw, name)
        assert again.act == act
        torch.testing.assert_close(again.eval()(x), expected)
        assert repr(again) == repr(ours)


@pytest.mark.parametrize("name", EAGER)
def test_a_torch_module_whose_class_is_set_to_ours_works(name):
    _, theirs = make(name)
    x = torch.randn(TABLE[name][1][0])
    theirs.eval()
    expected = theirs(x)
    theirs.__class__ = getattr(nw, name)
    assert theirs.act is None
    assert theirs.spec.pattern
    torch.testing.assert_close(theirs(x), expected)


@pytest.mark.parametrize("name", BATCH)
def test_convert_sync_batchnorm(name):
    ours, _ = make(name)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(ours))[0]
    assert type(converted) is nn.SyncBatchNorm
    assert converted.weight is ours.weight
    assert converted.running_mean is ours.running_mean
    assert converted.num_batches_tracked is ours.num_batches_tracked


@pytest.mark.parametrize("name", EAGER)
def test_hooks_and_moves(name):
    ours = make(name)[0]
    seen = []
    ours.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    ours.double()(torch.randn(TABLE[name][1][0], dtype=torch.float64))
    ours.to(torch.bfloat16)(torch.randn(TABLE[name][1][0], dtype=torch.bfloat16))
    assert seen == [torch.float64, torch.bfloat16]
    if "num_batches_tracked" in ours.state_dict():
        assert ours.num_batches_tracked.dtype == torch.int64


# Transforms.


@pytest.mark.parametrize("name", EAGER)
def test_autocast(name):
    """Under autocast the type of the result is torch's, and so are the values."""
    ours, theirs = make(name)
    for x in (torch.randn(TABLE[name][1][0]), torch.randn(TABLE[name][1][0]).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's RMSNorm warns of mixed types
            a, b = ours(x), theirs(x)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            ours(leaf).sum().backward()
        assert leaf.grad.dtype == leaf.dtype


FUNC = [p for p in SHAPED if p.values[0] != "GroupNorm" or len(p.values[1]) == 4]


@pytest.mark.parametrize(("name", "shape"), FUNC)
def test_functional_call_grad_and_jacrev(name, shape):
    ours, theirs = (m.eval() for m in make(name, dtype=torch.float64, act=None))
    x = torch.randn(shape, dtype=torch.float64)
    parameters = {k: v.detach() * 1.5 for k, v in theirs.named_parameters()}

    def loss(module):
        return lambda p, x: torch.func.functional_call(module, p, (x,)).pow(3).sum()

    for argnums in (0, 1):
        a, b = (torch.func.grad(loss(m), argnums)(parameters, x) for m in (ours, theirs))
        torch.testing.assert_close(a, b)
    small = x[tuple(slice(0, s) for s in shape)]
    a, b = (torch.func.jacrev(m)(small) for m in (ours, theirs))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize(("name", "shape"), FUNC)
def test_vmap_over_inputs_wherever_torch_allows_it(name, shape, act, training):
    ours, theirs = (m.train(training) for m in make(name, act=act, dtype=torch.float64))
    xs = torch.randn(3, *shape, dtype=torch.float64)
    try:
        expected = torch.func.vmap(theirs, randomness="error")(xs)
    except (RuntimeError, ValueError):
        with pytest.raises((RuntimeError, ValueError)):
            torch.func.vmap(ours)(xs)
        return
    expected = ACT_MODULES[act](expected) if act else expected
    torch.testing.assert_close(torch.func.vmap(ours)(xs), expected)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: ours(x).square().sum()))(xs)
    one_by_one = torch.stack([torch.func.grad(lambda x: ours(x).square().sum())(x) for x in xs])
    torch.testing.assert_close(per_sample, one_by_one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EAGER)
def test_vmap_over_parameters(name):
    """An ensemble of models, as in torch.func.stack_module_state."""
    kwargs = {"affine": True} if "Instance" in name else {}
    pairs = [make(name, **kwargs) for _ in range(3)]
    ours = [a.eval() for a, _ in pairs]
    parameters, states = torch.func.stack_module_state(ours)
    x = torch.randn(TABLE[name][1][0])
    base = copy.deepcopy(ours[0]).to("meta")

    def run(p, b):
        return torch.func.functional_call(base, (p, b), (x,))

    got = torch.func.vmap(run)(parameters, states)
    torch.testing.assert_close(got, torch.stack([b.eval()(x) for _, b in pairs]))


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kernel", ["native", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EAGER)
def test_compile_in_one_graph(name, kernel, training, compiler):
    """Forward, backward and buffers by the traced graph, with activation, residual and mask."""
    shape = TABLE[name][1][-1 if name == "GroupNorm" else 0]  # two values a group would be badly conditioned
    with nw.use(kernel):
        compare_compiled(name, shape, training)


def compare_compiled(name, shape, training):
    x, residual = torch.randn(2, *shape).unbind()
    mask = torch.ones(position_shape(name, shape), dtype=torch.bool)
    mask.view(-1)[1] = False
    for extra in ((), (residual,), (residual, mask)):
        ours = make(name, act="silu" if extra else None)[0].train(training)
        twin = copy.deepcopy(ours)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = compiled(a, *extra), twin(b, *extra)
        torch.testing.assert_close(ya, yb)
        for ga, gb in zip(
            torch.autograd.grad(ya.square().sum(), [a, *ours.parameters()]),
            torch.autograd.grad(yb.square().sum(), [b, *twin.parameters()]),
            strict=True,
        ):
            torch.testing.assert_close(ga, gb, rtol=1e-4, atol=1e-5)
        assert_same(buffers(ours), buffers(twin))


def test_compile_with_changing_batch_size_and_momentum_none(compiler):
    with nw.use("native"):
        compare_changing_batch_size()


def compare_changing_batch_size():
    for momentum in (0.1, None):
        ours = nw.BatchNorm2d(3, momentum=momentum, act="relu")
        theirs = nn.BatchNorm2d(3, momentum=momentum)
        compiled = torch.compile(ours, backend="aot_eager", dynamic=True)
        for n in (2, 3, 5):
            x = torch.randn(n, 3, 4, 4)
            torch.testing.assert_close(compiled(x), theirs(x).relu())
        assert_same(buffers(ours), buffers(theirs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
def test_compile_with_inductor(compiler):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nw.BatchNorm2d(4, act="relu"), nw.GroupNorm(2, 4), nw.LayerNorm(6))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)
    assert_same(buffers(model), buffers(eager))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", EAGER)
def test_export(name, training):
    ours = make(name, act="gelu")[0].train(training)
    shape = TABLE[name][1][0]
    x, residual = torch.randn(2, *shape).unbind()
    program = torch.export.export(copy.deepcopy(ours), (x, residual))
    module = program.module(check_guards=False)
    torch.testing.assert_close(module(x, residual), ours(x, residual))
    if training and name in BATCH:
        assert_same(buffers(module), buffers(ours))


def test_export_with_a_dynamic_batch():
    ours = nw.BatchNorm2d(4, act="relu").eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(ours, (torch.randn(3, 4, 5, 5),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(7, 4, 5, 5)
    torch.testing.assert_close(program.module()(x), ours(x))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") for target in targets), targets  # the native path


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("name", EAGER)
def test_script(name, act, training):
    """TorchScript gets torch's module, the activation behind it; a residual or mask is refused there."""
    ours = make(name, act=act, **({"track_running_stats": True} if "Instance" in name else {}))[0].train(training)
    scripted = torch.jit.script(nn.Sequential(copy.deepcopy(ours)))
    x = torch.randn(TABLE[name][1][0])
    torch.testing.assert_close(scripted(x), ours(x))
    for a, b in zip(scripted.state_dict().values(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    alone = torch.jit.script(copy.deepcopy(ours))
    torch.testing.assert_close(alone(x), ours(x))
    with pytest.raises(RuntimeError):
        alone(x, x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", EAGER)
def test_trace(name):
    ours = make(name, act="relu")[0].eval()
    x = torch.randn(TABLE[name][1][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(ours, (x,))
    other = torch.randn(TABLE[name][1][0])
    torch.testing.assert_close(traced(other), ours(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", EAGER)
def test_onnx(name, tmp_path):
    """Exported through the native path; onnxruntime computes the same."""
    runtime = pytest.importorskip("onnxruntime")
    kwargs = {"affine": True} if "Instance" in name else {}
    ours = make(name, act="relu", **kwargs)[0].eval()
    shape = TABLE[name][1][0]
    path = tmp_path / "norm.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxscript's own
        torch.onnx.export(ours, (torch.randn(shape),), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(shape)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.as_tensor(y), ours(x), x.numel(), scale=1.0)


def test_explain_names_the_kernel_and_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nw.BatchNorm1d(4, act="relu"), nw.LayerNorm(4))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 4)
    with nw.use("native"):
        said = nw.explain(model, x)
    assert said.kernel == "native"
    assert [choice.where for choice in said.choices] == ["1", "2"]
    assert "'[b] c [s...]' on (5, 4) runs on native" in str(said)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_kernel_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"A kernel is one of .*'native', or None for the best; got 'warp'"):
        nw.use("warp")
