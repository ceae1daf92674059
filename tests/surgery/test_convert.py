"""convert against torch's own functions in float64, least squares by NumPy, and the mistakes that others make."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwright as nw
from normwright.layers.sync_batch_norm import SyncBatchNorm
from normwright.surgery.convert import convert
from normwright.surgery.freeze import freeze, unfreeze

C, EPS = 6, 1e-3
TRACKING = ("batch", "sync", "ghost", "renorm")
MAKE = {
    "batch": lambda: nn.BatchNorm2d(C, EPS, 0.3),
    "batch twin": lambda: nw.BatchNorm2d(C, EPS, 0.3),
    "sync": lambda: nn.SyncBatchNorm(C, EPS, 0.3),
    "ghost": lambda: nw.GhostBatchNorm(C, 2, EPS, 0.3),
    "renorm": lambda: nw.BatchRenorm(C, EPS, 0.3),
    "group": lambda: nn.GroupNorm(3, C, EPS),
    "instance": lambda: nn.InstanceNorm2d(C, EPS, affine=True),
    "instance tracked": lambda: nn.InstanceNorm2d(C, EPS, 0.3, affine=True, track_running_stats=True),
    "channel": lambda: nw.ChannelNorm(C, EPS),
    "layer": lambda: nn.LayerNorm(C, EPS),
    "rms": lambda: nn.RMSNorm(C, EPS),
}
CLASSES = {
    "batch": nw.BatchNorm2d,
    "sync": SyncBatchNorm,
    "ghost": nw.GhostBatchNorm,
    "renorm": nw.BatchRenorm,
    "group": nw.GroupNorm,
    "layer": nw.GroupNorm,
    "instance": nw.InstanceNorm2d,
    "channel": nw.ChannelNorm,
}


def drawn(module: nn.Module) -> nn.Module:
    """Random parameters and statistics in all norms, so that nothing is 0 or 1 by chance."""
    for one in module.modules():
        if not isinstance(one, (nn.Conv2d, nn.Linear)):
            for p in one.parameters(recurse=False):
                nn.init.normal_(p, 1.0, 0.4)
        if getattr(one, "running_mean", None) is not None:
            nn.init.normal_(one.running_mean)
            nn.init.uniform_(one.running_var, 0.5, 2.0)
            one.num_batches_tracked.fill_(7)
    return module


def reference(kind: str, x: Tensor, state: dict, groups: int = 3) -> Tensor:
    """The kind at evaluation by torch's functions."""
    w, b = state.get("weight"), state.get("bias")
    if kind in TRACKING or kind == "instance tracked":
        return F.batch_norm(x, state["running_mean"], state["running_var"], w, b, False, 0.0, EPS)
    if kind == "group":
        return F.group_norm(x, groups, w, b, EPS)
    if kind == "layer":
        return F.layer_norm(x, x.shape[1:], eps=EPS) * w.view(-1, 1, 1) + b.view(-1, 1, 1)
    if kind == "instance":
        return F.instance_norm(x, weight=w, bias=b, eps=EPS)
    assert kind == "channel"
    return F.layer_norm(x.movedim(1, -1), (C,), w, b, EPS).movedim(-1, 1)


