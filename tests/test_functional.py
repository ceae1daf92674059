"""functional.normalize against the NumPy reference in float64: every row, layout, type, activation, residual, mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import assert_close, tolerance

import normwright as nw
from normwright import reference
from normwright.catalog import CATALOG
from normwright.functional import ACTIVATIONS

ROWS = [row for row in CATALOG.values() if row.spec is not None]
EXAMPLES = [
    pytest.param(row.make(**sizes), shape, id=f"{row.name}-{'x'.join(map(str, shape))}")
    for row in ROWS
    for shape, sizes in row.examples
]
# one shape a row, for the tests that vary something else
ONE_EACH = [pytest.param(row.make(**row.examples[-1][1]), row.examples[-1][0], id=row.name) for row in ROWS]
ACTS = [None, *ACTIVATIONS]


class Problem:
    """Inputs of one call, made from a seed, in the given type; the truth sees exactly the rounded values."""

    def __init__(self, spec, shape, dtype=torch.float64, *, mean=0.5, deviation=2.0, param=None, residual=False,
                 mask=0, act=None, seed=0, eps=1e-5, bias=True):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        layout = spec.layout(shape)
        param = param or dtype
        self.spec, self.layout, self.act, self.eps = spec, layout, act, eps

        def normal(size):
            return torch.randn(size, generator=g, dtype=torch.float64)

        self.x = (mean + deviation * normal(shape)).to(dtype)
        self.weight = (1.0 + 0.5 * normal(layout.affine_shape)).to(param)
        self.bias = normal(layout.affine_shape).to(param) if bias and spec.center else None
        self.residual = normal(shape).to(dtype) if residual else None
        self.dy = normal(shape).to(dtype)
        self.mask = None
        if mask:
            allowed = [shape[d] for d in layout.position_dims][: mask if mask < 9 else None]
            self.mask = torch.rand(allowed, generator=g) > 0.4
            self.mask.view(-1)[0] = True
        if act in ("relu", "leaky_relu") and residual:
            # keep away from the kink, where half a rounding turns the gradient over
            _, cache = self.reference()
            z = torch.as_tensor(cache.z.reshape(shape))
            self.residual = torch.where(z.abs() < 0.2, self.residual + 0.5 * z.sign(), self.residual).to(dtype)

    @staticmethod
    def numpy(t):
        return None if t is None else t.detach().to(torch.float64).numpy() if t.dtype != torch.bool else t.numpy()

    def reference(self, **more):
        arrays = {name: self.numpy(getattr(self, name)) for name in ("weight", "bias", "residual", "mask")
                  if hasattr(self, name)}  # fmt: skip
        return reference.forward(self.numpy(self.x), self.spec, eps=self.eps, act=self.act, **arrays, **more)

    def leaves(self):
        named = {"dx": self.x, "dweight": self.weight, "dbias": self.bias, "dresidual": self.residual}
        return {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}

    def run(self, leaves, **more):
        return nw.normalize(
            leaves["dx"],
            self.spec,
            leaves["dweight"],
            leaves.get("dbias"),
            eps=self.eps,
            act=self.act,
            residual=leaves.get("dresidual"),
            mask=self.mask,
            **more,
        )

    def check(self, dtype=None, **more):
        """Forward and backward within tolerance; types and shapes as the inputs'."""
        dtype = dtype or self.x.dtype
        arrays = {k: self.numpy(v) if isinstance(v, torch.Tensor) else v for k, v in more.items()}
        truth, cache = self.reference(**arrays)
        condition = max(1.0, np.abs(cache.mean * cache.r).max(initial=0.0))
        leaves = self.leaves()
        y = self.run(leaves, **more)
        assert y.dtype == self.x.dtype
        n = max(1, self.layout.count)
        assert_close(y, truth, n, condition=condition, scale=1.0, what="y")
        grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), self.dy), strict=True))
        truths = reference.backward(self.numpy(self.dy), cache)
        per_parameter = max(1, self.x.numel() // max(1, self.weight.numel()))
        rstd, weight, dy = (np.abs(a).max(initial=0.0) for a in (cache.r, self.numpy(self.weight), self.numpy(self.dy)))
        for name, grad in grads.items():
            assert grad.dtype == leaves[name].dtype, name
            if name == "dx":  # what cancels in dx is dy · weight / deviation
                assert_close(grad, truths[name], n, condition=condition, scale=float(rstd * weight * dy), what=name)
            elif name == "dresidual":
                assert_close(grad, truths[name], n, condition=condition, scale=float(dy), what=name)
            else:
                # each term carries the rounding of the stored type where the activation was computed in it
                assert_close(grad, truths[name], per_parameter, dtype=dtype, condition=condition,
                             scale=float(dy) * per_parameter**0.5, what=name)  # fmt: skip
        return y, grads


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("spec", "shape"), EXAMPLES)
def test_every_row_and_activation(spec, shape, act):
    Problem(spec, shape, act=act).check()


