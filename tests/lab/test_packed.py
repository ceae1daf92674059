"""K networks trained as one, against the same networks alone, torch's own optimizers and the sequential engine."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import normwright as nw
from normwright.lab import engine
from normwright.lab.data import Dataset
from normwright.lab.engine import End, Epoch, Job, Start, make_optimizer
from normwright.lab.packed import CannotPack, FlatOptimizer, Step, evaluate, fastest, graph, pack, packed, train_epoch
from normwright.lab.packed.graph import Watch, why_not_replayed
from normwright.lab.packed.leaves import Conv, Each
from normwright.lab.study import Arm, Study
from normwright.layers import twins
from normwright.layers.dyt import DyT
from normwright.layers.norm import ChannelNorm, FilterResponseNorm, GhostBatchNorm
from normwright.studies.lenet import BatchNormByHand

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
    "cumulative": lambda: lenet(twins.BatchNorm2d(4, momentum=None, act="relu"), GhostBatchNorm(24, 2, momentum=None)),
    "instance norm that never moves": lambda: lenet(nn.InstanceNorm2d(4, momentum=None, track_running_stats=True)),
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
    for training in (True, True, False):
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


def train_engine(engine_, job, starts, epochs=None):
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
    ours, ticks = train_engine(packed, job, starts)
    theirs, their_ticks = train_engine(engine.sequential, job, starts)
    assert ticks == their_ticks == 3 * 3 * 97
    for run in ours:
        close(ours[run], theirs[run], tolerance)
        assert ours[run][-1].status == "finished"


def test_one_network_alone_is_the_sequential_engines_bit_for_bit():
    job = work()
    starts = runs(job)[:1]
    ours, theirs = train_engine(packed, job, starts)[0][10], train_engine(engine.sequential, job, starts)[0][10]
    for key, value in theirs[-1].trained["model"].items():
        assert torch.equal(ours[-1].trained["model"][key], value), key


@pytest.mark.parametrize("first", ["packed", "sequential"])
@pytest.mark.parametrize(("optimizer", "order"), [("sgd", "seed"), ("adam", "shared")])
def test_either_engine_goes_on_from_what_the_other_left(first, optimizer, order):
    job = work(torch.float64, optimizer=optimizer, momentum=0.9, order=order)
    starts = runs(job, each=({"lr": 0.05}, {"lr": 0.02}))
    whole = train_engine(engine.sequential, job, starts)[0]
    begin, go_on = (packed, engine.sequential) if first == "packed" else (engine.sequential, packed)
    half = {}
    for group in [starts] if first == "packed" else [[start] for start in starts]:
        half |= train_engine(begin, job, group, epochs=1)[0]
    left = [
        replace(start, epochs=1, metrics=half[start.run][0].metrics, state=half[start.run][0].checkpoint)
        for start in starts
    ]
    rest = train_engine(go_on, job, left)[0]
    for run, events in rest.items():
        close(events, whole[run][1:], 1e-10)


def test_an_interrupted_pack_goes_on_bit_for_bit_dropout_included():
    job = work(dropout=0.4)
    starts = runs(job)
    whole = train_engine(packed, job, starts)[0]
    half = train_engine(packed, job, starts, epochs=2)[0]
    left = [
        replace(start, epochs=2, metrics=half[start.run][1].metrics, state=copy.deepcopy(half[start.run][1].checkpoint))
        for start in starts
    ]
    torch.rand(7)
    rest = train_engine(packed, job, left)[0]
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
        ours = train_engine(packed, job, starts)[0]
        without = train_engine(packed, job, runs(job, arm, calm))[0]
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
    ours, ticks = train_engine(packed, job, starts)
    assert [ours[run][-1].status for run in (10, 11, 12, 13)] == ["finished", "diverged", "diverged", "finished"]
    assert ticks < 4 * 3 * 97
    theirs = train_engine(engine.sequential, job, [starts[0], starts[3]])[0]
    for run in (10, 13):
        close(ours[run], theirs[run], 1e-9)


def test_a_run_that_had_diverged_ends_at_once():
    job = work()
    starts = runs(job)
    half = train_engine(packed, job, starts, epochs=1)[0]
    left = [
        replace(start, epochs=1, metrics=half[start.run][0].metrics, state=half[start.run][0].checkpoint)
        for start in starts
    ]
    left[1] = replace(left[1], metrics={**left[1].metrics, "test_loss": float("inf")})
    events = train_engine(packed, job, left)[0]
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
    events = train_engine(packed, job, runs(job))[0]
    assert sorted(seen) == [(seed, epoch) for seed in range(3) for epoch in (-1, 0, 1)]
    for run, own in events.items():
        weights = own[1].checkpoint["model"]
        expected = sum(float(v.square().sum()) for k, v in weights.items() if k.endswith(("weight", "bias")))
        assert own[1].metrics["norm"] == pytest.approx(expected, rel=1e-5)
        assert ("start_norm" in own[0].metrics, "start_norm" in own[1].metrics) == (True, False), run


class PutsAnother(nn.Module):
    """A batch norm by hand that puts new tensors in its buffers' places."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x):
        if self.training:
            var, mean = torch.var_mean(x, 0)
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            self.running_var = 0.9 * self.running_var + 0.1 * var.detach()
        else:
            mean, var = self.running_mean, self.running_var
        return self.weight * (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("replays", [False, True])
def test_buffers_that_a_layer_replaces_train_alike_in_both_engines(graphs, monkeypatch, replays):
    def build(settings, shape, classes):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), PutsAnother(6), nn.Tanh(), nn.Linear(6, classes))
        return model.double()

    if not replays:
        monkeypatch.setattr(graph, "captures", lambda device: False)
    job = work(torch.float64, study=replace(STUDY, build=build))
    ours, theirs = (train_engine(engine_, job, runs(job, "none"))[0] for engine_ in (packed, engine.sequential))
    assert (Recorder.replays > 0) == replays
    for run in ours:
        assert "test_acc_batch" in ours[run][-1].metrics
        close(ours[run], theirs[run], 1e-9)


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


