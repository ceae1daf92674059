"""param_groups: every parameter once, by the type of its owner, against lists written by hand."""

import copy

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import normwright as nw
from normwright.surgery.param_groups import is_norm, param_groups


def names(model, groups):
    """Group name → the qualified names in it."""
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {group["name"]: [by_id[id(p)] for p in group["params"]] for group in groups}


def decayed(model, **kwargs):
    """Names in the decayed group, after checking that both groups are the model's parameters, each once."""
    groups = param_groups(model, 0.1, **kwargs)
    every = [id(p) for group in groups for p in group["params"]]
    assert len(every) == len(set(every))
    assert set(every) == {id(p) for p in model.parameters()}
    return names(model, groups).get("decay", [])


NORM_LAYERS = [
    nn.BatchNorm2d(4),
    nn.SyncBatchNorm(4),
    nn.GroupNorm(2, 4),
    nn.LayerNorm((3, 4)),
    nn.RMSNorm((3, 4)),
    nn.InstanceNorm2d(4, affine=True),
    nw.BatchNorm2d(4),
    nw.Norm("b c [s...]", c=4),
    nw.Norm("b [c d]", affine="c d", c=4, d=3),
    nw.ChannelNorm(4),
    nw.FilterResponseNorm(4),
    nw.GhostBatchNorm(4, 2),
    nw.SplitBatchNorm(4, 2, shared_affine=False),
    nw.DyT(4),
    nw.EvoNormB0(4),
    nw.EvoNormS0(4, 2),
    nw.GRN(4),
    nw.SwitchNorm(4),
    nw.BatchRenorm(4),
    nw.Whitening(4),
    timm.layers.RmsNorm(4),
    timm.layers.RmsNorm2d(4),
    timm.layers.LayerNorm2d(4),
    timm.layers.BatchNormAct2d(4),
    timm.layers.GroupNorm1(4),
    timm.layers.grn.GlobalResponseNorm(4),
    timm.layers.FilterResponseNormTlu2d(4),
]


@pytest.mark.parametrize("layer", NORM_LAYERS, ids=lambda layer: f"{type(layer).__module__}.{type(layer).__name__}")
def test_no_normalization_layer_is_decayed_whatever_the_shape_of_its_parameters(layer):
    assert is_norm(layer)
    model = nn.Sequential(nn.Linear(3, 4), copy.deepcopy(layer))
    assert decayed(model) == ["0.weight"]


def test_weights_of_linear_maps_are_decayed_whatever_their_shape_and_biases_are_not():
    model = nn.ModuleDict(
        {
            "one": nn.Linear(7, 1),
            "pointwise": nn.Conv2d(1, 1, 1),
            "up": nn.ConvTranspose1d(2, 3, 2),
            "pair": nn.Bilinear(2, 3, 4),
            "rnn": nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
            "cell": nn.GRUCell(3, 4),
            "attention": nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True),
            "slope": nn.PReLU(4),
            "table": nn.Embedding(9, 4),
        }
    )
    expected = [n for n, _ in model.named_parameters() if "weight" in n and not n.startswith(("slope", "table"))]
    assert sorted(decayed(model)) == sorted(expected)
    assert "attention.q_proj_weight" in expected