@pytest.mark.parametrize("mask", [0, 1, 9], ids=["", "mask-b", "mask-bs"])
@pytest.mark.parametrize("act", [None, "relu", "sigmoid", "gelu"])
@pytest.mark.parametrize(("spec", "shape"), EXAMPLES)
def test_residual_and_mask(spec, shape, act, mask):
    Problem(spec, shape, act=act, residual=True, mask=mask).check()
    if mask:
        Problem(spec, shape, act=act, mask=mask).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extra", [{}, {"residual": True, "act": "relu"}, {"mask": 9, "act": "silu"}], ids=str)
@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_types(spec, shape, extra, dtype):
    Problem(spec, shape, dtype, **extra).check()
    if dtype != torch.float32:  # parameters stay in float32, as under mixed precision
        Problem(spec, shape, dtype, param=torch.float32, **extra).check(dtype)


@pytest.mark.parametrize("mask", [0, 9], ids=["", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_large_mean(spec, shape, dtype, mask):
    """At mean 3000 and deviation 1 a variance in one pass of float32 is off by a factor of three."""
    big = tuple(size * (4 if i not in (1, len(shape) - 1) else 1) for i, size in enumerate(shape))
    Problem(spec, big, dtype, mean=3000.0, deviation=1.0, mask=mask).check()


@pytest.mark.parametrize("mask", [0, 9], ids=["", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("deviation", [1e-3, 1e-6, 0.0])
@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_tiny_variance(spec, shape, deviation, dtype, mask):
    """Below the square root of eps, eps decides; a constant input gives the bias, and no value that is not finite."""
    Problem(spec, shape, dtype, mean=0.0, deviation=deviation, mask=mask).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_statistics_of_half_types_are_float32(spec, shape, dtype):
    """Squares of 1000 overflow float16, and a sum of them in bfloat16 stops growing after 256 terms."""
    longer = (*shape[:-1], 1024) if spec.parsed.dims[-1][0].reduced else shape
    Problem(spec, longer, dtype, mean=0.0, deviation=1000.0, param=torch.float32).check(dtype)


SIZES = [
    ("[b] c [s...]", "c", {}, [(2, 1), (1, 1, 2), (7, 3, 1), (3, 1, 5, 7), (2, 17, 1, 1), (33, 5), (2, 3, 130)]),
    ("b c [s...]", "c", {}, [(1, 1, 2), (2, 3, 1), (1, 5, 7, 3)]),
    ("b (g [c]) [s...]", "(g c)", {"g": 1}, [(1, 2), (2, 1, 3), (1, 7, 5)]),
    ("b (g [c]) [s...]", "(g c)", {"g": 5}, [(2, 5), (3, 15, 1), (1, 35, 2, 3)]),
    ("b... [c]", "c", {}, [(1,), (7,), (2, 1), (5, 131), (2, 1, 3, 3)]),
    ("b [c] s...", "c", {}, [(1, 1), (3, 1, 2), (1, 33, 5)]),
    ("b... [d0 d1]", "d0 d1", {}, [(3, 4), (2, 3, 5, 7), (2, 1, 1)]),
]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("pattern", "affine", "sizes", "shape"), [(p, a, s, shape) for p, a, s, shapes in SIZES for shape in shapes]
)
def test_odd_and_single_sizes(pattern, affine, sizes, shape, dtype, center):
    spec = nw.NormSpec(pattern, affine, center=center, sizes=sizes)
    Problem(spec, shape, dtype, act="silu", residual=True).check()


@pytest.mark.parametrize(
    ("pattern", "affine", "sizes", "shape"),
    [
        ("[a] b [c] d", "b d", {}, (3, 2, 4, 5)),  # reduced axes apart, parameters on two axes
        ("a [b] (c [d] e) [f]", "c e", {"c": 2, "e": 3}, (2, 3, 12, 2)),
        ("[a b]", "", {}, (3, 4)),
        ("[s...] c", "c", {}, (3, 4, 5)),
        ("b [c] s...", "b c", {}, (3, 4, 2)),
        ("[b] (k c) [s...]", "k c", {"k": 2}, (4, 6, 3)),  # the parameter stored on two axes
        ("b... [c]", "b... c", {}, (2, 3, 4)),
        ("[(a b) c] d", "d", {"a": 2}, (4, 3, 2)),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_patterns_that_no_named_layer_has(pattern, affine, sizes, shape, residual):
    spec = nw.NormSpec(pattern, affine, sizes=sizes)
    Problem(spec, shape, act="tanh", residual=residual).check()
    if spec.layout(shape).position_dims:
        Problem(spec, shape, act="tanh", residual=residual, mask=1).check()


# Memory.


def layouts(t: torch.Tensor):
    """The same values in other strides: (name, tensor)."""
    padded = torch.full([size + 2 for size in t.shape], float("nan"), dtype=t.dtype)
    inner = padded[tuple(slice(1, size + 1) for size in t.shape)]
    inner.copy_(t)
    yield "sliced", inner
    order = list(range(t.dim()))[::-1]
    yield "transposed", t.permute(order).contiguous().permute(order)
    strided = torch.empty((*t.shape, 2), dtype=t.dtype)
    strided[..., 0] = t
    yield "strided", strided[..., 0]
    if t.dim() > 2:
        last = (0, *range(2, t.dim()), 1)
        back = (0, t.dim() - 1, *range(1, t.dim() - 1))
        yield "channels_last", t.permute(last).contiguous().permute(back)


@pytest.mark.parametrize("extra", [{}, {"residual": True, "act": "relu"}, {"mask": 9}], ids=str)
@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_strides_change_nothing_but_the_strides(spec, shape, extra):
    plain = Problem(spec, shape, torch.float32, **extra)
    for name, x in layouts(plain.x):
        problem = Problem(spec, shape, torch.float32, **extra)
        problem.x = x
        problem.check()
        problem.dy = dict(layouts(plain.dy))[name]
        problem.check()
        if plain.residual is not None:
            problem.residual = dict(layouts(plain.residual))["transposed"]
            problem.check()


@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_expanded_input_and_expanded_gradient(spec, shape):
    problem = Problem(spec, shape)
    problem.x = problem.x[:1].expand(shape)
    problem.dy = torch.ones((), dtype=torch.float64).expand(shape)
    problem.check()
    leaves = problem.leaves()
    problem.run(leaves).sum().backward()
    truths = reference.backward(np.ones(shape), problem.reference()[1])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, torch.as_tensor(truths[name]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "format", [torch.contiguous_format, torch.channels_last, torch.channels_last_3d], ids=lambda f: str(f)[6:]
)
@pytest.mark.parametrize("extra", [{}, {"residual": True, "act": "relu"}, {"mask": 9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [row for row in ROWS if "s..." in row.spec.pattern], ids=lambda row: row.name)
def test_memory_format_is_kept_forward_and_backward(row, dtype, extra, format):
    sizes = row.examples[-1][1]
    shape = (6, 12, 3, 2, 5) if format == torch.channels_last_3d else (6, 12, 3, 5)
    problem = Problem(row.make(**sizes), shape, dtype, **extra)
    problem.x, problem.dy = (t.to(memory_format=format) for t in (problem.x, problem.dy))
    if problem.residual is not None:
        problem.residual = problem.residual.to(memory_format=format)
    y, grads = problem.check()
    assert y.is_contiguous(memory_format=format)
    assert grads["dx"].is_contiguous(memory_format=format)


# Running statistics.

TRACKED = [row for row in ROWS if row.spec.running]


@pytest.mark.parametrize("mask", [0, 1, 9], ids=["", "mask-b", "mask-bs"])
@pytest.mark.parametrize("new_weight", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("row", TRACKED, ids=lambda row: row.name)
def test_running_statistics_move_as_the_reference_says(row, new_weight, mask):
    for shape, sizes in row.examples:
        problem = Problem(row.make(**sizes), shape, mask=mask)
        size = problem.layout.running_shape
        buffers = {"running_mean": torch.randn(size, dtype=torch.float64),
                   "running_var": torch.rand(size, dtype=torch.float64) + 0.5}  # fmt: skip
        _, cache = problem.reference(new_weight=new_weight, **{k: v.numpy() for k, v in buffers.items()})
        problem.check(new_weight=new_weight, **{k: v.clone() for k, v in buffers.items()})
        moved = {k: v.clone() for k, v in buffers.items()}
        nw.normalize(problem.x, problem.spec, mask=problem.mask, new_weight=new_weight, **moved)
        assert_close(moved["running_mean"], cache.running_mean, problem.layout.count)
        assert_close(moved["running_var"], cache.running_var, problem.layout.count)


@pytest.mark.parametrize("mask", [0, 9], ids=["", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", TRACKED, ids=lambda row: row.name)
def test_running_statistics_are_used_and_left_alone_without_batch_statistics(row, dtype, mask):
    for shape, sizes in row.examples:
        problem = Problem(row.make(**sizes), shape, dtype, param=torch.float32 if dtype == torch.bfloat16 else dtype,
                          mask=mask, act="silu")  # fmt: skip
        size = problem.layout.running_shape
        param = problem.weight.dtype
        buffers = {"running_mean": torch.randn(size).to(param), "running_var": (torch.rand(size) + 0.5).to(param)}
        before = {k: v.clone() for k, v in buffers.items()}
        problem.check(dtype, use_batch_stats=False, **buffers)
        assert all(torch.equal(buffers[k], before[k]) for k in buffers)


def test_uncentred_running_statistics():
    spec = nw.NormSpec("[b] c", "c", center=False, running="c")
    problem = Problem(spec, (5, 3))
    running_var = torch.full((3,), 2.0, dtype=torch.float64)
    nw.normalize(problem.x, spec, running_var=running_var, new_weight=0.25)
    expected = 0.75 * 2.0 + 0.25 * problem.x.square().mean(0)  # the mean square needs no n / (n − 1)
    torch.testing.assert_close(running_var, expected)
    y = nw.normalize(problem.x, spec, running_var=running_var, use_batch_stats=False)
    torch.testing.assert_close(y, problem.x / (running_var + 1e-5).sqrt())


# Padding.


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_padding_is_never_read(spec, shape, poison, act):
    """What padding holds changes no bit of output, gradient, or running statistics, second order included."""

    def run(value):
        problem = Problem(spec, shape, act=act, residual=True, mask=9)
        view = problem.layout.mask_view(tuple(problem.mask.shape))
        padding = ~problem.mask.reshape(view).expand(problem.layout.split).reshape(shape)
        assert padding.any()
        for t in (problem.x, problem.residual, problem.dy):
            t[padding] = value
        buffers = {}
        if spec.running:
            size = problem.layout.running_shape
            buffers = {k: torch.ones(size, dtype=torch.float64) for k in ("running_mean", "running_var")}
        leaves = problem.leaves()
        y = problem.run(leaves, **buffers)
        dy = problem.dy.clone().requires_grad_()
        grads = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves["dx"])
        assert not y[padding].any()
        assert not grads[0][padding].any()
        assert not grads[-1][padding].any()
        return [y, *grads, *second, *buffers.values()]

    for clean, dirty in zip(run(0.0), run(poison), strict=True):
        assert torch.isfinite(dirty).all()
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("act", [None, "sigmoid"])
@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_everything_masked(spec, shape, act):
    problem = Problem(spec, shape, act=act, residual=True, mask=1)
    problem.mask[:] = False
    buffers = {}
    if spec.running:
        size = problem.layout.running_shape
        buffers = {k: torch.full(size, 3.0, dtype=torch.float64) for k in ("running_mean", "running_var")}
    y, grads = problem.check(**buffers)
    assert not y.any()
    assert not any(grad.any() for grad in grads.values())
    assert all((value == 3.0).all() for value in buffers.values())


@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_a_mask_of_ones_changes_nothing(spec, shape):
    plain, masked = Problem(spec, shape, act="gelu"), Problem(spec, shape, act="gelu")
    masked.mask = torch.ones(shape[0], dtype=torch.bool)
    for a, b in zip(plain.check()[:1], masked.check()[:1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_batch_norm_with_a_mask_is_batch_norm_of_the_valid_rows():
    x, mask = torch.randn(6, 3, 5, dtype=torch.float64), torch.rand(6, 5) > 0.3
    y = nw.normalize(x, CATALOG["BatchNorm"].spec, mask=mask)
    rows = x.movedim(1, -1)[mask]
    truth = torch.nn.functional.batch_norm(rows, None, None, training=True)
    torch.testing.assert_close(y.movedim(1, -1)[mask], truth)


# Second order.


@pytest.mark.parametrize("extra", [{}, {"residual": True, "act": "tanh"}, {"mask": 9, "act": "silu"}], ids=str)
@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_double_backward(spec, shape, extra):
    problem = Problem(spec, shape, **extra)
    leaves = problem.leaves()

    def run(*tensors):
        return problem.run(dict(zip(leaves, tensors, strict=True)))

    tensors = tuple(leaves.values())
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("row", TRACKED, ids=lambda row: row.name)
def test_double_backward_with_running_statistics(row):
    shape, sizes = row.examples[-1]
    problem = Problem(row.make(**sizes), shape, act="sigmoid")
    leaves = problem.leaves()
    size = problem.layout.running_shape

    def run(*tensors):
        return problem.run(
            dict(zip(leaves, tensors, strict=True)),
            use_batch_stats=False,
            running_mean=torch.full(size, 0.3, dtype=torch.float64),
            running_var=torch.full(size, 1.7, dtype=torch.float64),
        )

    assert torch.autograd.gradgradcheck(run, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_gradients_only_where_asked(spec, shape):
    problem = Problem(spec, shape, residual=True, act="relu")
    _, all_grads = problem.check()
    for name in all_grads:
        leaves = {k: t.detach().requires_grad_(k == name) for k, t in problem.leaves().items()}
        (grad,) = torch.autograd.grad(problem.run(leaves), leaves[name], problem.dy)
        torch.testing.assert_close(grad, all_grads[name], rtol=1e-12, atol=1e-12)
    assert not problem.run({k: t.detach() for k, t in problem.leaves().items()}).requires_grad


# Empty input.


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    ("spec", "shape", "where"),
    [
        pytest.param(*row.values, where, id=f"{row.id}{where}")
        for row in ONE_EACH
        for where in (0, -1)
        if where == 0 or "s..." in row.values[0].pattern
    ],
)
def test_empty_input(spec, shape, where, mask):
    """An empty batch: empty output, zero parameter gradients, running statistics as they were."""
    empty = list(shape)
    empty[where] = 0
    problem = Problem(spec, tuple(empty), torch.float32)
    # the parameters keep their size, whatever is empty
    problem.weight = torch.ones(spec.layout(shape).affine_shape)
    problem.bias = torch.ones(spec.layout(shape).affine_shape) if spec.center else None
    problem.mask = torch.ones(empty[0], dtype=torch.bool) if mask else None
    buffers = {}
    if spec.running:
        buffers = {k: torch.full(spec.layout(shape).running_shape, 3.0) for k in ("running_mean", "running_var")}
    leaves = problem.leaves()
    y = problem.run(leaves, **buffers)
    assert y.shape == tuple(empty)
    y.sum().backward()
    assert leaves["dx"].grad.shape == tuple(empty)
    assert torch.equal(leaves["dweight"].grad, torch.zeros_like(leaves["dweight"]))
    assert all((value == 3.0).all() for value in buffers.values())


# K networks in one.


def packed(x, dy, weight, bias, spec, mask):
    """Output, gradient and running statistics of one step."""
    size = weight.numel()
    mean, var = torch.zeros(size), torch.ones(size)
    leaf = x.clone().requires_grad_()
    y = nw.normalize(leaf, spec, weight, bias, running_mean=mean, running_var=var, mask=mask)
    (grad,) = torch.autograd.grad(y, leaf, dy)
    return y.detach(), grad, mean[None], var[None]


@pytest.mark.parametrize("shape", [(6, 12), (5, 12, 7), (4, 12, 3, 5)])
@pytest.mark.parametrize("mask", [False, True], ids=["", "mask"])
def test_packed_batch_norm_is_k_independent_ones(shape, mask):
    k, c = 3, 4
    spec, alone = CATALOG["PackedBatchNorm"].make(k=k), CATALOG["BatchNorm"].spec
    x, dy, (weight, bias) = torch.randn(shape) * 3 + 1, torch.randn(shape), torch.randn(2, k * c)
    valid = (torch.rand(shape[0]) > 0.3) if mask else None
    together = packed(x, dy, weight, bias, spec, valid)
    for i in range(k):
        part = slice(i * c, (i + 1) * c)
        for a, b in zip(together, packed(x[:, part], dy[:, part], weight[part], bias[part], alone, valid), strict=True):
            assert_close(a[:, part], b, x[:, 0].numel(), scale=1.0)
        # exactly independent: what the others are given changes no bit
        others = x.clone()
        others[:, : i * c] = 1e4
        others[:, (i + 1) * c :] = -7.0
        for a, b in zip(together, packed(others, dy, weight, bias, spec, valid), strict=True):
            assert torch.equal(a[:, part], b[:, part])


@pytest.mark.parametrize("shape", [(5, 12, 7), (4, 12, 3, 5)])
def test_packed_batch_norm_is_bitwise_the_same_on_the_native_kernel(shape):
    x, dy, (weight, bias) = torch.randn(shape) * 3 + 1, torch.randn(shape), torch.randn(2, 12)
    with nw.use("native"):
        together = packed(x, dy, weight, bias, CATALOG["PackedBatchNorm"].make(k=3), None)
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
            own = x[:, part].contiguous(), dy[:, part].contiguous(), weight[part], bias[part]
            one = packed(*own, CATALOG["BatchNorm"].spec, None)
            assert all(torch.equal(a[:, part], b) for a, b in zip(together, one, strict=True))


# Errors and small print.


def test_residual_of_another_type_does_not_change_the_type_of_the_result():
    x, residual = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4, 3)
    for mask in (None, torch.tensor([True, True, True, False])):
        y = nw.normalize(x, CATALOG["BatchNorm"].spec, residual=residual, mask=mask)
        assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("act", ["Relu", "swish", "", 3])
def test_unknown_activation_is_named_with_those_that_exist(act):
    with pytest.raises(ValueError, match="act is None or one of 'relu', 'leaky_relu'") as caught:
        nw.normalize(torch.randn(4, 3), CATALOG["BatchNorm"].spec, act=act)
    assert repr(act) in str(caught.value)


def test_residual_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"input's shape \(4, 3\); got \(4, 1\)"):
        nw.normalize(torch.randn(4, 3), CATALOG["BatchNorm"].spec, residual=torch.randn(4, 1))


@pytest.mark.parametrize("have", [{}, {"running_mean": torch.zeros(3)}, {"running_var": torch.ones(3)}])
def test_missing_statistics_are_refused(have):
    with pytest.raises(ValueError, match="Without batch statistics the running mean and variance are needed"):
        nw.normalize(torch.randn(4, 3), CATALOG["BatchNorm"].spec, use_batch_stats=False, **have)


def test_mask_of_another_shape_or_type_is_refused():
    x, spec = torch.randn(4, 3, 5), CATALOG["BatchNorm"].spec
    with pytest.raises(ValueError, match=r"its shape is \(4,\) or \(4, 5\).*got \(5,\)"):
        nw.normalize(x, spec, mask=torch.ones(5, dtype=torch.bool))
    for wrong in (torch.float32, torch.int64):
        with pytest.raises(ValueError, match="A mask is bool, True at valid"):
            nw.normalize(x, spec, mask=torch.ones(4, dtype=wrong))


@pytest.mark.parametrize("mask", [None, torch.ones(4, dtype=torch.bool)], ids=["", "mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_only_floating_point_is_normalized(dtype, mask):
    with pytest.raises(TypeError, match="takes floating-point tensors; got torch"):
        nw.normalize(torch.ones(4, 3).to(dtype), CATALOG["BatchNorm"].spec, mask=mask)


def test_shape_that_does_not_fit_the_pattern():
    with pytest.raises(nw.PatternError, match="at least 2 dimensions"):
        nw.normalize(torch.randn(4), CATALOG["BatchNorm"].spec)
    with pytest.raises(nw.PatternError, match="not divisible by g=4"):
        nw.normalize(torch.randn(2, 6, 3), CATALOG["GroupNorm"].make(g=4))


@pytest.mark.parametrize("act", ACTS)
def test_activate_is_the_reference(act):
    z = torch.linspace(-8, 8, 101, dtype=torch.float64, requires_grad=True)
    y = nw.activate(z, act)
    truth = reference.act_forward(z.detach().numpy(), act)
    assert_close(y, truth, 1)
    (grad,) = torch.autograd.grad(y.sum(), z)
    assert_close(grad, reference.act_backward(np.ones(101), z.detach().numpy(), act), 1)


@pytest.mark.parametrize(("spec", "shape"), ONE_EACH)
def test_the_input_is_not_written_to(spec, shape):
    problem = Problem(spec, shape, residual=True, mask=9, act="relu")
    before = [t.clone() for t in (problem.x, problem.residual, problem.mask, problem.weight)]
    problem.check()
    for a, b in zip(before, (problem.x, problem.residual, problem.mask, problem.weight), strict=True):
        assert torch.equal(a, b)


def test_tolerance_grows_as_it_says():
    eps = torch.finfo(torch.float32).eps
    assert tolerance(torch.float32, 100) == pytest.approx(8 * eps * 12)
    assert tolerance(torch.bfloat16, 1) == pytest.approx(8 * (torch.finfo(torch.bfloat16).eps + 2 * eps))
    assert tolerance(torch.float64, 1) < 1e-14
    with pytest.raises(AssertionError, match="off by"):
        assert_close(torch.ones(3), torch.ones(3) + 1e-4, 1)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(torch.full((3,), float("nan")), torch.ones(3), 1)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(3), torch.ones(3, 1), 1)