# ---- what a GPU needs, without one


def step_of(build, settings, K=3, clip=None, own=True, dtype=torch.float32, n=24):
    """A step of K networks, the orders of an epoch, and the optimizer."""
    models = networks(build, K, dtype)
    network = pack(models, SHAPE)
    given = [{**settings, **rate, "lr": rate["lr"] * 0.1} for rate in RATES[:K]]
    flat = FlatOptimizer(network, [make_optimizer(m, each) for m, each in zip(models, given, strict=True)])
    x, y = images(30, *SHAPE, dtype=dtype), torch.arange(30) % 3
    return Step(network, flat, x, y, clip), drawn(n, K if own else None)


def drawn(n, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(30, generator=generator)[:n] for _ in range(K or 1)]
    return torch.stack(orders, 1) if K else orders[0]


def on_meta(step):
    """The step on a device without values: whatever reads one raises, whatever it makes elsewhere does not fit."""
    pack, optimizer = step.pack, step.optimizer
    for module in pack.network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kept = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                kept.grad = torch.empty_like(kept) if parameter.requires_grad else None
                module._parameters[name] = kept
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
    step.homes = [(module, name, module._buffers[name]) for module, name, _ in step.homes]
    for holder in (pack, optimizer, step):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, name, value.to("meta"))
    optimizer.state = {name: value.to("meta") for name, value in optimizer.state.items()}
    step.again = None


STEPS = [
    *(pytest.param(NETWORKS[name], OPTIMIZERS[1], id=name) for name in NETWORKS),
    *(pytest.param(NETWORKS["batch norm"], each, id="-".join(map(str, each.values()))) for each in OPTIMIZERS),
]


@pytest.mark.parametrize(("build", "settings"), STEPS)
@pytest.mark.parametrize(("clip", "own"), [(None, False), (0.05, True)], ids=["shared", "clipped, own"])
def test_nothing_in_an_epoch_waits_for_the_device(build, settings, clip, own):
    """On the CPU no operator's result is read; on the meta device none could be, as there are no values."""
    step, orders = step_of(build, settings, clip=clip, own=own)
    step.epoch(orders, 10)
    watches = [Watch(orders.device) for _ in range(2)]
    for watch in watches:
        with watch:
            step.epoch(orders, 10)
    assert len(watches[0].calls) > 20
    assert why_not_replayed(*watches) is None
    on_meta(step)
    orders = orders.to("meta")
    with Watch(orders.device) as watch:
        losses, _ = step.epoch(orders, 10)
    assert losses.device.type == "meta"
    assert watch.waits == []


