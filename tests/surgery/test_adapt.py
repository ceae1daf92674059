"""adapt against the papers' formulas and autograd by hand, and the promise that closing leaves no trace."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import normwright as nw
from normwright.surgery.adapt import METHODS, adapt

SGD = partial(torch.optim.SGD, lr=0.1)


def net(norm=nn.BatchNorm2d):
    """Two norms with statistics and affine parameters that are not those of a new layer, dropout between."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        norm(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    for module in (model[1], model[5]):
        for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
            tensor.data.uniform_(0.5, 1.5)
    return model.double()


def images(n=9, seed=0):
    return torch.randn(n, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def standardized(x, mean, var, layer):
    """A batch norm written out."""
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + layer.eps)
    return x * layer.weight.view(shape) + layer.bias.view(shape)


def by_hand(model, x, statistics):
    """The net with each batch norm's mean and variance from `statistics(layer, input)`; no dropout."""
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            x = standardized(x, *statistics(module, x), module)
        elif not isinstance(module, nn.Dropout):
            x = module(x)
    return x


def moments(x, correction):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=correction)


def bits(model):
    """All that must come back: tensors by identity, storage and value, modes, hooks, requires_grad, gradients."""
    state = {k: (id(v), v.data_ptr(), v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    grads = {k: (p.requires_grad, p.grad) for k, p in model.named_parameters()}
    modules = [(m.training, list(m._forward_pre_hooks), list(m._forward_hooks), list(vars(m))) for m in model.modules()]
    options = [{k: v for k, v in vars(m).items() if isinstance(v, (int, float, str))} for m in model.modules()]
    with_kwargs = [list(m._forward_pre_hooks_with_kwargs) for m in model.modules()]
    return state, grads, modules, options, with_kwargs


def assert_same(a, b):
    assert a[0].keys() == b[0].keys()
    for key, (identity, pointer, value) in a[0].items():
        assert b[0][key][:2] == (identity, pointer), key
        assert torch.equal(b[0][key][2], value), key
    for key, (needed, grad) in a[1].items():
        assert b[1][key][0] == needed
        assert b[1][key][1] is grad
    assert a[2:] == b[2:]


# ------------------------------------------------------------------------------------------------------- the formulas


def test_batch_normalizes_by_the_biased_statistics_of_the_batch():
    model, x = net(), images()
    expected = by_hand(model, x, lambda layer, h: moments(h, 0))
    with adapt(model, "batch") as adapted:
        torch.testing.assert_close(adapted(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kwargs", "share"), [({}, 16 / 25), ({"source_size": 3}, 3 / 12), ({"alpha": 0.7}, 0.7)])
def test_blend_is_the_papers_formula(kwargs, share):
    model, x = net(), images(9)

    def mixed(layer, h):
        mean, var = moments(h, 1)
        source = layer.running_mean, layer.running_var
        return share * source[0] + (1 - share) * mean, share * source[1] + (1 - share) * var

    expected = by_hand(model, x, mixed)
    with adapt(model, "blend", **kwargs) as adapted:
        for _ in range(2):  # nothing accumulates
            torch.testing.assert_close(adapted(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_ema_averages_over_the_stream_and_reset_forgets_it(momentum):
    model, stream = net(), [images(9, seed) for seed in range(3)]
    state = {id(m): [m.running_mean, m.running_var] for m in (model[1], model[5])}
    calls = dict.fromkeys(state, 0)

    def moved(layer, h):
        calls[id(layer)] += 1
        weight = 1 / calls[id(layer)] if momentum is None else momentum
        old, new = state[id(layer)], moments(h, 1)
        state[id(layer)] = [(1 - weight) * a + weight * b for a, b in zip(old, new, strict=True)]
        return state[id(layer)]

    expected = [by_hand(model, x, moved) for x in stream]
    with adapt(model, "ema", momentum=momentum) as adapted:
        for x, y in zip(stream, expected, strict=True):
            torch.testing.assert_close(adapted(x), y, rtol=1e-12, atol=1e-12)
        adapted.reset()
        torch.testing.assert_close(adapted(stream[0]), expected[0], rtol=1e-12, atol=1e-12)
    with adapt(model, "ema", momentum=momentum, episodic=True) as adapted:
        adapted(stream[1])
        torch.testing.assert_close(adapted(stream[0]), expected[0], rtol=1e-12, atol=1e-12)


def entropy(logits):
    p = logits.softmax(1)
    return -(p * p.log()).sum(1).mean()


def test_tent_is_gradient_descent_on_the_entropy_over_affine_parameters_alone():
    model, stream = net(), [images(9, seed) for seed in range(3)]
    twin = copy.deepcopy(model)
    trained = [twin[1].weight, twin[1].bias, twin[5].weight, twin[5].bias]
    with adapt(model, "tent", optimizer=SGD) as adapted, torch.no_grad():
        for x in stream:
            with torch.enable_grad():
                y = by_hand(twin, x, lambda layer, h: moments(h, 0))
                gradients = torch.autograd.grad(entropy(y), trained)
            for p, g in zip(trained, gradients, strict=True):
                p.data -= 0.1 * g
            out = adapted(x)
            assert not out.requires_grad
            torch.testing.assert_close(out, y.detach(), rtol=1e-10, atol=1e-10)
        got = dict(model.named_parameters())
        for name, p in twin.named_parameters():
            torch.testing.assert_close(
                got[name], p.detach().requires_grad_(got[name].requires_grad), rtol=1e-10, atol=0
            )
        assert {n for n, p in got.items() if p.requires_grad} == {"1.weight", "1.bias", "5.weight", "5.bias"}
        assert adapted.receipt.facts == {"calls": 3, "calls on source statistics": 0, "steps": 3}
    assert not torch.equal(twin[1].weight, model[1].weight)


def test_tent_takes_several_steps_and_starts_anew_when_episodic():
    model, x = net(), images()
    with adapt(model, "tent", optimizer=SGD) as adapted:
        adapted(x)
        second = adapted(x)
    with adapt(model, "tent", optimizer=SGD, steps=2, episodic=True) as adapted:
        for _ in range(2):
            assert torch.equal(adapted(x), second)
        assert adapted.receipt.facts["steps"] == 4
    with adapt(model, "tent", lr=0.01) as adapted:  # Adam's first step is lr, whatever the gradient
        adapted(x)
        moved = (model[5].weight - adapted._source[2]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)
        adapted.reset()
        assert torch.equal(model[5].weight, adapted._source[2])


NORMS = [
    nn.LayerNorm(6),
    nn.RMSNorm(6),
    nw.LayerNorm(6),
    nw.Norm("b [c]", c=6),
    nn.GroupNorm(2, 6),
    nw.GroupNorm(3, 6),
    nw.ChannelNorm(6),
    nw.DyT(6),
    timm.layers.RmsNorm(6),
    timm.layers.GroupNorm1(6),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{type(norm).__module__}.{type(norm).__name__}")
def test_tent_trains_weight_and_bias_of_every_kind_of_norm(norm):
    model = nn.Sequential(nn.Linear(4, 6), copy.deepcopy(norm), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(16, 4).double()
    before = copy.deepcopy(model)
    trained = [p for n, p in before[1].named_parameters() if n in ("weight", "bias")]
    gradients = torch.autograd.grad(entropy(before(x)), trained)
    with adapt(model, "tent", optimizer=SGD) as adapted:
        torch.testing.assert_close(adapted(x), before(x).detach(), rtol=1e-10, atol=1e-12)
        for name, p in before.named_parameters():
            wanted = p.detach()
            if any(p is t for t in trained):
                wanted = wanted - 0.1 * gradients[[t is p for t in trained].index(True)]
            torch.testing.assert_close(model.get_parameter(name).detach(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "plain"),
    [
        (nw.BatchNorm2d(4), True),
        (nw.Norm("[b] c [s...]", c=4), True),
        (nn.SyncBatchNorm(4), True),
        (timm.layers.BatchNormAct2d(4, act_layer=nn.Tanh), False),
        (nw.GhostBatchNorm(4, 3), False),
        (nn.InstanceNorm2d(4, track_running_stats=True), False),
        (nw.SwitchNorm(4), False),
        (nw.EvoNormB0(4), False),
        (nw.Whitening(4), False),
        (nw.ProbabilityIntegralTransform(4), False),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
@pytest.mark.parametrize("method", ["batch", "blend", "ema"])
def test_every_layer_with_running_statistics(norm, plain, method):
    x = 2 + 3 * torch.randn(12, 4, 5, 5)
    layer = copy.deepcopy(norm)
    model = nn.Sequential(layer)
    # the layer's own training step from the same source, then its training or evaluation output
    own = copy.deepcopy(norm)
    weight = {"batch": 0.1, "blend": 12 / 28, "ema": 0.1}[method]
    setattr(own, "new_weight" if isinstance(own, nw.Norm) else "momentum", weight)
    expected = own.train()(x)
    if method != "batch":
        expected = own.eval()(x)
    with adapt(model, method, min_count=2) as adapted:
        torch.testing.assert_close(adapted(x), expected)
        if plain:
            mean, var = moments(x, 0 if method == "batch" else 1)
            if method != "batch":
                mean, var = weight * mean, 1 - weight + weight * var
            view = (1, 4, 1, 1)
            by_formula = (x - mean.view(view)) / torch.sqrt(var.view(view) + 1e-5)
            torch.testing.assert_close(adapted(x) if method != "ema" else expected, by_formula, rtol=1e-4, atol=1e-5)


def test_kept_buffers_without_tracking_are_source_too():
    model, x = nn.Sequential(nn.BatchNorm1d(3)).eval(), 4 + torch.randn(40, 3)
    model[0].track_running_stats = False
    with adapt(model, "blend", alpha=0.5) as adapted:
        expected = (x - 0.5 * x.mean(0)) / torch.sqrt(0.5 + 0.5 * x.var(0) + 1e-5)
        torch.testing.assert_close(adapted(x), expected)


# ------------------------------------------------------------------------------------------------- nothing stays behind


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_closing_restores_everything_bit_for_bit(method, fails):
    model, x = net(nw.BatchNorm2d), images()
    model.train()
    model[5].eval()
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model(x).sum().backward()
    seen = []
    handle = model[1].register_forward_pre_hook(lambda m, args: seen.append(m))
    before = bits(model)
    try:
        with adapt(model, method) as adapted:
            adapted(x)
            assert not any(m.training for m in model if not isinstance(m, nn.BatchNorm2d))
            for p, (_, grad) in before[1].items():
                assert model.get_parameter(p).grad is grad
            if fails:
                adapted(torch.randn(3, 2, 6, 6, dtype=torch.float32))
    except RuntimeError:
        assert fails
    assert_same(before, bits(model))
    assert len(seen) == 1  # the user's hook sees one call for each
    handle.remove()
    with pytest.raises(RuntimeError, match="was closed"):
        adapted(x)
    adapted.close()
    with pytest.raises(RuntimeError, match="undone once"):
        adapted.receipt.undo()
    adapt(model, method).close()  # and it may be adapted again


def test_without_with_and_when_adapt_itself_fails():
    model, x = net(), images()
    before = bits(model)
    adapted = adapt(model, "ema")
    adapted(x)
    adapted.receipt.undo()
    assert_same(before, bits(model))

    def no_optimizer(parameters):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        adapt(model, "tent", optimizer=no_optimizer)
    assert_same(before, bits(model))


def test_a_layer_that_raises_during_its_own_update_is_as_it_was():
    norm = nn.BatchNorm1d(3)
    norm.track_running_stats = False
    before = bits(norm)
    with pytest.raises(RuntimeError, match="should contain 4 elements"), adapt(norm, "ema", momentum=0.3) as adapted:
        adapted(torch.randn(5, 4))
    assert_same(before, bits(norm))
    assert norm.momentum == 0.1


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_off_and_the_random_state_stays(method):
    model, x = net().train(), images()
    state = torch.get_rng_state()
    with adapt(model, method, episodic=True) as adapted:
        assert torch.equal(adapted(x), adapted(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_nested_use_is_refused():
    model = net()
    with adapt(model, "batch"):
        for inner in (model, nn.Sequential(model), model[1]):
            with pytest.raises(RuntimeError, match="adapted by one method at a time"):
                adapt(inner, "tent" if inner is model else "batch")
    adapt(nn.Sequential(model), "batch").close()


# ------------------------------------------------------------------------------------------------------- small batches


@pytest.mark.parametrize("method", METHODS)
def test_small_batches_fall_back_on_source_and_are_counted(method):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    model[0].running_mean.fill_(1.0)
    x = torch.randn(8, 3)
    source = model(x).detach()
    with adapt(model, method, min_count=9) as adapted:
        with pytest.warns(
            UserWarning, match=r"9 values or more .* '0' gets 8 for each from an input of shape \(8, 3\)"
        ):
            torch.testing.assert_close(adapted(x), source)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # warned once
            adapted(x)
        assert adapted.receipt.facts["calls on source statistics"] == 4
        adapted.reset()
        y = adapted(torch.randn(9, 3))
        assert adapted.receipt.facts["calls on source statistics"] == 4
        assert y.shape == (9, 2)
    with adapt(model, method) as adapted, warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(torch.randn(32 if method in ("batch", "tent") else 2, 3))
        with pytest.raises(UserWarning, match="values or more"):
            adapted(torch.randn(31 if method in ("batch", "tent") else 1, 3))


def test_what_counts_as_a_value_of_a_statistic():
    cases = [
        (nn.BatchNorm2d(3), (2, 3, 4, 4), 32),
        (nw.GhostBatchNorm(3, 2), (4, 3, 4, 4), 32),
        (nw.GhostBatchNorm(3, 2), (3, 3, 4, 4), 0),
        (nn.InstanceNorm2d(3, track_running_stats=True), (5, 3, 4, 4), 16),
        (nn.InstanceNorm2d(3, track_running_stats=True), (3, 4, 4), 16),
        (nw.Norm("(n [b]) c [s...]", c=3, n=2, running="c"), (4, 3, 5), 10),
        (nw.Whitening(3), (7, 3), 7),
    ]
    for layer, shape, count in cases:
        for least in {max(count, 2), count + 1} - {1}:
            with adapt(nn.Sequential(layer), "batch", min_count=least) as adapted, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted(torch.randn(shape))
                assert adapted.receipt.facts["calls on source statistics"] == (least > count), (layer, shape)
    masked = nw.BatchNorm1d(3)
    adapted = adapt(masked, "batch", min_count=21)
    with pytest.warns(UserWarning, match="gets 20 for each"):
        adapted(torch.randn(8, 3, 5), mask=torch.arange(8) < 4)
    adapted.close()


# ------------------------------------------------------------------------------------------------ refused and reported


def test_receipt_names_what_is_adapted_and_what_is_not():
    class Strange(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    class MyNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            return x * self.weight

    frozen = nn.BatchNorm2d(4)
    frozen.nw_frozen, frozen.nw_affine = True, ("bias",)
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict(
        {
            "shared": shared,
            "again": shared,
            "strange": Strange(4),
            "mine": MyNorm(),
            "frozen": frozen,
            "split": nw.SplitBatchNorm(4),
            "renorm": nw.BatchRenorm(4),
            "untracked": nn.BatchNorm2d(4, track_running_stats=False),
            "group": nn.GroupNorm(2, 4),
            "tied": nn.LayerNorm(4),
            "fixed": timm.layers.norm_act.FrozenBatchNormAct2d(4),
            "linear": nn.Linear(4, 1),
        }
    )
    model["linear"].bias = None
    model["linear"].weight = model["tied"].weight
    with adapt(model, "tent") as adapted:
        edits = {name: edit.what for name, edit in adapted.receipt.edits.items()}
        assert edits == {
            "shared": "statistics of the batch, weight and bias trained",
            "strange": "weight and bias trained",
            "split": "weight and bias trained",
            "renorm": "weight and bias trained",
            "frozen": "weight trained",
            "untracked": "weight and bias trained",
            "group": "weight and bias trained",
            "tied": "bias trained",
        }
        assert adapted.receipt.edits["shared"].also == ("again",)
        assert adapted.receipt.skipped == {
            "strange": "unknown class Strange",
            "mine": "unknown class MyNorm; train its affine parameters by norms=",
            "frozen": "its statistics are frozen: marked nw_frozen; its bias frozen",
            "split": "its batch is made of several domains, and a test batch is one",
            "renorm": "batch renormalization corrects the batch's statistics back to the source's",
            "untracked": "uses the batch's statistics at evaluation already",
            "tied": "its weight belongs to another layer too",
            "fixed": "FrozenBatchNormAct2d has fixed statistics",
        }
        assert "adapt by tent" in str(adapted.receipt)
    with adapt(model, "ema") as adapted:
        assert list(adapted.receipt.edits) == ["shared", "renorm"]
    with adapt(model, "tent", norms=(MyNorm,)) as adapted:
        assert adapted.receipt.edits["mine"].what == "weight trained"


def test_the_difference_on_given_inputs_is_measured_from_source_and_leaves_it():
    model, x = net().eval(), images()
    with torch.no_grad():
        moved = by_hand(model, x, lambda layer, h: moments(h, 0)) - model(x)
    for method in ("batch", "tent"):
        with adapt(model, method, inputs=x) as adapted:
            assert adapted.receipt.max_difference == pytest.approx(moved.abs().max().item())
            assert adapted.receipt.rms_difference == pytest.approx(np.sqrt(moved.square().mean().item()))
            assert adapted.receipt.facts["calls"] == 0
            assert torch.equal(model[5].weight, adapted._source[-2] if method == "tent" else model[5].weight)


def test_gradient_modes():
    model, x = net(), images()
    with adapt(model, "tent") as adapted:
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"call it under torch\.no_grad"):
            adapted(x)
        with torch.no_grad():
            adapted(x)
        assert adapted.receipt.facts["steps"] == 1
    for method in ("batch", "blend", "ema"):
        with torch.inference_mode():
            adapted = adapt(model, method)
            inside = adapted(x)
        adapted(x)
        adapted.reset()
        torch.testing.assert_close(adapted(x).detach(), inside.clone())
        adapted.close()


def test_wrapped_and_compiled_models():
    model, x = net(), images()
    expected = by_hand(model, x, lambda layer, h: moments(h, 0))
    compiled = torch.compile(model.eval(), backend="eager")
    compiled(x)
    with adapt(compiled, "batch") as adapted:
        assert adapted.model is compiled
        torch.testing.assert_close(adapted(x), expected, rtol=1e-12, atol=1e-12)
    nested = nn.Sequential(torch.compile(model, backend="eager"))
    nested(x)
    with adapt(nested, "batch") as adapted:
        assert list(adapted.receipt.edits) == ["0.1", "0.5"]
        torch.testing.assert_close(adapted(x), expected, rtol=1e-12, atol=1e-12)
    fast = nw.accelerate(net()).model
    with adapt(fast, "batch") as adapted:
        torch.testing.assert_close(adapted(x), expected, rtol=1e-10, atol=1e-10)


def test_places_have_their_own_entropy_and_other_outputs_need_a_loss():
    model, x = nn.Sequential(nn.BatchNorm2d(4)), torch.randn(3, 4, 5, 5)
    weight = torch.ones(4, requires_grad=True)
    logits = F.batch_norm(x, None, None, weight, training=True)
    (gradient,) = torch.autograd.grad(entropy(logits.movedim(1, -1).reshape(-1, 4)), weight)
    with adapt(model, "tent", optimizer=SGD) as adapted:
        adapted(x)
        torch.testing.assert_close(model[0].weight.detach(), 1 - 0.1 * gradient)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return {"logits": self.norm(x), "n": 2}

    with (
        adapt(Pair(), "tent") as adapted,
        pytest.raises(ValueError, match=r"the model's output is a dict\. Pass loss="),
    ):
        adapted(torch.randn(3, 4))
    with adapt(Pair(), "tent", loss=lambda y: entropy(y["logits"])) as adapted:
        y = adapted(torch.randn(3, 4))
        assert not y["logits"].requires_grad
        assert y["n"] == 2


def test_an_entropy_that_is_not_finite_updates_nothing():
    model = nn.Sequential(nn.LayerNorm(4))
    with adapt(model, "tent") as adapted:
        with pytest.raises(RuntimeError, match="it is nan here; nothing was updated"):
            adapted(torch.full((2, 4), float("nan")))
        assert torch.equal(model[0].weight, torch.ones(4))
        assert model[0].weight.grad is None


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"method": "bn"}, "method is one of 'batch', 'blend', 'ema', 'tent'; got 'bn'"),
        ({"method": "batch", "alpha": 0.5}, 'alpha= belongs to method="blend"'),
        ({"method": "blend", "momentum": None}, 'momentum= belongs to method="ema"'),
        ({"method": "blend", "alpha": 0.5, "source_size": 3}, "got both"),
        ({"method": "blend", "alpha": 1.5}, "alpha is a number from 0 to 1; got 1.5"),
        ({"method": "blend", "source_size": -1}, "source_size is a number from 0 on; got -1"),
        ({"method": "tent", "lr": 0.1, "optimizer": SGD}, "has its own learning rate"),
        ({"method": "tent", "steps": 0}, "steps is an integer, at least 1; got 0"),
        ({"method": "ema", "min_count": 1}, "min_count is an integer, at least 2; got 1"),
    ],
)
def test_wrong_arguments(kwargs, text):
    with pytest.raises(ValueError, match=text):
        adapt(net(), **kwargs)


def test_models_without_a_layer_to_adapt():
    with pytest.raises(ValueError, match='"tent"\\) needs a normalization layer with weight or bias, and this Linear'):
        adapt(nn.Linear(2, 2), "tent")
    model = nn.Sequential(nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ValueError, match=r"\(1: uses the batch's .*\)\. Layers that never look at the batch"):
        adapt(model, "ema")
    with pytest.raises(ValueError, match="'0' does not know its size before an input"):
        adapt(nn.Sequential(nn.LazyBatchNorm1d()), "batch")
    with torch.inference_mode():
        made = nn.LayerNorm(3)
    with pytest.raises(RuntimeError, match=r"made under torch\.inference_mode"):
        adapt(made, "tent")
