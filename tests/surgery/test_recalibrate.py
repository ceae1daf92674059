"""recalibrate against NumPy's population statistics, and the promise that nothing else about a model changes."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from normwright import BatchRenorm, EvoNormB0, SplitBatchNorm, SwitchNorm
from normwright.layers import norm as nwn
from normwright.layers import twins
from normwright.surgery import population, recalibrate
from normwright.surgery.recalibrate import METHODS

BOTH = pytest.mark.parametrize("method", METHODS)


def truth(values, axes):
    """Mean and unbiased variance by NumPy in float64."""
    values = np.asarray(values, dtype=np.float64)
    return values.mean(axes), values.var(axes, ddof=1)


def check(layer, mean, var, rtol=1e-6):
    np.testing.assert_allclose(layer.running_mean.double().numpy(), mean, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.double().numpy(), var, rtol=rtol)


def bits(model):
    """Everything that must not change: values of the state, its tensors, modes, hooks, gradients, random states."""
    state = {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs)) for m in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    rng = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    return state, modes, hooks, gradients, rng


def same(a, b, values=True):
    assert a[0].keys() == b[0].keys()
    for key, (identity, value) in a[0].items():
        assert b[0][key][0] == identity, key
        if values or ("running" not in key and "num_batches" not in key):
            assert torch.equal(b[0][key][1], value), key
    assert a[1:4] == b[1:4]
    assert torch.equal(a[4][0], b[4][0])
    assert a[4][1:] == b[4][1:]


def net(norm1=nn.BatchNorm2d, norm2=nn.BatchNorm1d):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        norm1(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 5),
        norm2(5),
        nn.Sigmoid(),
    )


def images(n=23, seed=0):
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) * 3 + 1


@BOTH
def test_two_batches_far_apart(method):
    # within each batch the unbiased variance is 0.02, over both it is 28.2: the means differ
    n, within, wanted = 100, 0.02, 28.2
    spread = torch.tensor([1.0, -1.0]).repeat(n // 2) * (within * (n - 1) / n) ** 0.5
    offset = ((wanted * (2 * n - 1) - 2 * within * (n - 1)) / (2 * n)) ** 0.5
    batches = [(spread + offset).unsqueeze(1), (spread - offset).unsqueeze(1)]
    theirs, ours = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(batches, theirs)
    recalibrate(ours, batches, method=method)
    assert theirs.running_var.item() == pytest.approx(0.02, rel=1e-3)
    assert ours.running_var.item() == pytest.approx(28.2, rel=1e-6)
    assert ours.running_mean.item() == pytest.approx(0.0, abs=1e-6)


@BOTH
@pytest.mark.parametrize("module", [nn, twins], ids=["torch", "twin"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("BatchNorm1d", (23, 3)),
        ("BatchNorm1d", (23, 3, 7)),
        ("BatchNorm2d", (23, 3, 5, 4)),
        ("BatchNorm3d", (23, 3, 2, 3, 4)),
    ],
)
def test_population_statistics_with_a_short_last_batch(method, module, kind, shape):
    x = torch.randn(shape) * torch.tensor([1.0, 5.0, 0.1]).view(3, *[1] * (len(shape) - 2)) + 2
    layer = getattr(module, kind)(3)
    receipt = recalibrate(layer, x, batch_size=6, method=method)
    mean, var = truth(x, (0, *range(2, len(shape))))
    check(layer, mean, var)
    assert layer.num_batches_tracked.item() == 4
    assert receipt.facts == {"method": method, "batches": 4, "passes": 1}


@pytest.mark.parametrize("order", ["channels_last", "sliced", "expanded"])
def test_memory_layouts(order):
    x = torch.randn(9, 4, 6, 6)
    if order == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif order == "sliced":
        x = x[:, :, ::2, 1:]
    else:
        x = x[:1].expand(9, 4, 6, 6)
    layer = nn.BatchNorm2d(4)
    recalibrate(layer, [x[:5], x[5:]])
    check(layer, *truth(x, (0, 2, 3)))


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_pieces_give_the_whole(monkeypatch, piece):
    monkeypatch.setattr(population, "PIECE", piece)
    x = torch.randn(5, 3, 11, 2)
    mask = torch.rand(5, 11, 2) > 0.3
    batch, masked, instance = nn.BatchNorm2d(3), twins.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)
    recalibrate(batch, [x])
    recalibrate(masked, [x], forward=lambda m, b: m(b, mask=mask))
    many = torch.randn(17, 3, 4, 2) + torch.randn(17, 3, 1, 1)  # cut along the samples, x along the places
    recalibrate(instance, [x, many])
    check(batch, *truth(x, (0, 2, 3)))
    check(masked, *truth(x.permute(0, 2, 3, 1)[mask], 0))
    stats = [np.concatenate([truth(part, (2, 3))[i] for part in (x, many)]).mean(0) for i in (0, 1)]
    check(instance, *stats)


def test_a_large_mean_keeps_its_variance():
    # in float32, mean(x²) − mean² is off by a factor of three here
    x = 3000 + torch.randn(64, 2, 40)
    layer = nn.BatchNorm1d(2)
    recalibrate(layer, x, batch_size=10)
    check(layer, *truth(x, (0, 2)))


def test_bfloat16_model_gets_the_rounded_truth():
    model = nn.Sequential(nn.BatchNorm2d(4)).bfloat16()
    x = (torch.randn(33, 4, 5, 5) * 2 + 7).bfloat16()
    recalibrate(model, x, batch_size=8)
    mean, var = truth(x.float(), (0, 2, 3))
    assert model[0].running_var.dtype == torch.bfloat16
    assert torch.equal(model[0].running_mean, torch.tensor(mean).bfloat16())
    assert torch.equal(model[0].running_var, torch.tensor(var).bfloat16())


def by_hand(model, x, batch_size, method):
    """Both layers' population statistics and the evaluation output, in NumPy from torch's convolution and weights."""
    conv, bn1, fc, bn2 = model[0], model[1], model[5], model[6]
    with torch.no_grad():
        a = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double()).numpy()
    mean1, var1 = truth(a, (0, 2, 3))

    def normalized(values, mean, var, layer):
        view = (-1,) + (1,) * (values.ndim - 2)
        scale = layer.weight.detach().double().numpy() / np.sqrt(var + layer.eps)
        return (values - mean.reshape(view)) * scale.reshape(view) + layer.bias.detach().double().numpy().reshape(view)

    def dense(values):
        return np.maximum(values, 0).reshape(len(values), -1) @ fc.weight.detach().double().numpy().T + (
            fc.bias.detach().double().numpy()
        )

    final1 = dense(normalized(a, mean1, var1, bn1))
    if method == "layerwise":
        b = final1
    else:
        parts = [a[i : i + batch_size] for i in range(0, len(a), batch_size)]
        b = np.concatenate([dense(normalized(p, p.mean((0, 2, 3)), p.var((0, 2, 3)), bn1)) for p in parts])
    mean2, var2 = truth(b, 0)
    out = 1 / (1 + np.exp(-normalized(final1, mean2, var2, bn2)))
    return (mean1, var1), (mean2, var2), out


@BOTH
@pytest.mark.parametrize("twin", [False, True], ids=["torch", "twin"])
def test_two_layers_by_hand(method, twin):
    model = net(twins.BatchNorm2d, twins.BatchNorm1d) if twin else net()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.uniform_(-1, 1)
    x = images()
    receipt = recalibrate(model, x, batch_size=6, method=method)
    first, second, out = by_hand(model, x, 6, method)
    check(model[1], *first, rtol=1e-5)
    check(model[6], *second, rtol=1e-5)
    np.testing.assert_allclose(model.eval()(x).detach().numpy(), out, rtol=2e-5, atol=2e-6)
    assert receipt.facts["passes"] == (2 if method == "layerwise" else 1)
    # the two methods differ by the batch noise, so the test above tells them apart
    other = by_hand(model, x, 6, "one_pass" if method == "layerwise" else "layerwise")[1][1]
    assert np.abs(other / second[1] - 1).max() > 0.01


def test_layerwise_normalizes_the_evaluated_network():
    model = nn.Sequential(*[part for i in range(4) for part in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())])
    x = torch.randn(50, 6)
    recalibrate(model, x, batch_size=4)
    model.eval()
    for part in model:
        x = part(x).detach()
        if isinstance(part, nn.BatchNorm1d):
            mean, var = truth(x, 0)
            np.testing.assert_allclose(mean, 0, atol=1e-5)
            np.testing.assert_allclose(var, 1, rtol=1e-3)  # eps


def test_layerwise_does_not_depend_on_the_batches():
    # sorted data: in one pass the first layer removes what tells the batches apart, and the second never sees it
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    x = torch.cat([torch.randn(50, 3) * 0.1 + 5, torch.randn(50, 3) * 0.1 - 5])
    shuffled = x[torch.randperm(100)]
    found = {}
    for name, data, method in (
        ("sorted", x, "layerwise"),
        ("shuffled", shuffled, "layerwise"),
        ("one pass", x, "one_pass"),
    ):
        recalibrate(model, data, batch_size=50, method=method)
        found[name] = model[2].running_var.clone()
    mean, var = truth(x, 0)
    second = (x.double() - torch.tensor(mean)) / torch.tensor(var + 1e-5).sqrt() @ model[1].weight.double().T
    np.testing.assert_allclose(found["sorted"].numpy(), truth(second.detach(), 0)[1], rtol=1e-5)
    torch.testing.assert_close(found["sorted"], found["shuffled"], rtol=1e-5, atol=0)
    assert not torch.allclose(found["one pass"], found["sorted"], rtol=0.1)


@BOTH
def test_dropout_is_inactive(method):
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    x = torch.randn(40, 3) + 5
    recalibrate(model, x, batch_size=16, method=method)
    check(model[1], *truth(x, 0))


@BOTH
@pytest.mark.parametrize("training", [True, False, "mixed"])
def test_only_buffers_change_and_undo_is_exact(method, training):
    model = net()
    model(images())  # running statistics that are not the initial ones
    model.train(bool(training))
    if training == "mixed":
        model[3].eval()
        model[0].eval()
    model[6].register_forward_pre_hook(lambda m, a: None)
    before = bits(model)
    receipt = recalibrate(model, images(seed=1), batch_size=5, method=method)
    after = bits(model)
    same(before, after, values=False)
    assert not torch.equal(before[0]["1.running_var"][1], model[1].running_var)
    assert not torch.equal(before[0]["6.running_mean"][1], model[6].running_mean)
    receipt.undo()
    same(before, bits(model))
    with pytest.raises(RuntimeError, match="undone once"):
        receipt.undo()


@BOTH
@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("called", [True, False])
def test_inference_mode(method, made, called):
    with torch.inference_mode(made):
        model = net()
    x = images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode(called):
        receipt = recalibrate(model, x, batch_size=6, method=method)
    assert model[1].running_mean.is_inference() is made
    first, second, _ = by_hand(model, x, 6, method)
    check(model[1], *first, rtol=1e-5)
    check(model[6], *second, rtol=1e-5)
    receipt.undo()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_gradients_are_off_and_stay_as_they_were():
    model = net()
    seen = []
    model[2].register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    recalibrate(model, images())
    assert seen
    assert not any(seen)
    assert torch.is_grad_enabled()


@BOTH
@pytest.mark.parametrize("fault", ["model", "loader", "interrupt", "nonfinite", "outputs"])
def test_after_an_exception_the_model_is_as_it_was(method, fault):
    model = net()
    model(images())
    model[3].eval()
    calls = 0

    def forward(m, batch):
        nonlocal calls
        calls += 1
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        out = m(batch)
        if fault == "model" and calls == 6:  # in the second pass of layerwise, in the last batch of one_pass
            raise RuntimeError("broken here")
        if fault == "interrupt" and calls == 3:
            raise KeyboardInterrupt("broken here")
        return "no tensor" if fault == "outputs" else out

    class Loader:
        def __iter__(self):
            for i, batch in enumerate(images(24).split(4)):
                if fault == "loader" and i == 4:
                    raise OSError("broken here")
                yield batch * float("nan") if fault == "nonfinite" and i == 3 else batch

    before = bits(model)
    inputs = images(2) if fault == "outputs" else None
    with pytest.raises(BaseException, match=r"broken here|not finite in 4 of 4 channels|same shapes") as caught:
        recalibrate(model, Loader(), method=method, forward=forward, inputs=inputs)
    same(before, bits(model))
    if fault == "nonfinite":
        assert "'1'" in str(caught.value)
    assert torch.is_grad_enabled()


def test_overflow_of_the_buffer_type_is_refused():
    layer = nn.BatchNorm1d(2).half()
    layer.running_var.fill_(3.0)
    x = torch.randn(100, 2).half()
    x[:, 1] *= 1000  # variance 1e6, beyond float16
    with pytest.raises(ValueError, match=r"running_var of '\(the model\)'.* 1 of 2 .*channel 1.*float16"):
        recalibrate(layer, x)
    assert layer.running_var.tolist() == [3.0, 3.0]


class Twice(nn.Module):
    """One layer under two names, called on two inputs."""

    def __init__(self):
        super().__init__()
        self.a = nn.BatchNorm1d(3)
        self.b = self.a

    def forward(self, x):
        return self.a(x) + self.b(10 * x + 1)


@BOTH
def test_a_shared_layer_merges_its_calls(method):
    model, x = Twice(), torch.randn(21, 3)
    receipt = recalibrate(model, x, batch_size=8, method=method)
    check(model.a, *truth(torch.cat([x, 10 * x + 1]), 0))
    assert model.a.num_batches_tracked.item() == 6
    assert list(receipt.edits) == ["a"]
    assert receipt.edits["a"].also == ("b",)
    assert "= b" in str(receipt)


class Loop(nn.Module):
    """The layer's second input depends on its first output."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.bn(3 * self.bn(x) + 1)