class Tokens(nn.Module):
    """Parameters of a module of no known type."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.temperature = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.zeros(1, 6, 4))
        self.dense = nn.Parameter(torch.zeros(4, 4))


def test_other_modules_go_by_shape_and_by_what_the_model_lists():
    assert decayed(Tokens()) == ["table", "dense"]

    class Listed(Tokens):
        def no_weight_decay(self):
            return {"table", "head.bias that is not here"}

    inner = nn.Sequential(nn.Linear(2, 2), Listed())
    assert decayed(inner) == ["0.weight", "1.dense"]
    assert decayed(inner, decay=("1.table",)) == ["0.weight", "1.table", "1.dense"]


def test_arguments_change_the_rule_by_type_and_by_name():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.LayerNorm(4))
    assert decayed(model) == ["1.0.weight", "1.1.weight"]
    assert decayed(model, decay=nn.Embedding) == ["0.weight", "1.0.weight", "1.1.weight"]
    assert decayed(model, no_decay="1") == []
    assert decayed(model, no_decay=("1",), decay=("1.1",)) == ["1.1.weight", "1.1.bias"]
    assert decayed(model, no_decay=(nn.Linear,), decay=("1.0.weight",)) == ["1.0.weight"]
    assert decayed(model, decay=(nn.LayerNorm, nn.Linear), no_decay=nn.Linear) == ["2.weight", "2.bias"]

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 3))

    assert decayed(nn.Sequential(Mine())) == ["0.scale"]
    assert decayed(nn.Sequential(Mine()), norms=(Mine,)) == []


def test_tied_parameters_stand_once_and_any_owner_can_refuse_decay():
    model = nn.ModuleDict({"head": nn.Linear(4, 5), "table": nn.Embedding(5, 4), "norm": nn.LayerNorm((5, 4))})
    model["table"].weight = model["head"].weight
    assert decayed(model) == []
    assert decayed(model, decay=("table.weight",)) == ["head.weight"]
    model["table"].weight = nn.Parameter(torch.ones(5, 4))
    model["norm"].weight = model["head"].weight
    assert decayed(model) == []
    shared = nn.Linear(2, 2)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    assert decayed(twice) == ["0.weight"]
    assert decayed(twice, no_decay=("2",)) == []


def test_parametrized_weights_are_decayed_and_their_gains_are_not():
    model = nn.Sequential(
        weight_norm(nn.Linear(4, 3)),
        nn.utils.parametrize.register_parametrization(nn.Conv2d(3, 4, 3), "weight", nw.WeightStandardization()),
        nw.ScaledStdConv2d(4, 4, 3),
        timm.layers.ScaledStdConv2d(4, 4, 3),
        nn.utils.parametrize.register_parametrization(nn.LayerNorm((2, 2)), "weight", nn.Tanh(), unsafe=True),
    )
    assert sorted(decayed(model)) == [
        "0.parametrizations.weight.original1",
        "1.parametrizations.weight.original",
        "2.weight",
        "3.weight",
    ]


def test_frozen_parameters_are_left_out_or_included():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    assert names(model, param_groups(model, 0.1)) == {"no_decay": ["0.bias"]}
    assert names(model, param_groups(model, 0.1, frozen=True)) == {
        "decay": ["0.weight"],
        "no_decay": ["0.bias", "1.weight", "1.bias"],
    }
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of this model's requires a gradient"):
        param_groups(model, 0.1)


def test_one_step_decays_exactly_the_decayed_group():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model, 0.5, lr=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if n in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(p.detach(), before[n] * factor)


def test_the_same_order_again_so_that_the_optimizers_state_loads():
    def make():
        return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=1, num_classes=3)

    first, second = make(), make()
    assert names(first, param_groups(first, 0.1)) == names(second, param_groups(second, 0.1))
    one, two = (torch.optim.AdamW(param_groups(m, 0.1), lr=1e-3) for m in (first, second))
    first(torch.randn(2, 3, 32, 32)).sum().backward()
    one.step()
    two.load_state_dict(one.state_dict())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one.state[a]["exp_avg"], two.state[b]["exp_avg"])
    assert two.param_groups[0]["name"] == "decay"
    # what the model lists, class token and position table, is not decayed
    assert {"cls_token", "pos_embed"} <= set(names(first, param_groups(first, 0.1))["no_decay"])


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_as_timm_splits_its_own_models(arch):
    model = timm.create_model(arch, num_classes=3)
    listed = getattr(model, "no_weight_decay", set)()
    theirs = timm.optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=listed)
    wanted = {id(p) for group in theirs for p in group["params"] if group["weight_decay"]}
    by_id = {id(p): n for n, p in model.named_parameters()}
    assert set(decayed(model)) == {by_id[i] for i in wanted}


def test_wrapped_models_are_looked_through():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    compiled = torch.compile(model, backend="eager")
    assert [g["params"] for g in param_groups(compiled, 0.1)] == [g["params"] for g in param_groups(model, 0.1)]


def test_errors_say_what_to_do():
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="weight_decay is a number from 0 on; got -1"):
        param_groups(model, -1)
    with pytest.raises(ValueError, match="lr is a number from 0 on; got nan"):
        param_groups(model, 0, lr=float("nan"))
    with pytest.raises(ValueError, match=r"no_decay= names parameters and modules .* none called 'bias'"):
        param_groups(model, 0.1, no_decay=("bias",))
    with pytest.raises(ValueError, match="'0' is in decay= and in no_decay="):
        param_groups(model, 0.1, no_decay=("0",), decay=("0",))
    with pytest.raises(TypeError, match="decay= holds types of modules and qualified names; got 3"):
        param_groups(model, 0.1, decay=(3,))
    with pytest.raises(ValueError, match=r"'0' does not know its own before an input"):
        param_groups(nn.Sequential(nn.LazyLinear(3)), 0.1)