def equal(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


PAIRS = [
    (source, to)
    for source, to in itertools.product([k for k in MAKE if k not in ("layer", "rms")], CLASSES)
    if source.split()[0] != to or to == "group"
]


@pytest.mark.parametrize(("source", "to"), PAIRS)
def test_every_direction_computes_the_new_kind_with_the_old_parameters(source: str, to: str) -> None:
    model = nn.Sequential(drawn(MAKE[source]())).double().eval()
    x = torch.randn(4, C, 5, 3, dtype=torch.float64) * 2 + 1
    before = copy.deepcopy(model.state_dict())
    groups = 2 if source == "group" else 3
    receipt = convert(model, to, x, chunks=4, groups=groups, calibrate=False)
    new = receipt.model[0]
    assert type(new) is CLASSES[to]
    assert new.eps == EPS
    state = {**before, **receipt.model.state_dict()}
    state = {key.removeprefix("0."): value for key, value in state.items()}
    for key in ("weight", "bias"):
        equal(getattr(new, key), getattr(model[0], key), 0)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    if to in TRACKING:
        tracked = source in (*TRACKING, "batch twin", "instance tracked")
        assert new.momentum == (0.3 if tracked else 0.1)
        for key, fresh in zip(statistics, (0, 1, 0), strict=True):
            old = getattr(model[0], key) if tracked else torch.full_like(getattr(new, key), fresh)
            equal(getattr(new, key), old, 0)
    else:
        assert not [key for key in receipt.model.state_dict() if "running" in key]
    equal(receipt.model(x), reference(to, x, state, groups), 1e-9)
    difference = (receipt.model(x) - model(x)).detach().abs().max()
    assert receipt.max_difference == pytest.approx(float(difference), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert type(model[0]) is type(MAKE[source]())
    receipt.undo()
    assert type(receipt.model[0]) is type(model[0])
    torch.testing.assert_close(receipt.model.state_dict(), before, rtol=0, atol=0)
    equal(receipt.model(x), model(x), 0)


@pytest.mark.parametrize("shape", [(C,), (4, C)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_and_rms_norm_become_each_other(shape: tuple, bias: bool) -> None:
    model = nn.Sequential(drawn(nn.LayerNorm(shape, EPS, bias=bias))).double()
    x = torch.randn(5, 4, C, dtype=torch.float64) + 1
    dims = tuple(range(-len(shape), 0))
    receipt = convert(model, "rms")
    new = receipt.model[0]
    assert type(new) is (nw.Norm if bias else nw.RMSNorm)
    assert list(new.state_dict()) == list(model[0].state_dict())
    expected = x * (x.square().mean(dims, keepdim=True) + EPS).rsqrt() * model[0].weight
    expected = expected + model[0].bias if bias else expected
    equal(new(x), expected)
    # exact where the input is centred
    centred = x - x.mean(dims, keepdim=True)
    equal(new(centred), model[0](centred))
    # and back
    back = convert(receipt.model, "layer").model[0]
    assert type(back) is nw.LayerNorm
    equal(back(x), model[0](x))


def test_rms_norm_without_eps_gives_the_layer_norm_the_eps_it_used() -> None:
    for dtype in (torch.float32, torch.float64):
        norm = nn.RMSNorm(4, dtype=dtype)
        assert convert(norm, "layer").model.eps == torch.finfo(dtype).eps
        assert convert(norm, "twin").model.eps is None


def test_groups_divide_and_keep_two_channels_each() -> None:
    # the usual GroupNorm(min(32, C), C) raises on 48 channels
    with pytest.raises(ValueError, match="divisible"):
        nn.GroupNorm(min(32, 48), 48)
    found = {}
    for channels, most in ((48, 32), (64, 32), (32, 32), (16, 32), (7, 32), (1, 32), (48, 10), (6, 1), (100, 32)):
        layer = convert(nn.Sequential(nn.BatchNorm2d(channels)), "group", groups=most).model[0]
        found[channels, most] = layer.num_groups
    assert found == {
        (48, 32): 24,
        (64, 32): 32,
        (32, 32): 16,
        (16, 32): 8,
        (7, 32): 1,
        (1, 32): 1,
        (48, 10): 8,
        (6, 1): 1,
        (100, 32): 25,
    }


# ----------------------------------------------------------------------------------------------------------- twins


TWINS = [
    (nn.BatchNorm1d(C), (5, C)),
    (nn.BatchNorm1d(C, momentum=None), (5, C, 4)),
    (nn.BatchNorm2d(C, affine=False), (5, C, 4, 3)),
    (nn.BatchNorm3d(C, track_running_stats=False), (5, C, 2, 2, 3)),
    (nn.SyncBatchNorm(C), (5, C, 4)),
    (nn.GroupNorm(2, C), (5, C, 4)),
    (nn.InstanceNorm1d(C), (5, C, 4)),
    (nn.InstanceNorm2d(C, affine=True, track_running_stats=True), (5, C, 4, 3)),
    (nn.InstanceNorm2d(C, affine=True), (C, 4, 3)),
    (nn.InstanceNorm3d(C, affine=True), (5, C, 2, 2, 3)),
    (nn.LayerNorm((C, 4), bias=False), (5, C, 4)),
    (nn.LayerNorm(4, elementwise_affine=False), (5, C, 4)),
    (nn.RMSNorm(4), (5, C, 4)),
]


@pytest.mark.parametrize(
    ("norm", "shape"), TWINS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v)
)
def test_twin_and_back_train_and_evaluate_alike(norm: nn.Module, shape: tuple) -> None:
    model = nn.Sequential(drawn(norm)).double()
    x = torch.randn(shape, dtype=torch.float64)
    twin = convert(model, "twin", x)
    assert type(twin.model[0]).__module__.startswith("normwright.layers")
    assert isinstance(twin.model[0], type(norm))
    assert list(twin.model.state_dict()) == list(model.state_dict())
    back = convert(twin.model, "torch", x)
    assert type(back.model[0]) is type(norm)
    assert vars(back.model[0]).keys() - {"nw_places"} == vars(norm).keys()
    for key in ("eps", "momentum", "affine", "elementwise_affine", "track_running_stats", "normalized_shape"):
        assert getattr(back.model[0], key, None) == getattr(norm, key, None)
    for training in (True, False):
        original = copy.deepcopy(model).train(training)
        for other in (twin.model, back.model):
            mine, other = copy.deepcopy(original), copy.deepcopy(other).train(training)
            for _ in range(2):
                a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
                mine(a).square().sum().backward()
                other(b).square().sum().backward()
                equal(a.grad, b.grad)
            torch.testing.assert_close(mine.state_dict(), other.state_dict(), rtol=1e-12, atol=1e-12)
            for p, q in zip(mine.parameters(), other.parameters(), strict=True):
                equal(p.grad, q.grad)
    for receipt in (twin, back):
        assert receipt.max_difference < 1e-12


def test_sync_and_back_keep_activation_hooks_dimension_and_marks() -> None:
    # torch's own conversion drops what a subclass adds
    twin = drawn(nw.BatchNorm2d(C, act="relu")).eval()
    x = torch.randn(3, C, 4, 4)
    dropped = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(twin)))
    assert (dropped(x) < 0).any()
    model = nn.Sequential(twin, nn.Conv2d(C, 2, 1)).eval()
    calls = []
    twin.register_forward_hook(lambda m, args, y: calls.append(type(m)))
    twin.nw_frozen = True
    twin.qconfig = "a name"
    sync = convert(model, "sync", x)
    assert type(sync.model[0]) is SyncBatchNorm
    assert sync.model[0].act == "relu"
    assert sync.model[0].nw_frozen
    assert sync.model[0].qconfig == "a name"
    back = convert(sync.model, "batch")  # knows its dimension without an input
    assert type(back.model[0]) is nw.BatchNorm2d
    assert back.model[0].act == "relu"
    calls.clear()
    equal(sync.model(x), model(x), 1e-6)
    equal(back.model(x), model(x), 0)
    assert set(calls) == {SyncBatchNorm, nw.BatchNorm2d}
    refused = convert(sync.model, "torch")
    assert refused.edits == {}
    assert "applies relu, which torch's class would drop" in refused.skipped["0"]


def test_frozen_layers_stay_frozen() -> None:
    model = nn.Sequential(drawn(nn.BatchNorm2d(C)))
    freeze(model)
    for to in ("twin", "sync", "group"):
        new = convert(model, to).model
        assert new[0].nw_frozen
        assert not any(p.requires_grad for p in new.parameters())
        assert not new.train()[0].training
        if to == "group":
            continue  # without statistics it is none of unfreeze's layers
        unfreeze(new)
        assert new[0].training
        assert all(p.requires_grad for p in new.parameters())


def test_an_accelerated_model_goes_on_with_its_new_norms() -> None:
    model = drawn(nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU())).eval()
    x = torch.randn(4, 3, 6, 6)
    fast = nw.accelerate(model).model
    equal(convert(fast, "group").model(x), convert(model, "group").model(x), 1e-6)


