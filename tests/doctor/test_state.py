"""State of hand-written norms: each defect is proved on a class that has it, and correct classes stay silent."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normwright as nw
from normwright.doctor import Subject
from normwright.doctor.handwritten import handwritten


def shape_of(channels, dims):
    return (1, channels) + (1,) * (dims - 2)


class Book(nn.Module):
    """Batch norm as in Dive into Deep Learning: plain tensors moved by an `if`, by grad mode, kept with their graph."""

    def __init__(self, channels, dims):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape_of(channels, dims)))
        self.beta = nn.Parameter(torch.zeros(shape_of(channels, dims)))
        self.moving_mean = torch.zeros(shape_of(channels, dims))
        self.moving_var = torch.ones(shape_of(channels, dims))

    def forward(self, x):
        if self.moving_mean.device != x.device:
            self.moving_mean = self.moving_mean.to(x.device)
            self.moving_var = self.moving_var.to(x.device)
        if not torch.is_grad_enabled():
            x_hat = (x - self.moving_mean) / torch.sqrt(self.moving_var + 1e-5)
        else:
            dims = (0, *range(2, x.dim()))
            mean = x.mean(dims, keepdim=True)
            var = ((x - mean) ** 2).mean(dims, keepdim=True)
            x_hat = (x - mean) / torch.sqrt(var + 1e-5)
            self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean
            self.moving_var = 0.9 * self.moving_var + 0.1 * var
        return self.gamma * x_hat + self.beta


class Batch(nn.Module):
    """A correct batch norm by hand, with places to put a fault."""

    def __init__(self, channels, new_weight=0.1, keep=None, correction=1):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.hold(torch.zeros(channels), torch.ones(channels))
        self.new_weight, self.keep, self.correction = new_weight, keep, correction

    def hold(self, mean, var):
        self.register_buffer("m", mean)
        self.register_buffer("v", var)

    def weights(self):
        return 1 - self.new_weight if self.keep is None else self.keep, self.new_weight

    def update(self, mean, var):
        old, new = self.weights()
        with torch.no_grad():
            self.m.data = old * self.m + new * mean
            self.v.data = old * self.v + new * var

    def divide(self, var):
        return (var + 1e-5).sqrt()

    def divide_in_evaluation(self, var):
        return self.divide(var)

    def forward(self, x):
        dims, shape = (0, *range(2, x.dim())), shape_of(x.shape[1], x.dim())
        if self.training:
            mean, var = x.mean(dims), x.var(dims, correction=0)
            self.update(mean, x.var(dims, correction=self.correction))
            scale = self.divide(var)
        else:
            mean, scale = self.m, self.divide_in_evaluation(self.v)
        return (x - mean.view(shape)) / scale.view(shape) * self.g.view(shape) + self.b.view(shape)


class InDict(Batch):
    def hold(self, mean, var):
        self.stats = {"m": mean, "v": var}

    m = property(lambda self: self.stats["m"])
    v = property(lambda self: self.stats["v"])


class Unsaved(Batch):
    def hold(self, mean, var):
        self.register_buffer("m", mean, persistent=False)
        self.register_buffer("v", var, persistent=False)


class WithGraph(Batch):
    def update(self, mean, var):
        self.m = 0.9 * self.m + 0.1 * mean
        self.v = 0.9 * self.v + 0.1 * var


class InPlaceGraph(Batch):
    def update(self, mean, var):
        self.m.mul_(0.9).add_(0.1 * mean)
        self.v.mul_(0.9).add_(0.1 * var)


class Trained(Batch):
    def hold(self, mean, var):
        self.m, self.v = nn.Parameter(mean), nn.Parameter(var)


class FrozenParameters(Batch):
    def hold(self, mean, var):
        self.m, self.v = nn.Parameter(mean, False), nn.Parameter(var, False)


class Uneven(Batch):
    def update(self, mean, var):
        with torch.no_grad():
            self.m.lerp_(mean, 0.1)
            self.v.lerp_(var, 0.4)


class Lost(Batch):
    def update(self, mean, var):
        m = 0.9 * self.m + 0.1 * mean
        v = 0.9 * self.v + 0.1 * var
        del m, v


class ByVariance(Batch):
    def divide(self, var):
        return var + 1e-5


class RootTwice(Batch):
    def divide(self, var):
        return (var + 1e-5).sqrt().sqrt()


class NoRootInEvaluation(Batch):
    def divide_in_evaluation(self, var):
        return var + 1e-5


class DeviationAsVariance(Batch):
    def update(self, mean, var):
        super().update(mean, var.sqrt())


class NoGainInEvaluation(Batch):
    def forward(self, x):
        y = super().forward(x)
        shape = shape_of(x.shape[1], x.dim())
        return y if self.training else (y - self.b.view(shape)) / self.g.view(shape)


class AlwaysBatch(Batch):
    def forward(self, x):
        training, self.training = self.training, True
        try:
            if training:
                return super().forward(x)
            self.update = lambda mean, var: None
            y = super().forward(x)
            del self.update
            return y
        finally:
            self.training = training


class Always(Batch):
    """Normalizes by moving statistics, and moves them, in either mode."""

    def forward(self, x):
        dims = (0, *range(2, x.dim()))
        self.update(x.mean(dims), x.var(dims))
        training, self.training = self.training, False
        y = super().forward(x)
        self.training = training
        return y


class Network(nn.Module):
    """A batch norm written out in the forward of a whole network."""

    def __init__(self, inner=6):
        super().__init__()
        self.first, self.last = nn.LazyLinear(inner), nn.Linear(inner, 2)
        self.mean = torch.zeros(inner)

    def forward(self, x):
        h = self.first(x.flatten(1))
        if self.training:
            mean = h.mean(0)
            self.mean = 0.9 * self.mean + 0.1 * mean
        else:
            mean = self.mean
        return self.last((h - mean).relu())


class ByGradMode(Batch):
    def forward(self, x):
        mode, self.training = self.training, torch.is_grad_enabled()
        y = super().forward(x)
        self.training = mode
        return y


def conv(norm):
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.Linear(216, 2))


def dense(norm):
    return nn.Sequential(nn.Linear(5, 6, bias=False), norm, nn.Tanh(), nn.Linear(6, 2))


IMAGES = (8, 3, 8, 8)


def found(model, inputs, **given):
    return nw.diagnose(model, inputs, select=["NW5"], **given).findings


def codes(findings):
    return {finding.code for finding in findings}


@pytest.mark.parametrize(("around", "dims", "size"), [(conv, 4, IMAGES), (dense, 2, (64, 5))])
def test_the_defects_of_the_book_are_proved_and_fix_removes_each(around, dims, size):
    model = around(Book(6, dims))
    inputs = torch.randn(size)
    for _ in range(3):
        model(inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mean = model[1].moving_mean
    kept = mean.detach().clone()
    report = nw.diagnose(model, inputs, select=["NW5"])
    proved = {f.code: f for f in report.findings if f.evidence == "proved"}
    assert set(proved) == {"NW501", "NW502", "NW503", "NW504"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[1].moving_mean is mean
    assert torch.equal(mean, kept)
    for finding in proved.values():
        assert finding.where == ("1",)
        receipt = finding.fix()
        assert type(receipt.model[1]) is (nw.BatchNorm2d if dims == 4 else nw.BatchNorm1d)
        assert codes(found(receipt.model, inputs)) == set()
        assert receipt.max_difference < 1e-5
        assert torch.allclose(receipt.model[1].running_mean, kept.flatten())
        # in training the two agree as well, against torch's own formula
        own, theirs = model[:2](inputs), receipt.model[:2](inputs)
        assert torch.allclose(own, theirs, atol=1e-4)
        model[1].moving_mean = mean
        receipt.undo()
        assert type(receipt.model[1]) is Book


def test_statistics_in_the_forward_of_a_whole_network():
    model, inputs = Network(), torch.randn(32, 5)
    model(inputs)
    assert codes(found(model, inputs)) == {"NW501", "NW502", "NW503"}


def test_what_an_optimizer_learned_is_carried_into_the_replacement():
    model, inputs = conv(Batch(6)), torch.randn(IMAGES)
    model[1].m.fill_(0.3)
    one = handwritten(Subject(model, inputs))[0]
    new = one.replacement()
    assert torch.equal(new.weight, model[1].g)
    assert torch.equal(new.bias, model[1].b)
    assert new.momentum == pytest.approx(0.1)
    assert new.eps == pytest.approx(1e-5)


def test_a_norm_that_no_batch_norm_replaces_has_help_and_no_repair():
    class Clipped(Book):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    findings = found(conv(Clipped(6, 4)), torch.randn(IMAGES))
    assert {"NW501", "NW502", "NW503", "NW504"} <= codes(findings)
    assert all(f.repair is None and f.help for f in findings)


@pytest.mark.parametrize(
    ("norm", "code", "severity"),
    [
        (lambda: InDict(6), "NW501", "error"),
        (lambda: Unsaved(6), "NW501", "error"),
        (lambda: InDict(6), "NW502", "error"),
        (lambda: WithGraph(6), "NW503", "error"),
        (lambda: InPlaceGraph(6), "NW503", "error"),
        (lambda: ByGradMode(6), "NW504", "error"),
        (lambda: Batch(6, new_weight=0.9), "NW505", "warning"),
        (lambda: Batch(6, new_weight=0.99), "NW505", "warning"),
        (lambda: Batch(6, new_weight=0.1, keep=0.1), "NW505", "error"),
        (lambda: Batch(6, new_weight=0.9, keep=0.9), "NW505", "error"),
        (lambda: Uneven(6), "NW505", "warning"),
        (lambda: ByVariance(6), "NW507", "error"),
        (lambda: RootTwice(6), "NW507", "error"),
        (lambda: NoRootInEvaluation(6), "NW507", "error"),
        (lambda: DeviationAsVariance(6), "NW507", "error"),
        (lambda: NoGainInEvaluation(6), "NW507", "error"),
        (lambda: AlwaysBatch(6), "NW507", "warning"),
        (lambda: Trained(6), "NW508", "warning"),
        (lambda: Lost(6), "NW512", "error"),
        (lambda: Always(6), "NW513", "error"),
    ],
)
@pytest.mark.parametrize(("around", "size"), [(conv, IMAGES), (dense, (128, 5))])
def test_each_fault_is_found_at_its_layer(norm, code, severity, around, size):
    model = around(norm())
    inputs = torch.randn(size)
    model(inputs)
    hits = [f for f in found(model, inputs) if f.code == code]
    assert [(f.where, f.severity) for f in hits] == [(("1",), severity)]
    assert hits[0].numbers


def test_the_measured_coefficients_are_the_true_ones():
    subject = Subject(conv(Batch(6, new_weight=0.03, keep=0.9)), torch.randn(IMAGES))
    roles = handwritten(subject)[0].roles
    assert roles["m"].weigh == pytest.approx(0.03, abs=1e-6)
    assert roles["v"].weigh == pytest.approx(0.03, rel=1 / 280)  # of either variance of 288 values
    assert all(role.keep == pytest.approx(0.9, abs=1e-6) for role in roles.values())


def test_the_biased_variance_is_told_from_the_unbiased():
    subject = Subject(dense(Batch(6, correction=0)), torch.randn(16, 5))
    assert handwritten(subject)[0].roles["v"].statistic == "biased variance"
    [advice] = found(dense(Batch(6, correction=0)), torch.randn(16, 5))
    assert (advice.code, advice.severity) == ("NW506", "advice")
    assert found(dense(Batch(6, correction=0)), torch.randn(512, 5)) == []


# ------------------------------------------------------------------------------------------------- correct, so silent


class Llama(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Annotated(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return self.a * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b


class ChannelsFirst(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.w[:, None, None] * x + self.b[:, None, None]


class Grouped(nn.Module):
    def forward(self, x):
        y = x.view(x.shape[0], 2, -1)
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, keepdim=True, correction=0) + 1e-5)
        return y.view(x.shape)


class Functional(Batch):
    def forward(self, x):
        return F.batch_norm(x, self.m, self.v, self.g, self.b, self.training, 0.1)


class Subclass(nn.BatchNorm2d):
    """The widely copied batch norm by hand on torch's class, with its counter and averaging."""

    def forward(self, x):
        if self.training:
            self.num_batches_tracked += 1
            mean, var = x.mean([0, 2, 3]), x.var([0, 2, 3], unbiased=False)
            n = x.numel() / x.size(1)
            with torch.no_grad():
                self.running_mean = self.momentum * mean + (1 - self.momentum) * self.running_mean
                self.running_var = self.momentum * var * n / (n - 1) + (1 - self.momentum) * self.running_var
        else:
            mean, var = self.running_mean, self.running_var
        x = (x - mean[None, :, None, None]) / torch.sqrt(var[None, :, None, None] + self.eps)
        return x * self.weight[None, :, None, None] + self.bias[None, :, None, None]