class Reads(nn.Module):
    def forward(self, x):
        return x * 0.5 if float(x.detach().sum()) > 1e9 else x


class Masks(nn.Module):
    def forward(self, x):
        return x + 0.1 * x.detach()[x > 0].mean()


class Numbers(nn.Module):
    def forward(self, x):
        return x * torch.tensor(0.5, dtype=x.dtype, device=x.device)


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def __deepcopy__(self, memo):
        return Draws()

    def forward(self, x):
        return x + 0.1 * torch.rand(x.shape, generator=self.generator, dtype=x.dtype) if self.training else x


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += self.training
        return x * (1 + 0.1 * self.calls) if self.training else x


class Remembers(nn.Module):
    seen = 1.0

    def forward(self, x):
        y = x * self.seen
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().square().mean()
        return y


FAULTS = {
    Reads: "_local_scalar_dense.default: its result is read",
    Masks: "how many a mask chooses",
    Numbers: "a tensor is made of Python's numbers",
    Draws: "a generator of its own",
    Counts: "other numbers or other tensors",
    Remembers: "other numbers or other tensors",
}


def with_fault(fault):
    return lambda: nn.Sequential(nn.Conv2d(2, 4, 3), fault(), nn.Flatten(), nn.Linear(144, 3))


class Recorder(TorchDispatchMode):
    """A stand-in for a CUDA graph: what is captured is not done, and a replay does it on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        for tensor in given:
            storage = tensor.untyped_storage()
            if not any(storage._cdata == other._cdata for other in self.made):
                self.before.setdefault(storage._cdata, (storage, storage.clone()))
        found = func(*args, **kwargs)
        places = {t.untyped_storage()._cdata for t in given}
        results = [t for t in tree_flatten(found)[0] if isinstance(t, torch.Tensor)]
        new = [t for t in results if t.untyped_storage()._cdata not in places]
        self.made += [t.untyped_storage() for t in new if t.untyped_storage()._cdata not in self.before]
        self.calls.append((func, args, kwargs, results, new))
        return found

    def __enter__(self):
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, value in self.before.values():
            storage.copy_(value)
        torch.set_rng_state(self.random)

    def replay(self):
        Recorder.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, results, new in self.calls:
                found = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, torch.Tensor)]
                for home, value in zip(results, found, strict=True):
                    if any(home is t for t in new):
                        home.copy_(value)


@pytest.fixture
def graphs(monkeypatch):
    """Let the CPU stand for a GPU that captures graphs; `Recorder.replays` counts."""

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    Recorder.replays = 0
    monkeypatch.setattr(graph, "captures", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)


def trained(step, K, epochs=3, between=lambda epoch, step: None, own=True):
    """Weights, buffers, optimizers, losses and accuracies after epochs of two full batches of 8 and one of 6."""
    found = []
    torch.manual_seed(3)
    with nw.use("native"):  # which is what a recorded operator is
        for epoch in range(epochs):
            losses, right = step.epoch(drawn(22, K if own else None, seed=epoch), 8)
            found += [losses.clone(), right.clone()]
            between(epoch, step)
    for k in range(K):
        found += step.pack.unpack(k).values()
        found += [t for kept in step.optimizer.state_dict(k)["state"].values() for t in kept.values()]
    return found


def same_bits(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b), (a, b)


REPLAYED = {
    **NETWORKS,
    "by hand": lambda: lenet(BatchNormByHand(4, True), BatchNormByHand(24, False)),
    "dropout": lambda: lenet(nn.BatchNorm2d(4), nn.Dropout(0.5)),
}


@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_replays_train_bit_for_bit_as_steps_do(graphs, monkeypatch, name, own):
    settings = OPTIMIZERS[1]
    step, _ = step_of(REPLAYED[name], settings, clip=0.5)
    replayed = trained(step, 3, epochs=4, own=own)
    assert step.pack.notes == []
    assert Recorder.replays == 8 - 3  # two watched, one to warm up
    monkeypatch.setattr(graph, "captures", lambda device: False)
    same_bits(replayed, trained(step_of(REPLAYED[name], settings, clip=0.5)[0], 3, epochs=4, own=own))


def schedule(epoch, step):
    """What may happen between epochs: another rate, an evaluation, a network that is dropped, one that starts anew."""
    step.optimizer.lr.mul_(0.5)
    step.optimizer.decay.mul_(2.0)
    step.pack.eval()
    evaluate(step.pack, step.x, step.y)
    if epoch == 1:
        step.pack.load(1, networks(REPLAYED["batch norm"], 3, torch.float32)[2].state_dict())
        step.optimizer.freeze(1)


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_replays_see_what_changes_between_them(graphs, monkeypatch, settings, clip):
    def run():
        step, _ = step_of(REPLAYED["batch norm"], settings, clip=clip)
        return trained(step, 3, epochs=4, between=schedule), step

    replayed, step = run()
    assert Recorder.replays == 5
    kept = networks(REPLAYED["batch norm"], 3, torch.float32)[2].state_dict()
    for name, value in step.pack.unpack(1).items():
        if name in step.pack.trained:
            assert torch.equal(value, kept[name])  # it was dropped after the second epoch
    monkeypatch.setattr(graph, "captures", lambda device: False)
    same_bits(replayed, run()[0])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_a_replay_would_get_wrong_runs_as_steps_and_is_told(graphs, monkeypatch, fault):
    step, _ = step_of(with_fault(fault), OPTIMIZERS[0])
    plain = trained(step, 3)
    assert Recorder.replays == 0
    assert "a step is no CUDA graph: " in step.pack.explain()
    assert FAULTS[fault] in step.pack.explain()
    monkeypatch.setattr(graph, "captures", lambda device: False)
    same_bits(plain, trained(step_of(with_fault(fault), OPTIMIZERS[0])[0], 3))


def test_a_replay_does_get_them_wrong(graphs, monkeypatch):
    """That the recorder shows what a graph would do, and is no second execution of Python."""
    monkeypatch.setattr(graph, "why_not_replayed", lambda *watches: None)
    for fault in (Counts, Remembers):
        monkeypatch.setattr(graph, "captures", lambda device: True)
        replayed = trained(step_of(with_fault(fault), OPTIMIZERS[0])[0], 3)
        monkeypatch.setattr(graph, "captures", lambda device: False)
        plain = trained(step_of(with_fault(fault), OPTIMIZERS[0])[0], 3)
        assert any(not torch.equal(a, b) for a, b in zip(replayed, plain, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_engine_trains_the_same_with_replays(graphs, monkeypatch, dropout):
    """Evaluations, recalibration and a network that diverges and is dropped lie between the replays."""
    job = work(epochs=4, dropout=dropout, clip=1.0)
    each = ({"lr": 0.5}, {"lr": 1e30, "weight_decay": 0.01}, {"lr": 0.1}, {"lr": 0.2})
    with nw.use("native"):
        replayed = train_engine(packed, job, runs(job, each=each))[0]
        assert Recorder.replays > 15
        monkeypatch.setattr(graph, "captures", lambda device: False)
        plain = train_engine(packed, job, runs(job, each=each))[0]
    for run, events in replayed.items():
        for a, b in zip(events, plain[run], strict=True):
            assert timeless(a.metrics) == timeless(b.metrics)
            state = a.checkpoint if isinstance(a, Epoch) else a.trained
            other = b.checkpoint if isinstance(b, Epoch) else b.trained
            for key, value in other["model"].items():
                torch.testing.assert_close(state["model"][key], value, rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("fault", [None, Reads], ids=["none", "reads"])
def test_ways_are_timed_as_replays_and_change_nothing(graphs, fault):
    build = with_fault(fault) if fault else NETWORKS["batch norm"]
    network = pack(networks(build, 3, torch.float32), SHAPE)
    before = [network.unpack(k) for k in range(3)]
    # a size that no other test has measured; shared, so that the first convolution is not timed by itself
    fastest(network, (9, *SHAPE), shared=True)
    assert (Recorder.replays > 0) == (fault is None)
    assert "ms with channels first" in network.explain()
    assert not network.gradient.any()
    for k, state in enumerate(before):
        assert all(torch.equal(network.unpack(k)[name], value) for name, value in state.items())


def timeless(metrics):
    return repr({key: value for key, value in metrics.items() if "seconds" not in key})  # by text: NaN is not itself