def test_process_groups_are_kept_though_they_cannot_be_copied() -> None:
    class Group:
        def __deepcopy__(self, memo: dict) -> None:
            raise TypeError("cannot pickle a process group")

    group, other = Group(), Group()
    model = nn.Sequential(nn.SyncBatchNorm(C, process_group=group), nn.BatchNorm1d(C))
    twin = convert(model, "twin").model
    assert type(twin[0]) is SyncBatchNorm
    assert twin[0].process_group is group
    assert model[0].process_group is group
    assert convert(twin, "torch").model[0].process_group is group
    sync = convert(model, "sync", process_group=other)
    assert sync.model[1].process_group is other
    assert sync.skipped == {"0": "SyncBatchNorm is this kind already"}


# ------------------------------------------------------------------------------------------------------ fitted to data


class Net(nn.Module):
    """Two norms in a row of execution that is not the order of their names."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.second, self.first = second, first
        self.conv1, self.conv2 = nn.Conv2d(3, C, 3), nn.Conv2d(C, C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv2(F.relu(self.first(self.conv1(x)))))


@pytest.mark.parametrize("to", ["group", "instance", "layer", "channel"])
def test_fit_is_the_least_squares_solution_layer_after_layer(to: str) -> None:
    model = drawn(Net(nn.BatchNorm2d(C, EPS), nn.BatchNorm2d(C, EPS))).double()
    x = torch.randn(8, 3, 9, 9, dtype=torch.float64)
    receipt = convert(model, to, x, groups=3)
    model.eval()
    new = receipt.model.eval()
    assert receipt.model.first.training is False
    one = {"weight": torch.ones(C, dtype=torch.float64), "bias": torch.zeros(C, dtype=torch.float64)}
    with torch.no_grad():
        inputs = {"first": (model.conv1(x), new.conv1(x))}
        inputs["second"] = (
            model.conv2(F.relu(model.first(inputs["first"][0]))),
            new.conv2(F.relu(new.first(inputs["first"][1]))),
        )
    for name, (old_x, new_x) in inputs.items():
        target = getattr(model, name)(old_x).detach()
        u = reference(to, new_x, one)
        errors = []
        for c in range(C):
            design = np.stack([u[:, c].flatten().numpy(), np.ones(u[:, c].numel())], 1)
            solution, (rss,), *_ = np.linalg.lstsq(design, target[:, c].flatten().numpy())
            layer = getattr(new, name)
            np.testing.assert_allclose([layer.weight[c].item(), layer.bias[c].item()], solution, rtol=1e-7, atol=1e-9)
            errors.append(rss)
        measured = receipt.edits[name].measured
        assert measured["error"] == pytest.approx(np.sqrt(sum(errors) / target.numel()), rel=1e-6)
        old = getattr(model, name)
        carried = (u * old.weight.view(-1, 1, 1) + old.bias.view(-1, 1, 1) - target).detach()
        assert measured["error as carried"] == pytest.approx(float(carried.square().mean().sqrt()), rel=1e-6)
        assert measured["output, rms"] == pytest.approx(float(target.square().mean().sqrt()), rel=1e-6)
    unfitted = convert(model, to, x, groups=3, calibrate=False)
    assert receipt.facts["unfitted, rms"] == pytest.approx(unfitted.rms_difference, rel=1e-9)
    assert receipt.rms_difference < 0.8 * unfitted.rms_difference


def test_fit_is_exact_where_the_kinds_differ_by_an_affine_map() -> None:
    # samples that are one another's permutation have the same statistics: the instance norm is a batch norm rescaled
    x = torch.randn(1, C, 4, 4, dtype=torch.float64)
    x = torch.cat([x.flatten(2)[..., torch.randperm(16)].view_as(x) for _ in range(5)])
    model = drawn(nn.Sequential(nn.BatchNorm2d(C))).double()
    receipt = convert(model, "instance", x)
    assert receipt.max_difference < 1e-12
    assert receipt.facts["unfitted, at most"] > 0.1
    std = x[0].flatten(1).var(1, correction=0).add(1e-5).sqrt()
    old, new = model[0], receipt.model[0]
    scale = old.weight / (old.running_var + old.eps).sqrt()
    equal(new.weight, scale * std)
    equal(new.bias, old.bias + scale * (x[0].mean((1, 2)) - old.running_mean))


def test_rms_of_centred_rows_is_left_alone_and_of_rows_with_a_common_mean_is_fitted() -> None:
    model = drawn(nn.Sequential(nn.LayerNorm(C))).double()
    x = torch.randn(50, C, dtype=torch.float64)
    x = x - x.mean(1, keepdim=True)
    receipt = convert(model, "rms", x)
    assert receipt.max_difference < 1e-13
    assert torch.equal(receipt.model[0].weight, model[0].weight)
    assert torch.equal(receipt.model[0].bias, model[0].bias)
    # rows of one length about one mean: rms(x) = (x − mean + mean) / constant, an affine map of the layer norm
    x = x / x.square().mean(1, keepdim=True).sqrt() + 3
    receipt = convert(model, "rms", x)
    assert receipt.max_difference < 1e-12
    assert receipt.facts["unfitted, at most"] > 0.5
    ratio = ((10 + 1e-5) / (1 + 1e-5)) ** 0.5
    equal(receipt.model[0].weight, ratio * model[0].weight, 1e-9)


def test_fit_keeps_type_requires_grad_and_what_is_not_there() -> None:
    model = drawn(
        nn.Sequential(
            nn.BatchNorm2d(C), nn.BatchNorm2d(C, affine=False), nn.BatchNorm2d(C, bias=False), nn.BatchNorm2d(C)
        )
    ).bfloat16()
    model[0].weight.requires_grad_(False)
    x = torch.randn(6, C, 8, 8).bfloat16()
    receipt = convert(model, "instance", x)
    new = receipt.model
    assert [list(layer.state_dict()) for layer in new] == [["weight", "bias"], [], ["weight"], ["weight", "bias"]]
    assert [layer.affine for layer in new] == [True, False, True, True]
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in new.parameters()] == [False, True, True, True, True]
    assert receipt.edits["1"].measured["error"] == receipt.edits["1"].measured["error as carried"]
    # without a bias the line goes through the origin
    assert receipt.edits["2"].measured["error"] < receipt.edits["2"].measured["error as carried"]
    assert all(p.grad_fn is None and p.is_leaf for p in new.parameters())


def test_fit_through_the_origin_by_numpy() -> None:
    model = drawn(nn.Sequential(nn.BatchNorm2d(C, bias=False))).double()
    x = torch.randn(6, C, 4, 4, dtype=torch.float64) + 1
    new = convert(model, "group", x, groups=2).model[0]
    u, y = F.group_norm(x, 2, eps=1e-5), model.eval()(x).detach()
    equal(new.weight, (u * y).sum((0, 2, 3)) / u.square().sum((0, 2, 3)))


@pytest.mark.parametrize("to", ["sync", "renorm", "ghost"])
def test_the_same_function_keeps_its_parameters_bit_for_bit(to: str) -> None:
    model = drawn(Net(nn.BatchNorm2d(C), nn.BatchNorm2d(C)))
    receipt = convert(model, to, torch.randn(8, 3, 9, 9), chunks=2)
    for key, value in model.state_dict().items():
        assert torch.equal(receipt.model.state_dict()[key], value)
    assert receipt.max_difference < 1e-4


def test_an_instance_norm_that_no_longer_tracks_is_taken_as_it_evaluates() -> None:
    model = nn.Sequential(drawn(nn.InstanceNorm2d(C, affine=True, track_running_stats=True, momentum=None))).double()
    x = 3 * torch.randn(4, C, 5, 5, dtype=torch.float64)
    tracking = convert(model, "batch", x)
    assert tracking.model[0].momentum == 0  # None is no averaging there, and the cumulative average in a batch norm
    assert tracking.max_difference < 1e-12
    model[0].track_running_stats = False
    receipt = convert(model, "twin", x)
    assert receipt.edits["0"].measured["output, rms"] == pytest.approx(float(model(x).detach().square().mean().sqrt()))
    assert convert(model, "batch", x).edits["0"].after["running statistics"] == "new"


def test_constant_channels_keep_the_carried_weight() -> None:
    model = drawn(nn.Sequential(nn.BatchNorm2d(C))).double()
    x = torch.randn(6, C, 4, 4, dtype=torch.float64)
    x[:, 2] = 5.0
    receipt = convert(model, "instance", x)
    new, old = receipt.model[0], model[0]
    assert new.weight[2] == old.weight[2]
    equal(new.bias[2], model.eval()(x)[0, 2, 0, 0])
    assert new.weight[1] != old.weight[1]


@pytest.mark.parametrize("to", TRACKING)
def test_norms_without_statistics_get_the_exact_ones_of_the_inputs(to: str) -> None:
    model = drawn(Net(nn.GroupNorm(2, C), nn.InstanceNorm2d(C, affine=True))).double()
    x = torch.randn(8, 3, 9, 9, dtype=torch.float64)
    receipt = convert(model, to, x, chunks=2)
    new = receipt.model.eval()
    h = new.conv1(x)
    equal(new.first.running_mean, h.mean((0, 2, 3)))
    equal(new.first.running_var, h.var((0, 2, 3)))
    h = new.conv2(F.relu(new.first(h)))
    equal(new.second.running_mean, h.mean((0, 2, 3)))
    equal(new.second.running_var, h.var((0, 2, 3)))
    assert int(new.second.num_batches_tracked) == 1
    assert receipt.edits["first"].after["running statistics"] == "new"
    assert receipt.rms_difference < 0.5 * receipt.facts["unfitted, rms"]
    plain = convert(model, to, x, chunks=2, calibrate=False).model
    assert plain.first.running_var.eq(1).all()


def test_masked_calls_count_valid_places_only() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = drawn(nw.BatchNorm1d(C))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    model = Masked().double()
    x = torch.randn(4, C, 7, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor([7, 5, 4, 6])[:, None]
    padded = torch.where(mask[:, None], x, float("nan"))
    receipt = convert(model, "instance", {"x": padded, "mask": mask})
    rows = [F.instance_norm(x[i : i + 1, :, : int(m.sum())], eps=1e-5)[0] for i, m in enumerate(mask)]
    u = torch.cat(rows, 1)
    y = model.eval().norm(x).movedim(1, -1)[mask].T.detach()
    new = receipt.model.norm
    for c in range(C):
        solution = np.linalg.lstsq(np.stack([u[c].numpy(), np.ones(u.size(1))], 1), y[c].numpy())[0]
        np.testing.assert_allclose([new.weight[c].item(), new.bias[c].item()], solution, rtol=1e-8)
    refused = convert(model, "renorm", {"x": x, "mask": mask})
    assert refused.skipped == {"norm": "is called with mask, which BatchRenorm does not take"}


def test_inputs_that_are_not_finite_leave_nothing() -> None:
    model = drawn(nn.Sequential(nn.BatchNorm2d(C)))
    x = torch.randn(3, C, 4, 4)
    x[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"Fitting '0' needs finite values"):
        convert(model, "instance", x)
    assert type(model[0]) is nn.BatchNorm2d
    assert not model[0]._forward_pre_hooks


def test_the_original_and_the_random_states_are_left_as_they_were() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(C), nn.Dropout()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x.add_(1)  # a model that writes into its input
            return self.drop(self.norm(x)) + torch.rand(1)

    model = drawn(Noisy())
    x, state = torch.randn(9, C), torch.get_rng_state()
    kept, before = x.clone(), copy.deepcopy(model.state_dict())
    receipt = convert(model, "group", x, groups=2)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert model.norm.training
    assert receipt.model.norm.training
    assert int(receipt.model.calls) == 0
    assert convert(model, "twin", x).max_difference < 1e-5  # the same draws on both sides
    assert not model.norm._forward_pre_hooks
    assert not receipt.model.norm._forward_pre_hooks


# ------------------------------------------------------------------------------------------- whole models and refusals


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = drawn(nn.BatchNorm2d(C))
        self.again = self.norm
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.conv(self.norm(x)))


def test_shared_modules_are_converted_once_and_fitted_to_all_calls() -> None:
    model = Shared().double()
    x = torch.randn(6, C, 5, 5, dtype=torch.float64)
    receipt = convert(model, "instance", x)
    assert list(receipt.edits) == ["norm"]
    assert receipt.edits["norm"].also == ("again",)
    assert receipt.model.norm is receipt.model.again
    assert type(receipt.model.norm) is nw.InstanceNorm2d
    assert receipt.rms_difference < receipt.facts["unfitted, rms"]


def test_several_calls_are_one_least_squares_problem() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = drawn(nn.BatchNorm2d(C))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.norm(x[:4]), self.norm(x[4:])])

    model = Two().double()
    x = torch.randn(6, C, 5, 5, dtype=torch.float64)
    x[4:] = 3 * x[4:] + 1
    together = convert(nn.Sequential(model.norm), "instance", x)
    receipt = convert(model, "instance", x)
    for key in ("weight", "bias"):
        equal(getattr(receipt.model.norm, key), getattr(together.model[0], key))
    assert receipt.rms_difference == pytest.approx(together.rms_difference)


def test_tied_parameters_stay_tied_and_are_not_fitted() -> None:
    model = drawn(nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C), nn.BatchNorm2d(C)))
    model[1].weight = model[0].weight
    receipt = convert(model, "group", torch.randn(4, C, 5, 5), groups=2)
    new = receipt.model
    assert new[0].weight is new[1].weight
    assert new[0].weight is not model[0].weight
    equal(new[0].weight, model[0].weight, 0)
    equal(new[1].bias, model[1].bias, 0)
    assert not torch.equal(new[2].weight, model[2].weight)
    assert receipt.edits["0"].measured["fitted"] == "no: tied"


def test_hooks_of_all_kinds_go_on() -> None:
    seen = []
    model = nn.Sequential(drawn(nn.BatchNorm2d(C)))
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    model[0].register_state_dict_post_hook(lambda *args: seen.append("state"))
    x = torch.randn(4, C, 5, 5)
    receipt = convert(model, "group", x, groups=2)
    y = receipt.model(x.requires_grad_())
    equal(y, F.group_norm(2 * x, 2, receipt.model[0].weight, receipt.model[0].bias), 1e-5)
    y.sum().backward()
    receipt.model.state_dict()
    assert seen == ["backward", "state"]


class Custom(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return -super().forward(x)


class LlamaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))


def test_what_is_not_known_is_left_alone_by_name() -> None:
    patched = nn.BatchNorm2d(C)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    parametrized = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(C), dim=None)
    hooked = nn.BatchNorm2d(C)
    hooked.register_buffer("scale", torch.ones(1))
    model = nn.ModuleDict(
        {
            "custom": Custom(C),
            "llama": LlamaRMSNorm(),
            "lazy": nn.LazyBatchNorm2d(affine=False, track_running_stats=False),
            "patched": patched,
            "parametrized": parametrized,
            "extra": hooked,
            "split": nw.SplitBatchNorm(C, 2),
            "pattern": nw.Norm("[b] c [s...]", c=C),
            "tokens": nn.LayerNorm(C),
            "group": nn.GroupNorm(3, C),
            "linear": nn.Linear(2, 2),
            "batch": nn.BatchNorm2d(C),
        }
    )
    receipt = convert(model, "group", groups=3)
    assert list(receipt.edits) == ["batch"]
    expected = {
        "custom": "the forward of test_convert.Custom is not known",
        "llama": "the forward of test_convert.LlamaRMSNorm is not known",
        "lazy": "does not know its size before an input",
        "patched": "its forward was replaced on the instance",
        "parametrized": "is parametrized",
        "extra": "holds scale besides what its class does",
        "split": "SplitBatchNorm is not known",
        "pattern": "Norm is not known",
        "tokens": "LayerNorm has its channels in the last dimensions, where 'group' does not",
        "group": "GroupNorm is this kind already",
    }
    assert receipt.skipped.keys() == expected.keys()
    for name, text in expected.items():
        assert text in receipt.skipped[name].replace(f"{__name__.rpartition('.')[0]}.test", "test"), name
    for name, module in model.items():
        if name != "batch":
            assert type(receipt.model[name]) is type(module)


def test_lazy_modules_are_refused_by_name() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.LazyConv2d(3, 1))
    with pytest.raises(ValueError, match=r"'1' \(LazyConv2d\) does not know its size"):
        convert(model, "group")
    model(torch.randn(2, C, 3, 3))
    assert list(convert(model, "group").edits) == ["0"]


class Twice(nn.Module):
    """A norm for (N, C, L) and (N, C), which both are 1d."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x).mean(2))