class FrozenStatistics(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.3), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Renorm(Batch):
    """Batch renormalization: the moving statistics act in training too."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = (0, *range(2, x.dim())), shape_of(x.shape[1], x.dim())
        mean, sd = x.mean(dims), self.divide(x.var(dims, correction=0))
        r = (sd / self.divide(self.v)).detach().clamp(1 / 3, 3)
        d = ((mean - self.m) / self.divide(self.v)).detach().clamp(-5, 5)
        self.update(mean.detach(), x.var(dims).detach())
        y = (x - mean.view(shape)) / sd.view(shape) * r.view(shape) + d.view(shape)
        return y * self.g.view(shape) + self.b.view(shape)


class Cumulative(Batch):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("count", torch.zeros(()))

    def weights(self):
        self.count += 1
        new = float(1 / self.count)
        return 1 - new, new


class LastGraph(Batch):
    """Keeps the graph of the last forward, and no more."""

    def update(self, mean, var):
        self.m = 0.9 * self.m.detach() + 0.1 * mean
        self.v = 0.9 * self.v.detach() + 0.1 * var


class Warmup(Batch):
    """The averaging of TensorFlow's ExponentialMovingAverage with num_updates: 0.9 of the first batch, ever less."""

    count = 0

    def weights(self):
        self.count += 1
        keep = min(0.99, self.count / (9 + self.count))
        return keep, 1 - keep