@BOTH
def test_a_layer_fed_by_itself_uses_batch_statistics(method):
    model, x = Loop(), torch.randn(20, 2) * 50
    recalibrate(model, x, batch_size=10, method=method)
    again = [3 * (b - b.mean(0)) / (b.var(0, unbiased=False) + 1e-5).sqrt() + 1 for b in x.split(10)]
    check(model.bn, *truth(torch.cat([x, *again]), 0), rtol=1e-5)


def test_frozen_layers_are_untouched_and_named():
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in ("listed", "inside", "marked", "still", "evaluated", "free", "constant"):
        model.add_module(name, nn.Sequential(nn.BatchNorm1d(2)) if name == "inside" else nn.BatchNorm1d(2))
    model.marked.nw_frozen = True
    model.still.momentum = 0.0
    model.evaluated.eval()
    model.free.requires_grad_(False)  # parameters, not statistics
    model.constant.running_mean = model.constant.running_var = None
    x = torch.randn(30, 2) * 4 + 2
    receipt = recalibrate(model, x, batch_size=7, frozen=["listed", "inside"])
    reasons = {
        "listed": "'listed' is in frozen=",
        "inside.0": "'inside' is in frozen=",
        "marked": "nw_frozen",
        "still": "momentum is 0",
        "evaluated": "in evaluation mode while the model trains",
        "constant": "keeps no running statistics",
    }
    assert receipt.skipped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in receipt.skipped[name]
        assert name in str(receipt)
        if name != "constant":
            assert torch.equal(model.get_submodule(name).running_var, torch.ones(2))
    assert list(receipt.edits) == ["free"]
    # frozen layers act as in evaluation: they divide by sqrt(1 + eps), five of them
    check(model.free, *truth(x.double() / (1 + 1e-5) ** 2.5, 0))
    # in a model that is in evaluation mode as a whole, none is deliberately so
    assert "evaluated" in recalibrate(model.eval(), x).edits
    with pytest.raises(ValueError, match="none called 'absent'"):
        recalibrate(model, x, frozen=["absent"])