def test_shapes_that_make_a_conversion_meaningless_are_refused() -> None:
    norm = nn.Sequential(nn.BatchNorm1d(C))
    # an instance norm would take (N, C) for one sample: silently, where N is C
    for inputs in (None, torch.randn(C, C)):
        receipt = convert(norm, "instance", inputs)
        assert receipt.edits == {}
    assert "would take each statistic of one value" in receipt.skipped["0"]
    assert type(convert(norm, "instance", torch.randn(3, C, 4)).model[0]) is nw.InstanceNorm1d
    one = convert(nn.Sequential(nn.BatchNorm2d(C)), "instance", torch.randn(3, C, 1, 1))
    assert "would take each statistic of one value" in one.skipped["0"]
    assert "one value" in convert(nn.Sequential(nn.BatchNorm2d(1)), "channel").skipped["0"]
    unbatched = convert(nn.Sequential(nn.InstanceNorm2d(C)), "batch", torch.randn(C, 5, 5))
    assert "without a batch dimension" in unbatched.skipped["0"]
    undecided = convert(nn.Sequential(nn.GroupNorm(2, C)), "batch")
    assert "does not say whether it is 1d, 2d or 3d" in undecided.skipped["0"]
    for shape, cls in (((4, C), nw.BatchNorm1d), ((4, C, 5), nw.BatchNorm1d), ((2, C, 2, 3, 4), nw.BatchNorm3d)):
        assert type(convert(nn.Sequential(nn.GroupNorm(2, C)), "batch", torch.randn(shape)).model[0]) is cls
    both = Twice().double()
    given = torch.randn(4, C, 5, dtype=torch.float64)
    assert type(convert(both, "sync", given).model.norm) is SyncBatchNorm
    assert type(convert(convert(both, "sync").model, "batch", given).model.norm) is nw.BatchNorm1d
    assert "corrects towards" in convert(nn.BatchNorm2d(C, track_running_stats=False), "renorm").skipped[""]
    named = nn.ModuleDict({"ghost": nw.GhostBatchNorm(C, 2), "channel": nw.ChannelNorm(C)})
    assert convert(named, "torch").skipped == {
        "ghost": "torch has no GhostBatchNorm",
        "channel": "torch has no ChannelNorm",
    }