class NotUnderNoGrad(Batch):
    """Does not update under no_grad, so that a checkpointed forward counts once; its output is the same."""

    def update(self, mean, var):
        if torch.is_grad_enabled():
            super().update(mean.detach(), var.detach())


class MeanOnly(Batch):
    def divide(self, var):
        return torch.ones_like(var)


class Caches(nn.Module):
    """Keeps what it saw, for looking at: plain tensors with a graph that nothing reads."""

    def forward(self, x):
        self.last, self.kl = x, (x**2).mean()
        return x.relu()


class Hidden(nn.Module):
    """A recurrent state kept between calls, in both modes."""

    def __init__(self):
        super().__init__()
        self.h = torch.zeros(8, 6, 8, 8)

    def forward(self, x):
        self.h = 0.5 * self.h.detach() + x
        return self.h


class Codebook(nn.Module):
    """Vector quantization by moving averages, kept in parameters as the public code does."""

    def __init__(self, channels):
        super().__init__()
        self.embedding = nn.Embedding(4, channels)
        self.register_buffer("size", torch.zeros(4))
        self.w = nn.Parameter(torch.randn(4, channels))

    def forward(self, x):
        flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        index = torch.cdist(flat, self.embedding.weight).argmin(1)
        if self.training:
            one = F.one_hot(index, 4).float()
            self.size = self.size * 0.99 + 0.01 * one.sum(0)
            self.w = nn.Parameter(self.w * 0.99 + 0.01 * one.T @ flat.detach())
            self.embedding.weight = nn.Parameter(self.w / (self.size + 1e-5)[:, None])
        q = self.embedding(index).view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
        return x + (q - x).detach()


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