class Padded(nn.Module):
    def __init__(self, norm, positional):
        super().__init__()
        self.norm, self.positional = norm, positional

    def forward(self, x, mask):
        return self.norm(x, None, mask) if self.positional else self.norm(x, mask=mask)


@BOTH
@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize(
    "make", [lambda: twins.BatchNorm1d(3), lambda: nwn.Norm("[b] c [s...]", c=3)], ids=["twin", "Norm"]
)
def test_masked_positions_count_nothing(method, positional, make):
    x = torch.randn(14, 3, 9) * 2 + 1
    lengths = torch.tensor([9, 1, 0, 4, 5, 9, 2, 2, 3, 8, 1, 6, 7, 9])
    mask = torch.arange(9) < lengths.unsqueeze(1)
    x = torch.where(mask.unsqueeze(1), x, torch.nan)
    model = Padded(make(), positional)
    batches = [{"x": x[i : i + 4], "mask": mask[i : i + 4]} for i in range(0, 14, 4)]
    recalibrate(model, batches, method=method)
    check(model.norm, *truth(x.transpose(1, 2)[mask], 0))


def test_everything_masked_is_refused():
    model = Padded(twins.BatchNorm1d(3), False)
    with pytest.raises(ValueError, match="at least two values, and 'norm'"):
        recalibrate(model, [{"x": torch.randn(4, 3, 2), "mask": torch.zeros(4, 2, dtype=torch.bool)}])