def test_only_by_name_by_parent_and_by_predicate() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C)), nn.BatchNorm2d(C))
    assert list(convert(model, "group", only="0").edits) == ["0.0", "0.1"]
    assert list(convert(model, "group", only=["0.1", "1"]).edits) == ["0.1", "1"]
    by_module = convert(model, "group", only=lambda name, module: module is not None and name.endswith("1"))
    assert list(by_module.edits) == ["0.1", "1"]
    assert by_module.skipped == {}
    with pytest.raises(ValueError, match="none called '7'"):
        convert(model, "group", only=["7"])


def test_arguments_are_checked_and_wrapped_models_refused() -> None:
    with pytest.raises(ValueError, match=r"to is one of 'batch', .*; got 'bach'"):
        convert(nn.BatchNorm2d(C), "bach")
    with pytest.raises(ValueError, match="give chunks="):
        convert(nn.BatchNorm2d(C), "ghost")
    with pytest.raises(ValueError, match="groups is a positive number; got 0"):
        convert(nn.BatchNorm2d(C), "group", groups=0)
    with pytest.raises(TypeError, match="convert works on plain modules"):
        convert(nn.DataParallel(nn.BatchNorm2d(C)), "group")


def test_none_leaves_the_activation_only() -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nw.BatchNorm2d(C, act="relu"), nn.LayerNorm(4))
    receipt = convert(model, "none")
    x = torch.randn(2, C, 4, 4)
    assert torch.equal(receipt.model(x), x.relu())
    assert not list(receipt.model.parameters())
    receipt.undo()
    assert receipt.model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("to", ["rms", "none"])
