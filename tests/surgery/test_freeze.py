"""freeze keeps statistics and affine parameters through training, and unfreeze gives back exactly what was."""

import copy
import importlib
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import normwright as nw
from normwright.layers import twins
from normwright.layers.norm import GhostBatchNorm
from normwright.layers.sync_batch_norm import SyncBatchNorm
from normwright.surgery import recalibrate
from normwright.surgery.freeze import freeze, unfreeze


class Own(nn.BatchNorm2d):
    """A subclass with children and a `train` of its own."""

    def __init__(self, n):
        super().__init__(n)
        self.drop = nn.Dropout(0.5)
        self.asked = []

    def train(self, mode=True):
        self.asked.append(mode)
        return super().train(mode)

    def forward(self, x):
        return self.drop(super().forward(x)).relu()


class Unknown(nn.Module):
    """Running statistics by another name, moved whenever it trains."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.register_buffer("running_scale", torch.full((n,), 2.0))

    def forward(self, x):
        if self.training:
            self.running_scale.mul_(1.5)
        return x * (self.weight / self.running_scale).view(-1, 1, 1)


# on (N, 4, 6, 6), and what else the layer needs to be called
LAYERS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm1d": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(4)),
    "BatchNorm3d": lambda: nn.Sequential(nn.Unflatten(3, (2, 3)), nn.BatchNorm3d(4)),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "Sync": lambda: nn.SyncBatchNorm(4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "twin": lambda: twins.BatchNorm2d(4, act="relu"),
    "twin InstanceNorm": lambda: twins.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "our Sync": lambda: SyncBatchNorm(4),
    "Ghost": lambda: GhostBatchNorm(4, 2),
    "Renorm": lambda: nw.BatchRenorm(4),
    "Split": lambda: nw.SplitBatchNorm(4, 2),
    "Switch": lambda: nw.SwitchNorm(4),
    "EvoNormB0": lambda: nw.EvoNormB0(4),
    "Norm": lambda: nw.Norm("[b] c [s...]", c=4),
    "subclass": lambda: Own(4),
    "unknown": lambda: Unknown(4),
}
x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1


def layer_of(model):
    return next(m for m in model.modules() if any("running" in key for key in m._buffers))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def state(model):
    values = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    return values, flags, [m.training for m in model.modules()]


def same(a, b):
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(value, b[0][key]) for key, value in a[0].items())
    assert a[1:] == b[1:]


@pytest.mark.parametrize("name", LAYERS)
def test_statistics_survive_training(name):
    model = LAYERS[name]()
    model(x)  # statistics that are not the initial ones
    layer = layer_of(model)
    before, cls, keys = state(model)[0], type(layer), list(vars(layer))
    wanted = copy.deepcopy(model).eval()(x)
    receipt = freeze(model, "statistics")
    for _ in range(3):
        model.train()
        out = model(x)
    assert model.training is (model is not layer)
    assert not layer.training
    if name == "subclass":  # what is inside the layer trains on
        assert layer.drop.training
        assert layer.asked == [True] * 3
        assert set(out.unique().tolist()) - set((2 * wanted).unique().tolist()) <= {0.0}
    else:
        torch.testing.assert_close(out, wanted)
    out.sum().backward()  # weight and bias still learn
    assert layer.weight.grad is not None
    for key, value in model.state_dict().items():
        if "running" in key or "num_batches" in key:
            assert torch.equal(value, before[key]), key
    assert model.state_dict().keys() == before.keys()
    assert type(layer) is cls
    assert [edit.what for edit in receipt.edits.values()] == ["statistics frozen"]
    receipt.undo()
    assert layer.training
    assert sorted(vars(layer)) == sorted(keys)
    model(x * 2 + 1)
    moved = [k for k, v in model.state_dict().items() if "running" in k and not torch.equal(v, before[k])]
    assert moved


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_and_pickles_are_frozen_too(way):
    model = net()
    freeze(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    model.eval()
    other.train()(x)
    assert other[0].training
    assert not other[1].training
    assert other[1].num_batches_tracked.item() == 0
    assert other[1].train.args[0] is other[1]  # and not the original's
    receipt = unfreeze(other)
    assert other[1].training
    assert other[1].weight.requires_grad
    assert not model[1].training
    assert not model[1].weight.requires_grad
    other(x)
    assert other[1].num_batches_tracked.item() == 1
    receipt.undo()
    other.train()(x)
    assert other[1].num_batches_tracked.item() == 1
    assert not other[1].bias.requires_grad


@pytest.mark.parametrize("what", ["statistics", "affine", "both"])
@pytest.mark.parametrize("way", ["undo", "unfreeze"])
def test_the_way_back_is_exact(what, way):
    model = net()
    model[1].bias.requires_grad_(False)
    model[4].requires_grad_(False)
    before = state(model)
    receipt = freeze(model, what)
    assert model[1].training is (what == "affine")
    assert model[1].weight.requires_grad is (what == "statistics")
    assert not model[1].bias.requires_grad
    assert list(receipt.edits) == ["1"]
    again = freeze(model, what)
    assert not again.edits
    assert "already" in again.skipped["1"]
    if way == "undo":
        again.undo()
        receipt.undo()
    else:
        receipt = unfreeze(model, what)
        assert list(receipt.edits) == ["1"]
    same(before, state(model))
    assert not [key for key in vars(model[1]) if key.startswith("nw_") or key == "train"]
    assert not unfreeze(model).edits


def test_the_mode_asked_for_last_comes_back():
    for back in ("undo", "unfreeze"):
        model = net()
        receipt = freeze(model)
        model.eval()
        receipt.undo() if back == "undo" else unfreeze(model)
        assert not model[1].training
        model.train()
        assert model[1].training


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_no_optimizer_moves_what_is_frozen(make, set_to_none):
    # weight decay and momentum move a parameter whose gradient is zero; one without gradient is passed over
    model = net()
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1, **options)

    def step():
        optimizer.zero_grad(set_to_none=set_to_none)
        model(x).square().sum().backward()
        optimizer.step()

    step()
    model(x).sum().backward()  # a gradient that lies ready
    receipt = freeze(model, "affine")
    weight, bias, conv = (p.detach().clone() for p in (model[1].weight, model[1].bias, model[0].weight))
    slot = {key: copy.deepcopy(value) for key, value in optimizer.state[model[1].weight].items()}
    optimizer.step()
    step()
    assert torch.equal(model[1].weight, weight)
    assert torch.equal(model[1].bias, bias)
    assert not torch.equal(model[0].weight, conv)
    for key, value in slot.items():
        torch.testing.assert_close(optimizer.state[model[1].weight][key], value)
    receipt.undo()
    step()
    assert not torch.equal(model[1].weight, weight)


def test_only_some():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), nn.BatchNorm2d(4))
    assert list(freeze(model, only=["0.1", "1"]).edits) == ["0.1", "1"]
    assert [m.training for m in (model[0][0], model[0][1], model[1])] == [True, False, False]
    assert list(unfreeze(model, only="0").edits) == ["0.1"]
    assert list(freeze(model, "statistics", only="0").edits) == ["0.0", "0.1"]
    for wrong, options in (("none called 'absent'", {"only": ["absent"]}), ("what is one of", {"what": "all"})):
        with pytest.raises(ValueError, match=wrong):
            freeze(model, **options)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_is_left_alone_is_named():
    model = nn.ModuleDict(
        {
            "batch": nn.BatchNorm2d(4, track_running_stats=False),
            "instance": nn.InstanceNorm2d(4),
            "layer": nn.LayerNorm(4),
            "lazy": nn.LazyBatchNorm2d(),
            "own": nn.BatchNorm2d(4),
            "tied": nn.BatchNorm2d(4),
            "tie": nn.Linear(4, 1),
            "parametrized": nn.BatchNorm2d(4),
            "scripted": torch.jit.script(nn.BatchNorm2d(4)),
        }
    )
    model["own"].train = lambda mode=True: model["own"]
    model["tie"].bias = model["tied"].bias
    nn.utils.parametrizations.weight_norm(model["parametrized"], "weight", dim=0)
    receipt = freeze(model)
    reasons = {
        "batch": "keeps no running statistics",
        "lazy": "does not know its size",
        "own": "its train was replaced",
        "tied": "its bias is also",
        "parametrized": "parametrized",
        "scripted": "scripted",
    }
    assert receipt.skipped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in receipt.skipped[name]
    assert model["tied"].bias.requires_grad
    assert not model["tied"].training
    assert not model["batch"].weight.requires_grad
    assert model["layer"].weight.requires_grad
    assert set(receipt.edits) == {"batch", "lazy", "own", "tied", "parametrized"}
    marked = nn.BatchNorm2d(4)
    marked.nw_frozen = True
    assert "marked nw_frozen" in unfreeze(marked).skipped[""]


def test_shared_layers_and_parameters_among_the_frozen():
    a, b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    b.weight = a.weight
    model = nn.Sequential(a, b, a)
    receipt = freeze(model)
    assert receipt.edits["0"].also == ("2",)
    assert receipt.edits["1"].what == "statistics frozen, bias frozen"
    assert not a.weight.requires_grad
    unfreeze(model)
    assert a.weight.requires_grad
    assert b.bias.requires_grad


def test_recalibrate_leaves_frozen_statistics_alone():
    model = net()
    freeze(model, "statistics")
    assert "marked nw_frozen" in recalibrate(model, x).skipped["1"]
    unfreeze(model)
    freeze(model, "affine")
    assert "1" in recalibrate(model, x).edits
    want = model[0](x).detach().double().numpy()
    np.testing.assert_allclose(model[1].running_var.numpy(), want.var((0, 2, 3), ddof=1), rtol=1e-5)


@pytest.mark.parametrize("wrap", ["DataParallel", "compile"])
def test_wrapped_models(wrap):
    inner = net()
    model = torch.compile(inner, backend="eager") if wrap == "compile" else nn.DataParallel(inner)
    receipt = freeze(model)
    assert receipt.model is model
    model.train()
    assert not inner[1].training
    assert list(receipt.edits) == ["1"]


def test_affine_is_refused_under_ddp():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = Wrapped(net())
    for what in ("affine", "both"):
        with pytest.raises(TypeError, match="before wrapping"):
            freeze(model, what)
        with pytest.raises(TypeError, match="before wrapping"):
            unfreeze(model, what)
    assert list(freeze(model, "statistics").edits) == ["1"]


def test_interrupted_half_way_is_as_before(monkeypatch):
    model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(3)))
    before, calls = state(model), []

    def broken(module, keys):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        module.nw_affine = keys

    model[0].weight.grad = torch.ones(4)
    monkeypatch.setattr(importlib.import_module("normwright.surgery.freeze"), "_remember", broken)
    with pytest.raises(KeyboardInterrupt):
        freeze(model)
    same(before, state(model))
    assert not any("train" in vars(m) or "nw_affine" in vars(m) for m in model)
    assert model[0].weight.grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_other_operations_work_on_a_frozen_model():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model(x)
    freeze(model)
    wanted = model(x)
    fast = nw.accelerate(model).model  # exact classes are kept, so that the twin is found
    assert type(fast[1]) is nw.BatchNorm2d
    assert not fast.train()[1].training
    torch.testing.assert_close(fast(x), wanted)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), wanted)