@BOTH
@pytest.mark.parametrize("module", [nn, twins], ids=["torch", "twin"])
def test_instance_norm_averages_over_samples(method, module):
    layer = module.InstanceNorm2d(3, track_running_stats=True)
    x = torch.randn(11, 3, 4, 5) * torch.rand(11, 3, 1, 1) + torch.randn(11, 3, 1, 1)
    recalibrate(layer, x, batch_size=4, method=method)
    mean, var = truth(x, (2, 3))
    check(layer, mean.mean(0), var.mean(0))
    assert layer.num_batches_tracked.item() == 0  # torch's instance norm never counts
    # images of several sizes, unbatched: each sample counts once
    sizes = [torch.randn(3, h, 6) for h in (2, 9, 5)]
    recalibrate(layer, sizes, method=method)
    stats = [truth(image, (1, 2)) for image in sizes]
    check(layer, *(np.mean([s[i] for s in stats], 0) for i in (0, 1)))


def test_instance_norm_agrees_with_training():
    # one batch with momentum 1 is what training itself would store
    ours, theirs = (nn.InstanceNorm1d(3, momentum=1.0, track_running_stats=True) for _ in range(2))
    x = torch.randn(5, 3, 8)
    theirs(x)
    recalibrate(ours, [x])
    check(ours, theirs.running_mean.numpy(), theirs.running_var.numpy())


@BOTH
def test_ghost_batch_norm_takes_the_variance_within_chunks(method):
    layer = nwn.GhostBatchNorm(3, 2, momentum=1.0)
    x = torch.randn(20, 3, 4) + torch.arange(20).view(20, 1, 1)
    recalibrate(layer, [x[:12], x[12:]], method=method)
    chunks = [x[:6], x[6:12], x[12:16], x[16:]]
    m2 = sum(((c - c.mean((0, 2), keepdim=True)) ** 2).double().sum((0, 2)) for c in chunks)
    check(layer, truth(x, (0, 2))[0], (m2 / sum(c.size(0) * 4 - 1 for c in chunks)).numpy(), rtol=1e-5)
    # for one batch, exactly what training stores
    trained = nwn.GhostBatchNorm(3, 2, momentum=1.0)
    trained(x)
    recalibrate(layer, [x])
    check(layer, trained.running_mean.numpy(), trained.running_var.numpy(), rtol=1e-5)


def test_norm_patterns():
    x = torch.randn(13, 6, 4) + 3
    packed = nwn.Norm("[b] (k c) [s...]", k=2, c=3)
    recalibrate(packed, x, batch_size=5)
    check(packed, *truth(x, (0, 2)))
    uncentred = nwn.Norm("[b] c [s...]", c=6, center=False)
    recalibrate(uncentred, x, batch_size=5)
    np.testing.assert_allclose(uncentred.running_var.numpy(), (x.double() ** 2).mean((0, 2)).numpy(), rtol=1e-6)
    chunked = nwn.Norm("(n [b]) c [s...]", n=2, c=6, new_weight=1.0)
    trained = copy.deepcopy(chunked)
    trained(x[:12])
    recalibrate(chunked, [x[:12]])
    check(chunked, trained.running_mean.numpy(), trained.running_var.numpy())
    still = nwn.Norm("[b] c [s...]", c=6, new_weight=0.0)
    assert "momentum is 0" in recalibrate(still, x).skipped[""]