def test_torchs_fused_encoder_layer_does_not_compute_a_layer_norm_all_the_same(to: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = drawn(nn.TransformerEncoder(layer, 2)).eval()
    x = torch.randn(3, 5, 8) + 1
    receipt = convert(model, to, x, calibrate=False)
    slow = copy.deepcopy(receipt.model)
    for one in slow.layers:
        one.norm1.register_forward_hook(lambda *args: None)  # torch leaves the fused path for hooks
    with torch.no_grad():
        equal(receipt.model(x), slow(x), 1e-5)
        assert (receipt.model(x) - model(x)).abs().max() > 0.1
    assert receipt.edits["layers.0"].what.startswith("fused fast path off")
    receipt.undo()
    assert receipt.model.layers[0].activation_relu_or_gelu == 1
    assert convert(model, "twin").edits.keys() == {f"layers.{i}.norm{j}" for i in (0, 1) for j in (1, 2)}


# ---------------------------------------------------------------------------------------------------------------- timm


def acts(**options: object) -> nn.Module:
    norm_act = pytest.importorskip("timm.layers.norm_act")
    return drawn(norm_act.BatchNormAct2d(C, **options))


@pytest.mark.parametrize("to", ["batch", "twin", "sync", "group", "instance", "renorm", "none"])
def test_batch_norm_act_keeps_what_a_norm_can_apply(to: str) -> None:
    model = nn.Sequential(acts(act_layer=nn.SiLU), acts(apply_act=False)).eval()
    x = torch.randn(4, C, 5, 5)
    receipt = convert(model, to, x)
    if to == "batch":
        assert set(receipt.skipped) == {"0", "1"}
        return
    if to == "none":
        assert torch.equal(receipt.model(x), F.silu(x))
        return
    assert [layer.act for layer in receipt.model] == ["silu", None]
    assert not receipt.model[0]._modules
    if to in ("twin", "sync", "renorm"):
        equal(receipt.model(x), model(x), 1e-5)
        assert receipt.model.state_dict().keys() >= model.state_dict().keys()


@pytest.mark.parametrize("to", ["twin", "sync", "group", "instance", "renorm", "ghost", "channel"])
def test_batch_norm_act_keeps_what_a_norm_cannot_apply_behind_it(to: str) -> None:
    drop = nn.Dropout2d
    model = nn.Sequential(acts(act_layer=nn.ReLU6, drop_layer=drop)).eval()
    x = 5 * torch.randn(4, C, 5, 5)
    receipt = convert(model, to, x, chunks=2)
    new = receipt.model[0]
    assert [type(step) for step in new.tail] == [nn.Dropout2d, nn.ReLU6]
    y = receipt.model(x)
    assert float(y.detach().min()) == 0
    assert float(y.detach().max()) == 6
    if to in ("twin", "sync", "renorm", "ghost"):
        equal(y, model(x), 1e-5)
        assert new.state_dict().keys() >= model[0].state_dict().keys()
    # the same after pickling and copying, and traced whole
    equal(pickle.loads(pickle.dumps(receipt.model))(x), y, 0)
    equal(copy.deepcopy(receipt.model)(x), y, 0)
    if to != "renorm":
        equal(torch.fx.symbolic_trace(receipt.model)(x), y, 0)
    # and it may become something else again
    again = convert(receipt.model, "batch" if to != "batch" else "group", x).model[0]
    assert type(again).__name__ == "BatchNorm2d"
    assert [type(step) for step in again.tail] == [nn.Dropout2d, nn.ReLU6]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_tail_is_traced_once() -> None:
    model = nn.Sequential(acts(act_layer=nn.Hardswish)).eval()
    x = torch.randn(4, C, 5, 5)
    new = convert(model, "twin").model
    assert list(new.state_dict()) == list(model.state_dict())
    equal(torch.fx.symbolic_trace(new)(x), model(x), 1e-5)
    equal(torch.jit.script(new)(x), model(x), 1e-5)
    equal(torch.compile(new, backend="eager", fullgraph=True)(x), model(x), 1e-5)


def test_batch_norm_act_with_a_learned_activation() -> None:
    model = nn.Sequential(acts(act_layer=nn.PReLU)).eval()
    assert "whose keys would change" in convert(model, "twin").skipped["0"]
    x = torch.randn(4, C, 5, 5)
    renorm = convert(model, "renorm", x)
    equal(renorm.model(x), model(x), 1e-5)
    assert "0.tail.act.weight" in renorm.model.state_dict()


def test_timms_other_norms() -> None:
    layers = pytest.importorskip("timm.layers")
    cases = [
        (layers.LayerNorm(C), (4, 3, C), nw.LayerNorm),
        (layers.LayerNorm2d(C), (4, C, 3, 3), nw.ChannelNorm),
        (layers.GroupNorm(C, 3), (4, C, 3, 3), nw.GroupNorm),
        (layers.GroupNorm1(C), (4, C, 3, 3), nw.GroupNorm),
        (layers.GroupNormAct(C, 3), (4, C, 3, 3), nw.GroupNorm),
        (layers.SyncBatchNormAct(C), (4, C, 3, 3), SyncBatchNorm),
        (layers.RmsNorm(C), (4, 3, C), nw.RMSNorm),
    ]
    for norm, shape, cls in cases:
        model = nn.Sequential(drawn(norm)).eval()
        x = torch.randn(shape)
        receipt = convert(model, "twin", x)
        assert type(receipt.model[0]) is cls, receipt
        equal(receipt.model(x), model(x), 1e-5)
        assert list(receipt.model.state_dict()) == list(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "darknet17", "resnetv2_50"]
)
def test_timm_models_as_twins(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = drawn(timm.create_model(name, num_classes=7)).double().eval()
    x = torch.randn(2, 3, 224 if "vit" in name else 96, 224 if "vit" in name else 96, dtype=torch.float64)
    receipt = convert(model, "twin", x)
    assert receipt.edits
    assert receipt.skipped == {}
    assert receipt.max_difference <= 1e-9 * float(model(x).detach().abs().max())
    assert list(receipt.model.state_dict()) == list(model.state_dict())