class Unit(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=1)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias)


class Shown(Batch):
    """Normalizes by the batch in both modes, and keeps the last mean to be looked at."""

    def hold(self, mean, var):
        self.last = mean

    def forward(self, x):
        dims, shape = (0, *range(2, x.dim())), shape_of(x.shape[1], x.dim())
        self.last = x.detach().mean(dims)
        var = x.var(dims, correction=0).view(shape)
        return (x - x.mean(dims).view(shape)) / self.divide(var)


class Rotary(nn.Module):
    def forward(self, x):
        if not hasattr(self, "cos"):
            self.cos = torch.arange(x.shape[-1]).cos()
        return x * self.cos


class Average(nn.Module):
    """A model with a moving average of its weights in plain tensors beside it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self):
        for name, p in self.model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 0.01)

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(6),
        lambda: nw.BatchNorm2d(6, act="relu"),
        lambda: nn.GroupNorm(2, 6),
        lambda: nw.GhostBatchNorm(6, 2),
        lambda: Batch(6),
        lambda: Functional(6),
        lambda: Subclass(6),
        lambda: FrozenStatistics(6),
        lambda: FrozenParameters(6),
        lambda: Renorm(6),
        lambda: Cumulative(6),
        lambda: Warmup(6),
        lambda: LastGraph(6),
        lambda: NotUnderNoGrad(6),
        lambda: MeanOnly(6),
        lambda: Batch(6, new_weight=1.0),
        lambda: Batch(6, new_weight=0.01),
        lambda: Batch(6, correction=0),
        lambda: Llama(6),
        lambda: Annotated(6),
        lambda: ChannelsFirst(6),
        Grouped,
        Caches,
        Hidden,
        lambda: Codebook(6),
        Noise,
        lambda: Shown(6),
        Unit,
        Rotary,
        lambda: nn.utils.parametrizations.spectral_norm(OwnConv(6, 6, 1)),
        lambda: nn.utils.spectral_norm(OwnConv(6, 6, 1)),
        lambda: nn.utils.parametrizations.weight_norm(OwnConv(6, 6, 1)),
    ],
)
def test_correct_layers_are_silent(make):
    inner = make()
    width = 6 if isinstance(inner, (Llama, Annotated, Rotary)) else 8
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), inner, nn.ReLU())
    inputs = torch.randn(8, 3, 8, width)
    report = nw.diagnose(model, inputs, select=["NW5"])
    loud = [f for f in report.findings if f.severity != "advice" or f.evidence != "advice"]
    assert [(f.code, f.message) for f in loud] == []
    assert {n.code for n in report.not_run} == {"NW511"}


def test_a_moving_average_of_the_weights_is_no_statistic():
    assert found(Average(conv(nn.BatchNorm2d(6))), torch.randn(IMAGES)) == []


def test_a_copied_module_is_not_run_and_keeps_its_statistics():
    model, inputs = conv(WithGraph(6)), torch.randn(IMAGES)
    model(inputs)
    held = model[1].m
    assert held.requires_grad
    found(model, inputs)
    assert model[1].m is held
    assert held.grad_fn is not None


def test_layers_of_one_class_are_one_finding():
    model = nn.Sequential(nn.Linear(5, 6), Book(6, 2), nn.Linear(6, 6), Book(6, 2))
    findings = found(model, torch.randn(64, 5))
    assert [f.where for f in findings if f.code == "NW501"] == [("1", "3")]
    receipt = next(f for f in findings if f.code == "NW501").fix()
    assert set(receipt.edits) == {"1", "3"}


# ------------------------------------------------------------------------------------------ eps, conversion, checkpoint


def test_another_eps_is_said_where_it_moves_the_output_and_nowhere_else():
    layers = [nn.LayerNorm(8, eps=1e-6) for _ in range(5)] + [nn.LayerNorm(8, eps=0.5)]
    [finding] = found(nn.Sequential(*layers), torch.randn(32, 8))
    assert (finding.code, finding.where) == ("NW509", ("5",))
    # x of variance 1 before and after: the deviation differs by 1 − 1/√1.5
    assert finding.numbers["output difference"] == pytest.approx(math.sqrt(1.5) - 1, abs=1e-2)
    layers[-1].eps = 1e-5
    assert found(nn.Sequential(*layers), torch.randn(32, 8)) == []


def test_a_sync_conversion_that_dropped_activations_is_proved_affine():
    def network(act, extra=nn.Identity):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nw.BatchNorm2d(6, act=act), extra(), nn.Conv2d(6, 6, 3), nw.BatchNorm2d(6, act=act)
        )

    sync = nn.SyncBatchNorm.convert_sync_batchnorm
    lost = [f for f in found(sync(network("relu")), torch.randn(IMAGES)) if f.code == "NW510"]
    assert [f.where for f in lost] == [("1", "4")]
    assert "NW510" not in codes(found(sync(network(None, nn.ReLU)), torch.randn(IMAGES)))
    assert "NW510" not in codes(found(network(None), torch.randn(IMAGES)))


def test_a_checkpoint_without_statistics_is_found_in_each_way():
    model = conv(nn.BatchNorm2d(6))
    for _ in range(3):
        model(torch.randn(IMAGES))
    trained = model.state_dict()
    fresh = conv(nn.BatchNorm2d(6))

    def at(model, checkpoint, **given):
        return [(f.where, f.severity) for f in found(model, None, checkpoint=checkpoint, **given)]

    without = {key: value for key, value in trained.items() if "running" not in key}
    assert at(fresh, without) == [(("1",), "error")]
    assert at(fresh, {"state_dict": {f"module.{key}": value for key, value in without.items()}}) == [(("1",), "error")]
    parameters_only = conv(nn.BatchNorm2d(6))
    parameters_only.load_state_dict({k: v for k, v in trained.items() if "running" not in k}, strict=False)
    assert at(parameters_only, trained) == [(("1",), "error")]
    assert at(fresh, {f"net.{key}": value for key, value in trained.items()}) == [((), "error")]
    # whole, not loaded yet; loaded; loaded and recalibrated; of a network without statistics
    assert at(fresh, trained) == []
    assert at(copy.deepcopy(model), {"model": trained}) == []
    moved = copy.deepcopy(model)
    moved(torch.randn(IMAGES))
    assert at(moved, trained) == []
    assert at(conv(nn.GroupNorm(2, 6)), conv(nn.GroupNorm(2, 6)).state_dict()) == []


def test_a_checkpoint_from_a_file_and_a_repair_with_the_loader(tmp_path):
    model = conv(nn.BatchNorm2d(6))
    torch.save({k: v for k, v in model.state_dict().items() if "running" not in k}, tmp_path / "weights.pt")
    loader = [torch.randn(IMAGES) for _ in range(3)]
    [finding] = nw.diagnose(model, checkpoint=tmp_path / "weights.pt", loader=loader, select=["NW511"]).findings
    receipt = finding.fix()
    assert receipt.operation == "recalibrate"
    assert model[1].running_mean.any()