class Own(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_scale", torch.ones(3))

    def forward(self, x):
        return x


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.unknown, self.aside = Own(3), Unknown(), nn.BatchNorm2d(3)
        self.sync = nn.SyncBatchNorm(3)

    def forward(self, x):
        x = self.sync(self.unknown(self.own(x)))
        return self.aside(x) if self.training else x


@BOTH
def test_subclasses_unknown_classes_and_layers_not_called(method):
    model, x = Partly(), torch.randn(10, 3, 4, 4) + 1
    before = bits(model)
    receipt = recalibrate(model, x, batch_size=4, method=method)
    check(model.own, *truth(x, (0, 2, 3)))
    assert list(receipt.edits) == ["own", "sync"]
    assert "unknown class Unknown with running_scale" in receipt.skipped["unknown"]
    assert "not called" in receipt.skipped["aside"]
    assert torch.equal(model.aside.running_mean, before[0]["aside.running_mean"][1])
    assert [m.training for m in model.modules()] == before[1]


def test_no_norm_reads_nothing():
    def never():
        raise AssertionError("read")
        yield

    receipt = recalibrate(nn.Linear(3, 3), never(), method="one_pass")
    assert not receipt.edits


@pytest.mark.parametrize("wrap", ["compile", "DataParallel"])
def test_wrappers_are_looked_through(wrap):
    inner, x = net(), images()
    model = torch.compile(inner, backend="eager") if wrap == "compile" else nn.DataParallel(inner)
    receipt = recalibrate(model, x, batch_size=6)
    check(inner[1], *by_hand(inner, x, 6, "layerwise")[0], rtol=1e-5)
    assert list(receipt.edits) == ["1", "6"]
    assert receipt.model is model


@pytest.mark.slow
def test_a_compiled_part_is_run_eagerly():
    part = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model, x = nn.Sequential(torch.compile(part, backend="eager"), nn.Linear(3, 2)), torch.randn(20, 3)
    for training in (True, False):  # graphs made before there were hooks
        model.train(training)(x)
    receipt = recalibrate(model, x, batch_size=6)
    assert list(receipt.edits) == ["0.1"]
    check(part[1], *truth(part[0](x).detach(), 0))


def test_the_user_s_own_hook_is_seen():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2 + 1,))
    x = torch.randn(20, 3)
    recalibrate(model, x, batch_size=8)
    check(model[0], *truth(2 * x + 1, 0))
    assert len(model[0]._forward_pre_hooks) == 1


@BOTH
def test_the_ways_to_give_batches(method):
    x = torch.randn(20, 3)
    parts = x.split(8)
    ways = [
        (list(parts), {}),
        ([(part, torch.zeros(len(part))) for part in parts], {}),
        ([[part] for part in parts], {}),
        ([{"input": part} for part in parts], {}),
        (DataLoader(TensorDataset(x, x), batch_size=8), {}),
        ([("a", part) for part in parts], {"forward": lambda model, batch: model(batch[1])}),
        (x, {"batch_size": 8, "device": "cpu"}),
        ([*parts, torch.full((4, 3), torch.nan)], {"limit": 3}),
        ([*parts, torch.empty(0, 3)], {}),
    ]
    for batches, options in ways:
        layer = nn.BatchNorm1d(3)
        recalibrate(layer, batches, method=method, **options)
        check(layer, *truth(x, 0))


def test_a_generator_is_read_once():
    x, model = images(), net()
    before = bits(model)
    with pytest.raises(ValueError, match=r'generator can be read once only\. Pass .* method="one_pass"'):
        recalibrate(model, (part for part in x.split(6)))
    same(before, bits(model))
    recalibrate(model, (part for part in x.split(6)), method="one_pass")
    check(model[6], *by_hand(model, x, 6, "one_pass")[1], rtol=1e-5)


def test_passes_of_different_length_are_refused():
    class Spent:
        def __init__(self):
            self.parts = iter(images().split(6))

        def __iter__(self):
            return (part for part in self.parts)

    model = net()
    before = bits(model)
    with pytest.raises(ValueError, match="first pass had 4 batches and pass 2 had 0"):
        recalibrate(model, Spent())
    same(before, bits(model))


def test_a_layer_that_is_not_met_again_is_skipped():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.calls = nn.BatchNorm1d(3), nn.BatchNorm1d(3), 0

        def forward(self, x):
            self.calls += 1
            return self.second(self.first(x)) if self.calls == 1 else self.first(x)

    receipt = recalibrate(Once(), [torch.randn(8, 3)])
    assert list(receipt.edits) == ["first"]
    assert receipt.skipped.keys() == {"second"}


@BOTH
def test_wrong_requests(method):
    model = net()
    for batches in ([], images()[:0].split(1)[1:], DataLoader(TensorDataset(images(3)), batch_size=5, drop_last=True)):
        with pytest.raises(ValueError, match="there were no batches"):
            recalibrate(model, batches, method=method)
    with pytest.raises(ValueError, match="method is one of 'layerwise', 'one_pass'; got 'twice'"):
        recalibrate(model, images(), method="twice")
    for options in ({"limit": 0}, {"limit": 1.5}, {"batch_size": -1}, {"batch_size": True}):
        with pytest.raises(ValueError, match="is a positive number of"):
            recalibrate(model, images(), method=method, **options)
    with pytest.raises(ValueError, match="an input; run the model once first"):
        recalibrate(nn.Sequential(nn.LazyBatchNorm2d()), images(), method=method)
    with pytest.raises(ValueError, match=r"more than one value|at least two values"):
        recalibrate(nn.BatchNorm1d(3), [torch.randn(1, 3)], method=method)


