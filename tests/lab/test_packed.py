"""K networks trained as one, against the same networks alone, torch's own optimizers and the sequential engine."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normwright.lab import engine
from normwright.lab.data import Dataset
from normwright.lab.engine import End, Epoch, Job, Start, make_optimizer
from normwright.lab.packed import CannotPack, FlatOptimizer, evaluate, fastest, pack, packed, train_epoch
from normwright.lab.packed.leaves import Conv, Each
from normwright.lab.study import Arm, Study
from normwright.layers import twins
from normwright.layers.dyt import DyT
from normwright.layers.norm import ChannelNorm, FilterResponseNorm, GhostBatchNorm

SHAPE = (2, 8, 8)


class Residual(nn.Module):
    """A network with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=2, bias=False)
        self.act = nn.ReLU()  # called twice
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.one(x))
        return self.head(self.act(x + self.two(x)).mean((2, 3)))


class Scaled(nn.Module):
    """A parameter outside of any known layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 4, 1, 1) + 0.5)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.inner(x) * self.scale


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(144, 3)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


def lenet(norm=None, dense=None):
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), *([norm] if norm else []), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 2)),
        *(nn.Flatten(), *([dense] if dense else []), nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 3)),
    )


NETWORKS = {
    "plain": lenet,
    "batch norm": lambda: lenet(twins.BatchNorm2d(4, act="sigmoid"), twins.BatchNorm1d(24)),
    "torch's batch norm": lambda: lenet(nn.BatchNorm2d(4, affine=False), nn.BatchNorm1d(24, momentum=None)),
    "group norm": lambda: lenet(nn.GroupNorm(2, 4), twins.GroupNorm(3, 24)),
    "instance norm": lambda: lenet(twins.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "layer norm": lambda: lenet(nn.LayerNorm((4, 6, 6)), twins.LayerNorm(24)),
    "rms norm": lambda: lenet(twins.RMSNorm((4, 6, 6), act="relu"), nn.RMSNorm(24)),
    "layer norm of places": lambda: lenet(nn.LayerNorm(6)),
    "channel norm": lambda: lenet(ChannelNorm(4, act="silu"), ChannelNorm(24)),
    "ghost, response": lambda: lenet(FilterResponseNorm(4), GhostBatchNorm(24, 2)),
    "of unknown kind": lambda: lenet(nn.PReLU(4), DyT(24)),
    "whole part": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), Scaled(), nn.Flatten(), nn.Linear(144, 3)),
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), lenet()),
    "dense first": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 3)),
    "residual": Residual,
    "depthwise first": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, stride=2), nn.Flatten(), nn.Linear(36, 3)),
    "views": Viewed,
}


def networks(build, K, dtype=torch.float64):
    """K networks whose parameters and buffers all differ."""
    found = []
    for seed in range(K):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build().to(dtype)
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    if tensor.is_floating_point():
                        tensor.add_(0.3 * torch.rand_like(tensor))
        found.append(model)
    return found


def images(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def without_dropout(*models):
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_outputs_gradients_and_buffers_are_those_of_each_network(name, shared):
    K, B = 3, 6
    models = networks(NETWORKS[name], K)
    network = pack(models, SHAPE)
    x = images(B, K, *SHAPE, seed=1)
    if shared:
        x[:] = x[:, :1]
    for training in (True, False):
        network.train(training)
        for model in models:
            model.train(training)
        without_dropout(network, *models)
        network.gradient.zero_()
        got = network(x[:, 0] if shared else x.flatten(1, 2)).view(B, K, -1)
        weights = images(*got.shape, seed=2)
        (got * weights).sum().backward()
        for k, model in enumerate(models):
            model.zero_grad()
            expected = model(x[:, k])
            torch.testing.assert_close(got[:, k], expected, rtol=1e-10, atol=1e-10)
            (expected * weights[:, k]).sum().backward()
            for key, parameter in model.named_parameters():
                torch.testing.assert_close(
                    network.rows(network.gradient, key)[k], parameter.grad, rtol=1e-9, atol=1e-9, msg=f"{key} of {k}"
                )
            state = network.unpack(k)
            for key, buffer in model.named_buffers():
                torch.testing.assert_close(state[key], buffer, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_unpacking_gives_the_networks_back_bit_for_bit(name):
    models = networks(NETWORKS[name], 3, torch.float32)
    network = pack(models, SHAPE)
    for k, model in enumerate(models):
        state = network.unpack(k)
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert state._metadata == model.state_dict()._metadata
    network.load(1, models[2].state_dict())
    assert all(torch.equal(network.unpack(1)[key], value) for key, value in models[2].state_dict().items())
    assert all(torch.equal(network.unpack(0)[key], value) for key, value in models[0].state_dict().items())


def test_what_is_known_runs_at_once_and_what_is_not_runs_for_each():
    network = pack(networks(NETWORKS["batch norm"], 2), SHAPE)
    assert not any(isinstance(module, Each) for module in network.modules())
    network = pack(networks(NETWORKS["whole part"], 2), SHAPE)
    assert isinstance(network.leaves["1"], Each)
    assert "Scaled is unknown and runs once for each network" in network.explain()


@pytest.mark.parametrize("way", ["grouped", "apart", "unfold"])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_every_way_of_a_convolution_is_the_convolution(way, last):
    def build():
        return nn.Sequential(
            nn.Conv2d(1, 2, (3, 2), stride=(1, 2), padding=(1, 2)), nn.Conv2d(2, 3, 3, dilation=(2, 1)), nn.Flatten()
        )

    K, models = 3, networks(build, 3)
    network = pack(models, (1, 9, 9))
    for leaf in network.leaves.values():
        if isinstance(leaf, Conv):
            leaf.way, leaf.channels_last = way, last
    x = images(4, K, 1, 9, 9)
    for given, theirs in ((x.flatten(1, 2), x), (x[:, 0], x[:, :1].expand_as(x))):
        got = network(given).view(4, K, -1)
        for k, model in enumerate(models):
            torch.testing.assert_close(got[:, k], model(theirs[:, k]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d((2, 3)), nn.AvgPool2d(3), nn.AvgPool2d(2, 1), nn.AvgPool2d(2, padding=1)]
)
def test_average_pooling_by_tiles_is_torchs(pool):
    def build():
        return nn.Sequential(nn.Conv2d(2, 4, 1), copy.deepcopy(pool), nn.Conv2d(4, 1, 1), nn.Flatten())

    models = networks(build, 2)
    network = pack(models, (2, 8, 12))
    for leaf in network.leaves.values():
        if isinstance(leaf, Conv):
            leaf.channels_last = True
    x = images(3, 2, 8, 12)
    network(x).sin().sum().backward()
    for k, model in enumerate(models):
        model(x).sin().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(network.rows(network.gradient, key)[k], parameter.grad, rtol=1e-10, atol=1e-10)


def test_the_fastest_way_is_measured_once_and_told():
    network = pack(networks(lenet, 3, torch.float32), SHAPE)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        before = torch.get_rng_state()
        fastest(network, (8, *SHAPE), shared=False)
        assert torch.equal(torch.get_rng_state(), before)
    assert "ms with channels first" in network.explain()
    assert "apart" in network.explain()
    assert not network.gradient.any()
    again = pack(networks(lenet, 3, torch.float32), SHAPE)
    fastest(again, (8, *SHAPE), shared=False)
    assert again.explain() == network.explain()


class AcrossChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head((self.conv(x) / self.conv(x).std((1, 2, 3), keepdim=True)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(128, 128), nn.Linear(128, 128)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x.flatten(1)))


class Hooked(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(128, 3))
        self[1].register_forward_hook(lambda module, inputs, output: 2 * output)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(128, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x.flatten(1))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (AcrossChannels, "does not keep channels apart"),
        (Tied, "one.weight and two.weight are one"),
        (Hooked, r"1 \(Linear\) has hooks"),
        (Idle, r"idle \(Linear\) has parameters and is not called"),
        (nn.Identity, "no parameters"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(build, text):
    with pytest.raises(CannotPack, match=text):
        pack([build(), build()], SHAPE)


def test_networks_that_differ_in_more_than_values_are_refused():
    with pytest.raises(CannotPack, match="settings of layers"):
        pack([lenet(nn.BatchNorm2d(4)), lenet(nn.BatchNorm2d(4, eps=1e-3))], SHAPE)
    frozen = lenet()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(CannotPack, match="differ in structure"):
        pack([lenet(), frozen], SHAPE)


# ---- the optimizer

RATES = [
    {"lr": 0.1, "weight_decay": 0.0},
    {"lr": 0.02, "weight_decay": 0.1},
    {"lr": 0.5, "weight_decay": 0.01},
]
OPTIMIZERS = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "adagrad"},
    {"optimizer": "rmsprop"},
    {"optimizer": "adadelta"},
    {"optimizer": "adam"},
]


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_flat_step_is_torchs_and_its_state_passes_between_them(settings, clip):
    def build():
        model = nn.Sequential(nn.Flatten(), nn.Linear(128, 5), nn.Tanh(), nn.Linear(5, 3))
        model[1].bias.requires_grad_(False)
        return model

    models = networks(build, 3)
    optimizers = [make_optimizer(model, {**settings, **rate}) for model, rate in zip(models, RATES, strict=True)]
    network = pack(models, SHAPE)
    flat = FlatOptimizer(network, optimizers)

    def together(flat, network, steps):
        for step in steps:
            network.gradient.zero_()
            x = images(7, *SHAPE, seed=step)
            network(x).view(7, 3, -1).square().mean((0, 2)).sum().backward()
            if clip is not None:
                flat.clip(clip)
            flat.step()

    def alone(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            for step in steps:
                optimizer.zero_grad()
                model(images(7, *SHAPE, seed=step)).square().mean().backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
                optimizer.step()

    def same(flat, network):
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for key, value in model.state_dict().items():
                torch.testing.assert_close(network.unpack(k)[key], value, rtol=1e-9, atol=1e-11)
            ours, theirs = flat.state_dict(k), optimizer.state_dict()
            assert ours["param_groups"] == theirs["param_groups"]
            assert ours["state"].keys() == theirs["state"].keys()
            for i, kept in theirs["state"].items():
                assert ours["state"][i].keys() == kept.keys()
                for key, value in kept.items():
                    torch.testing.assert_close(ours["state"][i][key], value, rtol=1e-8, atol=1e-14, msg=f"{i} {key}")

    together(flat, network, range(4))
    alone(range(4))
    same(flat, network)
    # torch's optimizers go on from the flat one's state, and a second flat one from theirs
    for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        model.load_state_dict(network.unpack(k))
        optimizer.load_state_dict(flat.state_dict(k))
    second = pack(models, SHAPE)
    second_flat = FlatOptimizer(second, optimizers)
    together(second_flat, second, range(4, 7))
    alone(range(4, 7))
    same(second_flat, second)


def test_frozen_parameters_stay_and_a_frozen_network_too():
    models = networks(lenet, 3)
    network = pack(models, SHAPE)
    flat = FlatOptimizer(network, [make_optimizer(model, {"optimizer": "adam", **RATES[1]}) for model in models])
    flat.freeze(1)
    network.gradient.normal_()
    flat.step()
    moved = [
        [not torch.equal(network.unpack(k)[key], value) for key, value in model.state_dict().items()]
        for k, model in enumerate(models)
    ]
    assert all(moved[0])
    assert not any(moved[1])
    assert all(moved[2])


# ---- the engine


def build(settings, shape, classes):
    # a bias in front of batch norm has a gradient of rounding errors alone, which Adam scales up to those of the others
    layers = [nn.Conv2d(shape[0], 3, 3, bias=settings["norm"] != "bn")]
    if settings["norm"] == "bn":
        layers.append(nn.BatchNorm2d(3))
    layers += [nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Flatten()]
    if settings.get("dropout"):
        layers.append(nn.Dropout(settings["dropout"]))
    model = nn.Sequential(*layers, nn.Linear(16, classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(settings.get("scale", 1.0))
    return model.to(getattr(torch, settings.get("dtype", "float32")))


STUDY = Study(
    name="tiny",
    title="Tiny",
    question="?",
    claim="!",
    source="",
    arms=(Arm("bn", "with", {"norm": "bn"}), Arm("none", "without", {"norm": "none"})),
    build=build,
    contrasts=(),
    fixed={"epochs": 3, "batch_size": 16, "optimizer": "sgd", "validation": 20},
    nuisance={"lr": 0.5},
)


def blobs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(3, 1, 8, 8, generator=generator)

    def draw(n):
        y = torch.arange(n) % 3
        return (centres[y] + 0.3 * torch.randn(n, 1, 8, 8, generator=generator)).to(dtype), y

    (x_train, y_train), (x_test, y_test) = draw(117), draw(50)  # 117 − 20: six batches of 16 and one image more
    return Dataset("blobs", x_train, y_train, x_test, y_test, ("a", "b", "c"), "made up", "0" * 64)


def work(dtype=torch.float32, study=STUDY, **overrides):
    settings = {
        arm.name: {**study.fixed, **study.nuisance, **arm.settings, "dtype": str(dtype).split(".")[1], **overrides}
        for arm in study.arms
    }
    return Job(study, blobs(dtype), settings, torch.device("cpu"))


def runs(job, arm="bn", each=({"lr": 0.5}, {"lr": 0.1, "scale": 0.5}, {"lr": 1.0, "weight_decay": 0.01})):
    return [Start(10 + k, arm, k, {**job.settings[arm], **own}) for k, own in enumerate(each)]


def train(engine_, job, starts, epochs=None):
    """Events by run, until every run has recorded so many epochs."""
    found = {start.run: [] for start in starts}
    ticks = []
    for events in engine_(job, starts, ticks.append):
        for event in events:
            found[event.run].append(copy.deepcopy(event))  # the sequential engine yields the tensors it trains
        if epochs is not None and all(len(own) >= epochs for own in found.values()):
            break
    return found, sum(ticks)


def close(ours, theirs, tolerance):
    assert [type(event) for event in ours] == [type(event) for event in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.metrics.keys() == b.metrics.keys()
        for key in a.metrics:
            if "acc" in key:  # may differ by an image whose two best classes are as good as equal
                assert a.metrics[key] == pytest.approx(b.metrics[key], abs=0.051 if tolerance > 1e-8 else 1e-12), key
            elif "loss" in key:  # the sequential engine adds losses up in float32
                assert a.metrics[key] == pytest.approx(b.metrics[key], rel=max(tolerance, 1e-6)), key
        network = a.checkpoint if isinstance(a, Epoch) else a.trained
        other = b.checkpoint if isinstance(b, Epoch) else b.trained
        for key, value in other["model"].items():
            torch.testing.assert_close(network["model"][key], value, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("order", ["seed", "shared"])
@pytest.mark.parametrize("arm", ["bn", "none"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_trains_as_the_sequential_engine_does(dtype, tolerance, order, arm, optimizer):
    """Weights, buffers and every metric after each of three epochs, three networks of different rates and scales."""
    job = work(dtype, order=order, optimizer=optimizer, clip=1.0)
    each = ({"lr": 0.05}, {"lr": 0.01, "scale": 0.5}, {"lr": 0.02, "weight_decay": 0.01})
    starts = runs(job, arm, each)
    ours, ticks = train(packed, job, starts)
    theirs, their_ticks = train(engine.sequential, job, starts)
    assert ticks == their_ticks == 3 * 3 * 97
    for run in ours:
        close(ours[run], theirs[run], tolerance)
        assert ours[run][-1].status == "finished"


def test_one_network_alone_is_the_sequential_engines_bit_for_bit():
    job = work()
    starts = runs(job)[:1]
    ours, theirs = train(packed, job, starts)[0][10], train(engine.sequential, job, starts)[0][10]
    for key, value in theirs[-1].trained["model"].items():
        assert torch.equal(ours[-1].trained["model"][key], value), key


@pytest.mark.parametrize("first", ["packed", "sequential"])
@pytest.mark.parametrize(("optimizer", "order"), [("sgd", "seed"), ("adam", "shared")])
def test_either_engine_goes_on_from_what_the_other_left(first, optimizer, order):
    job = work(torch.float64, optimizer=optimizer, momentum=0.9, order=order)
    starts = runs(job, each=({"lr": 0.05}, {"lr": 0.02}))
    whole = train(engine.sequential, job, starts)[0]
    begin, go_on = (packed, engine.sequential) if first == "packed" else (engine.sequential, packed)
    half = {}
    for group in [starts] if first == "packed" else [[start] for start in starts]:
        half |= train(begin, job, group, epochs=1)[0]
    left = [
        replace(start, epochs=1, metrics=half[start.run][0].metrics, state=half[start.run][0].checkpoint)
        for start in starts
    ]
    rest = train(go_on, job, left)[0]
    for run, events in rest.items():
        close(events, whole[run][1:], 1e-10)


def test_an_interrupted_pack_goes_on_bit_for_bit_dropout_included():
    job = work(dropout=0.4)
    starts = runs(job)
    whole = train(packed, job, starts)[0]
    half = train(packed, job, starts, epochs=2)[0]
    left = [
        replace(start, epochs=2, metrics=half[start.run][1].metrics, state=copy.deepcopy(half[start.run][1].checkpoint))
        for start in starts
    ]
    torch.rand(7)
    rest = train(packed, job, left)[0]
    for run, events in rest.items():
        for key, value in whole[run][-1].trained["model"].items():
            assert torch.equal(events[-1].trained["model"][key], value), key


@pytest.mark.parametrize("arm", ["bn", "none"])
@pytest.mark.parametrize("order", ["seed", "shared"])
def test_a_diverging_network_ends_alone_and_moves_no_bit_of_the_others(arm, order):
    job = work(order=order, epochs=4)
    calm = ({"lr": 0.5}, {"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3})
    for wild in (1e30, float("nan")):
        starts = runs(job, arm, (calm[0], {"lr": wild}, *calm[2:]))
        ours = train(packed, job, starts)[0]
        without = train(packed, job, runs(job, arm, calm))[0]
        end = ours[11][-1]
        assert isinstance(end, End)
        assert end.status == "diverged"
        assert "loss was" in end.error
        assert len(ours[11]) < 5  # it ended before the last epoch
        for run in (10, 12, 13):
            assert ours[run][-1].status == "finished"
            assert len(ours[run]) == 5
            for a, b in zip(ours[run], without[run], strict=True):
                assert {k: v for k, v in a.metrics.items() if "seconds" not in k} == {
                    k: v for k, v in b.metrics.items() if "seconds" not in k
                }
                state = a.checkpoint if isinstance(a, Epoch) else a.trained
                other = b.checkpoint if isinstance(b, Epoch) else b.trained
                assert all(torch.equal(state["model"][key], value) for key, value in other["model"].items())


def test_when_half_have_diverged_the_rest_are_packed_anew():
    job = work(torch.float64, epochs=3)
    starts = runs(job, each=({"lr": 0.5}, {"lr": 1e30}, {"lr": 1e25}, {"lr": 0.2}))
    ours, ticks = train(packed, job, starts)
    assert [ours[run][-1].status for run in (10, 11, 12, 13)] == ["finished", "diverged", "diverged", "finished"]
    assert ticks < 4 * 3 * 97
    theirs = train(engine.sequential, job, [starts[0], starts[3]])[0]
    for run in (10, 13):
        close(ours[run], theirs[run], 1e-9)


def test_a_run_that_had_diverged_ends_at_once():
    job = work()
    starts = runs(job)
    half = train(packed, job, starts, epochs=1)[0]
    left = [
        replace(start, epochs=1, metrics=half[start.run][0].metrics, state=half[start.run][0].checkpoint)
        for start in starts
    ]
    left[1] = replace(left[1], metrics={**left[1].metrics, "test_loss": float("inf")})
    events = train(packed, job, left)[0]
    assert [type(event) for event in events[11]] == [End]
    assert events[11][0].status == "diverged"
    assert len(events[10]) == len(events[12]) == 3


def test_what_is_observed_is_the_network_itself():
    seen = []

    def observe(moment):
        model = build(moment.settings, (1, 8, 8), 3)
        model.load_state_dict(moment.model.state_dict())  # a network as the study builds it
        seen.append((moment.seed, moment.epoch))
        return {"norm": float(sum(p.detach().square().sum() for p in moment.model.parameters()))}

    job = work(study=replace(STUDY, observe=observe), epochs=2)
    events = train(packed, job, runs(job))[0]
    assert sorted(seen) == [(seed, epoch) for seed in range(3) for epoch in (-1, 0, 1)]
    for run, own in events.items():
        weights = own[1].checkpoint["model"]
        expected = sum(float(v.square().sum()) for k, v in weights.items() if k.endswith(("weight", "bias")))
        assert own[1].metrics["norm"] == pytest.approx(expected, rel=1e-5)
        assert ("start_norm" in own[0].metrics, "start_norm" in own[1].metrics) == (True, False), run


def test_runs_of_unequal_length_are_refused():
    job = work()
    starts = runs(job)
    with pytest.raises(CannotPack, match="different numbers of epochs"):
        list(packed(job, [starts[0], replace(starts[1], epochs=1, metrics={"train_loss": 1.0})], lambda n: None))


def test_losses_and_accuracies_are_each_networks_own():
    models = networks(lenet, 3)
    network = pack(models, SHAPE)
    x, y = images(21, *SHAPE), torch.arange(21) % 3
    network.eval()
    losses, accuracies = evaluate(network, x, y, batch_size=10)
    for k, model in enumerate(models):
        logits = model.eval()(x).detach()
        assert losses[k] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-12)
        assert accuracies[k] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    flat = FlatOptimizer(
        network, [make_optimizer(model, {"optimizer": "sgd", "lr": 0.0, "weight_decay": 0.0}) for model in models]
    )
    orders = torch.stack([torch.randperm(21) for _ in range(3)], 1)
    trained, right = train_epoch(network, flat, x, y, orders, 10)  # at a rate of 0: the same losses
    assert trained.tolist() == pytest.approx(losses, rel=1e-12)
    assert right.tolist() == pytest.approx(accuracies)