def test_a_last_batch_of_one():
    x, model = torch.randn(9, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    recalibrate(model, x, batch_size=4)
    check(model[0], *truth(x, 0))
    check(model[2], *truth(model[1](model.eval()[0](x)).detach(), 0), rtol=1e-5)
    with pytest.raises(ValueError, match=r"'0' got \(1, 3\)"):
        recalibrate(model, x, batch_size=4, method="one_pass")


def test_the_cumulative_average_goes_on_from_there():
    layer, x, new = nn.BatchNorm1d(3, momentum=None), torch.randn(20, 3), torch.randn(6, 3)
    recalibrate(layer, x, batch_size=5)
    assert layer.num_batches_tracked.item() == 4
    layer.train()(new)
    check(layer, (4 * truth(x, 0)[0] + truth(new, 0)[0]) / 5, (4 * truth(x, 0)[1] + truth(new, 0)[1]) / 5)


@pytest.mark.parametrize("own_generator", [True, False])
def test_a_shuffled_loader_gives_each_pass_the_same_data(own_generator):
    x = images(30)
    generator = torch.Generator().manual_seed(5) if own_generator else None
    loader = DataLoader(TensorDataset(x), batch_size=7, shuffle=True, drop_last=True, generator=generator)
    model = net()
    torch.manual_seed(8)
    state = loader.generator.get_state() if own_generator else torch.get_rng_state()
    recalibrate(model, loader)
    assert torch.equal(loader.generator.get_state() if own_generator else torch.get_rng_state(), state)
    used = torch.cat([batch[0] for batch in loader])  # the same order again
    first, second, _ = by_hand(model, used, 7, "layerwise")
    check(model[1], *first, rtol=1e-5)
    check(model[6], *second, rtol=1e-5)


@BOTH
def test_the_receipt_measures_the_outputs(method):
    model, x = net(), images()
    old = copy.deepcopy(model).eval()(x[:5])
    receipt = recalibrate(model, x, batch_size=6, method=method, inputs=(x[:5], None))
    difference = (model.eval()(x[:5]) - old).detach().double()
    assert receipt.max_difference == pytest.approx(difference.abs().max().item(), rel=1e-6)
    assert receipt.rms_difference == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-6)
    edit = receipt.edits["1"]
    assert edit.before == {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    assert edit.after["running_var"] == pytest.approx(model[1].running_var.double().mean().item())
    assert edit.after["num_batches_tracked"] == 4
    moved = (model[1].running_mean.abs() / model[1].running_var.sqrt()).max().item()
    assert edit.measured["mean moved, sd, at most"] == pytest.approx(moved, rel=1e-5)
    assert edit.measured["variance ×, most"] == pytest.approx(model[1].running_var.max().item(), rel=1e-6)
    assert recalibrate(model, x).max_difference is None


def test_standard_error_of_independent_values():
    # of a normal distribution: sd/√n for the mean, √(2/n) for the variance
    layer, tolerance, n = nn.BatchNorm1d(1), 0.02, 50
    data = [torch.randn(n, 1) * 3 + 5 for _ in range(400)]
    receipt = recalibrate(layer, data, tolerance=tolerance)
    used = receipt.facts["batches"]
    assert receipt.facts["standard error"] == pytest.approx((2 / (used * n)) ** 0.5, rel=0.4)
    assert receipt.facts["standard error"] <= tolerance == receipt.facts["tolerance"]
    assert 2 / tolerance**2 / n / 2 < used < 2 / tolerance**2 / n * 2.5
    check(layer, *truth(torch.cat(data[:used]), 0))
    assert receipt.edits[""].measured["standard error"] == receipt.facts["standard error"]
    assert receipt.edits[""].measured["batches"] == used == layer.num_batches_tracked.item()


def test_standard_error_of_correlated_values():
    # values of a batch share a shift of variance 1 and have 0.25 of their own: 32 batches are 32 values, not 3200
    generator = np.random.default_rng(0)
    shifts = generator.normal(size=32)
    data = [torch.tensor(shift + generator.normal(size=(100, 1)) * 0.5) for shift in shifts]
    layer = nn.BatchNorm1d(1).double()
    error = recalibrate(layer, data, tolerance=1e-9).facts["standard error"]
    x, k = torch.stack(data).squeeze(-1).numpy(), 32
    mean, var = x.mean(), x.var()
    of_mean = x.mean(1).std(ddof=1) / k**0.5 / var**0.5
    of_var = ((x - mean) ** 2).mean(1).std(ddof=1) / k**0.5 / var
    assert error == pytest.approx(max(of_mean, of_var), rel=1e-9)
    assert of_mean > 0.1  # by the number of values it would be 0.018
    assert recalibrate(layer, data, tolerance=0.1).facts["batches"] == 32


def test_standard_error_sees_runs_of_batches():
    # the batches wander slowly: 32 neighbours resemble each other, and pairs of blocks are merged as they grow
    steps = torch.arange(256.0).double()
    slow = torch.sin(steps / 20).unsqueeze(1)
    layer = nn.BatchNorm1d(1).double()
    noise = torch.randn(256, 1, 1).double() * 0.01
    error = recalibrate(layer, list(slow.unsqueeze(1).expand(-1, 4, 1) + noise), tolerance=1e-9).facts["standard error"]
    x = (slow.unsqueeze(1) + noise).flatten().numpy()
    blocks = x.reshape(32, 8)  # 256 batches leave 32 blocks of 8
    of_mean = blocks.mean(1).std(ddof=1) / 32**0.5 / x.std()
    of_var = ((blocks - x.mean()) ** 2).mean(1).std(ddof=1) / 32**0.5 / x.var()
    assert error == pytest.approx(max(of_mean, of_var), rel=1e-9)


def test_standard_error_of_blocks_of_unequal_size():
    # the delta method by jackknife-free algebra: a ratio of sums
    sizes = [3 + i % 5 for i in range(20)]
    data = [torch.randn(n, 2).double() + i % 3 for i, n in enumerate(sizes)]
    layer = nn.BatchNorm1d(2).double()
    error = recalibrate(layer, data, tolerance=1e-9).facts["standard error"]
    x, n, k = np.concatenate([d.numpy() for d in data]), np.array(sizes), 20
    mean, var, errors = x.mean(0), x.var(0), []
    for values, total, unit in ((x, mean, np.sqrt(var)), ((x - mean) ** 2, var, var)):
        sums = np.array([part.sum(0) for part in np.split(values, np.cumsum(n)[:-1])])
        residual = sums - n[:, None] * total
        errors.append(np.sqrt(k / (k - 1) * (residual**2).sum(0)) / n.sum() / unit)
    assert error == pytest.approx(np.max(errors), rel=1e-9)


@BOTH
def test_each_pass_stops_on_its_own(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    data = [torch.randn(20, 3) for _ in range(300)]
    receipt = recalibrate(model, data, tolerance=0.05, method=method)
    measured = [receipt.edits[name].measured for name in ("0", "2", "3")]
    assert all(m["standard error"] <= 0.05 for m in measured)
    assert max(m["batches"] for m in measured) == receipt.facts["batches"] < 300
    check(model[0], *truth(torch.cat(data[: measured[0]["batches"]]), 0))
    if method == "one_pass":
        assert len({m["batches"] for m in measured}) == 1
    # constant channels are known exactly, and the third layer's outputs are nearly the second's
    constant = nn.BatchNorm1d(2)
    assert recalibrate(constant, [torch.ones(4, 2)] * 40, tolerance=0.01).facts["batches"] == 16


def test_a_tolerance_that_is_not_reached_reads_everything():
    layer, x = nn.BatchNorm1d(3), torch.randn(300, 3)
    receipt = recalibrate(layer, x, batch_size=10, tolerance=0.001)
    check(layer, *truth(x, 0))
    assert receipt.facts["batches"] == 30
    assert receipt.facts["standard error"] > 0.001
    assert recalibrate(layer, x, batch_size=100, tolerance=0.1).facts["standard error"] == float("inf")  # 3 batches
    for wrong, options in (("positive standard error", {}), ("forgets as it reads", {"stats": "ema"})):
        with pytest.raises(ValueError, match=wrong):
            recalibrate(layer, x, tolerance=0.1 if options else 0.0, **options)


@BOTH
@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
@pytest.mark.parametrize(
    "make",
    [
        lambda m: nn.BatchNorm1d(3, momentum=m),
        lambda m: twins.InstanceNorm1d(3, momentum=m, track_running_stats=True),
        lambda m: nwn.Norm("[b] c [s...]", c=3, new_weight=m),
    ],
    ids=["batch", "instance", "Norm"],
)
def test_exponential_averages_are_training_s_without_the_start(method, momentum, make):
    if momentum is None and isinstance(make(0.1), nn.InstanceNorm1d):
        pytest.skip("torch's instance norm does not average with momentum None")
    x = [torch.randn(6, 3, 5) * (1 + i) + i for i in range(4)]
    ours, theirs = make(momentum), make(momentum)
    start = (theirs.running_mean.clone(), theirs.running_var.clone())
    for batch in x:
        theirs.train()(batch)
    left = 0.0 if momentum is None else (1 - momentum) ** 4
    want = [(t - left * s) / (1 - left) for t, s in zip((theirs.running_mean, theirs.running_var), start, strict=True)]
    receipt = recalibrate(ours, x, stats="ema", method=method)
    check(ours, *(value.numpy() for value in want), rtol=1e-5)
    assert receipt.facts["stats"] == "ema"
    with pytest.raises(
        ValueError, match=r"at least two values, and '\(the model\)' met fewer in a batch|more than one"
    ):
        recalibrate(nn.BatchNorm1d(3), [torch.randn(4, 3), torch.randn(1, 3)], stats="ema", method=method)
    with pytest.raises(ValueError, match="stats is one of 'population', 'ema'; got 'mean'"):
        recalibrate(ours, x, stats="mean")


@BOTH
@pytest.mark.parametrize("make", [BatchRenorm, SwitchNorm, EvoNormB0], ids=lambda cls: cls.__name__)
def test_layers_outside_the_notation(method, make):
    torch.manual_seed(0)
    model = nn.Sequential(make(2), nn.Conv2d(2, 3, 1), make(3))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.running_var.fill_(50.0)  # stale, and must not reach the result
    x = torch.randn(23, 2, 4, 4) * 3 + 2
    recalibrate(model, x, batch_size=8, method=method)
    np.testing.assert_allclose(model[0].running_var.numpy(), truth(x, (0, 2, 3))[1], rtol=1e-5)
    if make is not EvoNormB0:
        check(model[0], *truth(x, (0, 2, 3)))
    if method == "layerwise":
        inner = model[1](model.eval()[0](x)).detach()
    else:
        fresh = copy.deepcopy(model[0]).train()
        if make is BatchRenorm:
            fresh.set_limits(1, 0)
            assert model[0].r_max.item() == 3
        inner = torch.cat([model[1](fresh(part)).detach() for part in x.split(8)])
    np.testing.assert_allclose(model[2].running_var.numpy(), truth(inner, (0, 2, 3))[1], rtol=1e-4)
    assert model[2].num_batches_tracked.item() == 3


def domains_net():
    torch.manual_seed(0)
    return nn.Sequential(SplitBatchNorm(3, 2), nn.Linear(3, 3), SplitBatchNorm(3, 2), nn.BatchNorm1d(3))


@BOTH
@pytest.mark.parametrize("how", ["list", "mapping", "generators"])
def test_each_domain_from_its_own_data(method, how):
    model = domains_net()
    model[0].split = model[2].split = 1
    x = [torch.randn(20, 3) * 2 + 1, torch.randn(14, 3) * 5 - 3]
    if how == "generators" and method == "layerwise":
        with pytest.raises(ValueError, match="generator can be read once only"):
            recalibrate(model, domains=[(p for p in part.split(7)) for part in x])
        return
    domains = {"list": x, "mapping": {1: x[1].split(7), 0: x[0].split(7)}, "generators": [iter(p.split(7)) for p in x]}
    receipt = recalibrate(model, domains=domains[how], batch_size=7, method=method)
    assert (model[0].split, model[2].split, model.training) == (1, 1, True)
    assert receipt.edits["0"].what == "running statistics of domain 0, 1"
    last = []
    for d, part in enumerate(x):
        mean, var = truth(part, 0)
        np.testing.assert_allclose(model[0].running_mean[d].numpy(), mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(model[0].running_var[d].numpy(), var, rtol=1e-5)
        parts = [part] if method == "layerwise" else part.split(7)
        inner = []
        for piece in parts:  # normalized by the domain, or each batch by itself
            m, v = truth(piece, 0) if method == "layerwise" else (piece.double().mean(0), piece.double().var(0, False))
            y = (piece.double() - torch.as_tensor(m)) / (torch.as_tensor(v) + 1e-5).sqrt()
            inner.append(y @ model[1].weight.double().T + model[1].bias.double())
        np.testing.assert_allclose(model[2].running_mean[d].numpy(), truth(torch.cat(inner).detach(), 0)[0], atol=2e-6)
        np.testing.assert_allclose(model[2].running_var[d].numpy(), truth(torch.cat(inner).detach(), 0)[1], rtol=1e-5)
        for y in inner:
            m, v = truth(torch.cat(inner).detach(), 0) if method == "layerwise" else (y.mean(0), y.var(0, False))
            last.append(((y - torch.as_tensor(m)) / (torch.as_tensor(v) + 1e-5).sqrt()).detach())
    check(model[3], *truth(torch.cat(last), 0), rtol=1e-5)  # an ordinary layer sees all domains
    assert model[3].num_batches_tracked.item() == 5
    assert model[0].num_batches_tracked.item() == 3
    receipt.undo()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), domains_net().state_dict().values(), strict=True)
    )


@BOTH
def test_without_domains_the_one_in_use(method):
    model, x = domains_net(), torch.randn(20, 3) * 2 + 1
    model[0].split = model[2].split = 1
    receipt = recalibrate(model, x, batch_size=7, method=method)
    assert receipt.edits["2"].what == "running statistics of domain 1"
    np.testing.assert_allclose(model[0].running_var[1].numpy(), truth(x, 0)[1], rtol=1e-5)
    assert torch.equal(model[0].running_var[0], torch.ones(3))
    assert torch.equal(model[2].running_mean[0], torch.zeros(3))


def test_wrong_domains():
    model, x = domains_net(), torch.randn(20, 3)
    for arguments, options, wrong in (
        ((x,), {"domains": [x]}, "one of the two"),
        ((), {}, "one of the two"),
        ((), {"domains": [x, x, x]}, r"domains 0 to 1, got \[0, 1, 2\]"),
        ((), {"domains": {"clean": x}}, r"domains 0 to 1, got \['clean'\]"),
        ((), {"domains": [x], "tolerance": 0.1}, "With domains= all data are read"),
    ):
        with pytest.raises(ValueError, match=wrong):
            recalibrate(model, *arguments, **options)
    with pytest.raises(ValueError, match="this model's layers have none"):
        recalibrate(nn.BatchNorm1d(3), domains=[x])

    def broken(m, batch):
        raise OSError("broken here")

    with pytest.raises(OSError, match="broken here"):
        recalibrate(model, domains={1: x}, forward=broken)
    assert model[0].split == 0
