"""fold against the unfolded network in float64, and against every way in which a fold is silently wrong."""

import copy
import io
import pickle
import warnings
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normwright as nw
from normwright.layers import twins
from normwright.surgery import accelerate, convert, fold
from normwright.surgery.modules import names_of_parameters

DIFFERENTIABLE = pytest.mark.parametrize("differentiable", [False, True], ids=["for_good", "on_the_fly"])


def lively(model):
    """Statistics and affine far from their defaults, in evaluation mode: a fold that forgets one of them is wrong."""
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.uniform_(-2, 2)
            module.running_var.uniform_(0.3, 3)
            if module.weight is not None:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.uniform_(module.bias, -2, 2)
    return model.eval()


def check(model, x, folded=(), n=200, **options):
    """Fold; the output is the float64 network's; exactly these norms are folded. The receipt."""
    before = copy.deepcopy(model.state_dict())
    truth = copy.deepcopy(model).double()(x.double())
    receipt = fold(model, x, **options)
    assert_close(receipt.model(x), truth, n, scale=10.0)
    assert set(receipt.edits) == set(folded)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return receipt


def torchs_fuse(model):
    """torch.fx.experimental.optimization.fuse, whose import warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.fx.experimental.optimization import fuse
    return fuse(model)


def why(receipt, name):
    assert name not in receipt.edits
    return receipt.skipped[name]


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d, (3, 4, 9, 7)),
    "conv3d": (nn.Conv3d(4, 6, 2, dilation=2), nn.BatchNorm3d, (3, 4, 5, 4, 6)),
    "conv2d_groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv2d_depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv2d_reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d, (3, 4, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, output_padding=1, stride=2), nn.BatchNorm2d, (3, 4, 5, 4)),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 6, 2, padding=1), nn.BatchNorm3d, (3, 4, 3, 4, 5)),
    # torch's fusion of this one, without `transpose=True`, scales the inputs in place of the outputs and says nothing
    "square_transposed": (nn.ConvTranspose2d(4, 4, 3, bias=False), nn.BatchNorm2d, (3, 4, 5, 5)),
    # and with it reads C/groups factors where there are C
    "grouped_transposed": (nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d, (3, 4, 5, 5)),
    "square_grouped_transposed": (nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d, (3, 4, 5, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d, (3, 4)),
    "linear_without_bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d, (3, 4)),
}


@DIFFERENTIABLE
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_norm_behind_every_layer(name, affine, differentiable):
    layer, norm, shape = LAYERS[name]
    channels = getattr(layer, "out_channels", None) or layer.out_features
    model = lively(nn.Sequential(copy.deepcopy(layer), norm(channels, affine=affine), nn.Tanh()))
    receipt = check(model, torch.randn(shape), ["1"], differentiable=differentiable)
    assert receipt.edits["1"].measured["differs by at most"] < 1e-4
    if not differentiable:
        assert type(receipt.model[1]) is nn.Identity
        assert receipt.model[0].weight.shape == layer.weight.shape
        assert receipt.model[0].weight.requires_grad
        assert receipt.model[0].bias.requires_grad


NEXT = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (3, 4, 9)),
    "conv2d_groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv2d_valid": (nn.Conv2d(4, 6, 3, padding="valid", stride=2), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv2d_same_of_one": (nn.Conv2d(4, 6, 1, padding="same"), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv2d_circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv2d_replicate": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate"), nn.BatchNorm2d, (3, 4, 6, 6)),
    "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d, (3, 4, 5, 4, 6)),
    "pointwise_transposed": (nn.ConvTranspose2d(4, 6, 1, groups=2, padding=1), nn.BatchNorm2d, (3, 4, 6, 6)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d, (3, 4)),
}


@DIFFERENTIABLE
@pytest.mark.parametrize("name", NEXT)
def test_norm_before_the_layer(name, differentiable):
    layer, norm, shape = NEXT[name]
    model = lively(nn.Sequential(nn.Sigmoid(), norm(4), copy.deepcopy(layer)))
    check(model, torch.randn(shape), ["1"], differentiable=differentiable)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 1, stride=2),
    ],
    ids=lambda layer: str(layer).replace(" ", ""),
)
def test_padding_stands_in_the_way_of_a_shift_only(layer):
    model = lively(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(4), copy.deepcopy(layer)))
    x = torch.randn(2, 4, 5, 5)
    assert "border" in why(check(model, x), "1")
    assert "border" in why(fold(model), "1")
    with torch.no_grad():
        norm = model[1]
        # powers of two, so that the shift is exactly zero
        norm.running_var.copy_(0.25 - torch.tensor(norm.eps)), norm.running_mean.zero_(), norm.bias.zero_()
    check(model, x, ["1"])


def test_norm_on_a_linear_layers_length_is_not_its_channel():
    # known silent error: (N, C, L) with L = C; the norm's channels are axis 1, the layer's outputs the last
    model = lively(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)))
    x = torch.randn(3, 5, 7)
    theirs = torchs_fuse(model)(x)
    assert (theirs - model(x)).abs().max() > 0.1
    receipt = check(model, x)
    assert "axis 1 of 3" in why(receipt, "1")
    assert "not known without inputs" in why(fold(model), "1")
    behind = lively(nn.Sequential(nn.Sigmoid(), nn.BatchNorm1d(5), nn.Linear(5, 2)))
    assert "axis 1 of 3" in why(check(behind, torch.randn(3, 5, 5)), "1")


class TwoNorms(nn.Module):
    """A convolution shared by two norms, as in the heads of detectors."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn2(self.conv(self.bn1(self.conv(x)).relu()))


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "trace"])
def test_layer_shared_by_two_norms(given):
    model, x = lively(TwoNorms()), torch.randn(2, 3, 5, 5)
    # torch's fuses both into the one convolution
    assert (torchs_fuse(model)(x) - model(x)).abs().max() > 0.1
    receipt = fold(model, x if given else None)
    assert "'conv' is called 2 times" in why(receipt, "bn1")
    assert "'conv' is called 2 times" in why(receipt, "bn2")
    assert torch.equal(receipt.model(x), model(x))


def test_folded_bias_has_a_gradient():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    model = lively(nn.Sequential(conv, norm))
    assert not fuse_conv_bn_eval(conv, norm).bias.requires_grad  # torch's is frozen without a word
    assert fold(model).model[0].bias.requires_grad
    norm.bias.requires_grad_(False)
    assert not fold(model).model[0].bias.requires_grad
    conv.weight.requires_grad_(False)
    assert not fold(model).model[0].weight.requires_grad
    no_affine = lively(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)))
    assert fold(no_affine).model[0].bias.requires_grad
    with_bias = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with_bias[0].bias.requires_grad_(False)
    assert not fold(with_bias).model[0].bias.requires_grad


def test_norms_on_both_sides_and_in_a_row():
    model = lively(
        nn.Sequential(
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 4, 3),
            nn.Identity(),
            nn.Dropout(0.0),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(64, 5),
            nn.BatchNorm1d(5),
        )
    )
    receipt = check(model, torch.randn(3, 3, 6, 6), ["0", "4", "5", "10"])
    assert "ReLU" in why(receipt, "7")
    assert "Flatten" in why(receipt, "7")
    check(model, torch.randn(3, 3, 6, 6), ["0", "4", "5", "10"], differentiable=True)


KINDS = {
    "sync": nn.SyncBatchNorm,
    "twin": twins.BatchNorm2d,
    "ghost": lambda c: nw.GhostBatchNorm(c, 2),
    "renorm": nw.BatchRenorm,
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "instance_twin": lambda c: twins.InstanceNorm2d(c, affine=True, track_running_stats=True),
}


@DIFFERENTIABLE
@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_with_running_statistics(kind, differentiable):
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), KINDS[kind](4)))
    check(model, torch.randn(2, 3, 6, 6), ["1"], differentiable=differentiable)


@DIFFERENTIABLE
@pytest.mark.parametrize("act", nw.ACTIVATIONS)
def test_activation_of_a_twin_stays(act, differentiable):
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), twins.BatchNorm2d(4, act=act)))
    receipt = check(model, torch.randn(2, 3, 6, 6), ["1"], differentiable=differentiable)
    assert "Identity" not in receipt.edits["1"].what
    before = lively(nn.Sequential(nn.Sigmoid(), twins.BatchNorm2d(3, act=act), nn.Conv2d(3, 4, 3)))
    assert "activation" in why(check(before, torch.randn(2, 3, 6, 6)), "1")


@DIFFERENTIABLE
def test_timms_norm_leaves_dropout_and_activation(differentiable):
    layers = pytest.importorskip("timm.layers")

    def model(inputs=3):
        norm = layers.BatchNormAct2d(inputs, act_layer=nn.PReLU, act_kwargs={"init": 0.3}, inplace=False)
        return nn.Sequential(layers.create_conv2d(3, inputs, 3, stride=2, padding="same"), norm)

    original, x = lively(model(4)), torch.randn(2, 3, 7, 7)
    assert type(original[0]).__name__ == "Conv2dSame"
    receipt = check(original, x, ["1"], differentiable=differentiable)
    assert "PReLU" in receipt.edits["1"].what
    assert receipt.model[1].act.weight is dict(receipt.model.named_parameters())["1.act.weight"]
    before = nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), layers.create_conv2d(3, 4, 3, stride=2, padding="same"))
    assert "border" in why(check(lively(before), x), "1")
    for frozen in (layers.FrozenBatchNormAct2d(4), pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(4)):
        frozen.running_mean.uniform_(-1, 1)
        check(nn.Sequential(nn.Conv2d(3, 4, 3), frozen).eval(), x, ["1"], differentiable=differentiable)


@pytest.mark.parametrize("differentiable", [False, True])
def test_accelerated_models_fold(differentiable):
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    check(accelerate(model).model, torch.randn(2, 3, 6, 6), ["1"], differentiable=differentiable)


@pytest.mark.parametrize("differentiable", [False, True])
def test_converted_models_keep_what_convert_put_behind_the_norm(differentiable):
    layers = pytest.importorskip("timm.layers")
    norm = layers.BatchNormAct2d(4, act_layer=nn.ReLU6, drop_layer=nn.Dropout)
    model = convert(lively(nn.Sequential(nn.Conv2d(3, 4, 3), norm)), "twin").model
    check(model, torch.randn(2, 3, 6, 6), ["1"], differentiable=differentiable)
    assert_close(fold(model).model(x := torch.randn(2, 3, 6, 6)), model(x), 27)


class Reads(nn.Module):
    """A pair of layers around which somebody else reads something; `how` says what."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 3, 3, padding=1)  # padded, so that the norm does not fold into it

    def forward(self, x):
        y = self.conv(x)
        if self.how == "inplace":
            y.mul_(2)
        if self.how == "relu":
            F.relu_(y)
        if self.how == "keeps":
            self.feature = [y]
        z = self.bn(y)
        if self.how == "adds":
            z = z + y
        if self.how == "mask":
            z = z * (y.detach().numpy(force=True) > 0).any().item()
        if self.how == "weight":
            z = z + self.conv.weight.sum()
        if self.how == "norm weight":
            z = z + self.bn.weight.sum()
        if self.how == "eps":
            z = z + self.bn.eps
        if self.how == "metadata":
            z = z.reshape(y.shape).to(y.dtype)
        if self.how == "returns":
            return self.last(z), y
        if self.how == "view":
            return self.last(z) + y[:, :1]
        return self.last(z)


@pytest.mark.parametrize(
    "how",
    ["inplace", "relu", "keeps", "adds", "mask", "weight", "norm weight", "eps", "returns", "view"],
)
def test_other_readers_are_found(how):
    model, x = lively(Reads(how)), torch.randn(2, 3, 5, 5)
    for receipt in (fold(model, x), fold(model, x, forward=lambda m, b: m(b))):
        assert "bn" in receipt.skipped, receipt
        with torch.no_grad():  # a model that keeps a tensor with a graph cannot be copied again
            assert all(map(torch.equal, model(x), receipt.model(x)))
    if how == "eps":
        # an attribute of Python's leaves no trace before the fold, but does not trace after it
        with pytest.raises(RuntimeError, match="asks a norm for more than its output"):
            fold(model)
    else:
        assert "bn" in fold(model).skipped


def test_shape_and_type_are_no_reading():
    model, x = lively(Reads("metadata")), torch.randn(2, 3, 5, 5)
    assert set(fold(model).edits) == {"bn"}
    check(model, x, ["bn"])


class Branches(nn.Module):
    """torch.fx cannot trace a forward that looks at values."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if x.sum() > 0 else self.other(y)


def test_a_run_gives_the_order_where_the_trace_fails():
    model, x = lively(Branches()), torch.ones(2, 3, 5, 5)
    receipt = check(model, x, ["bn"])
    assert "recorded on the inputs (no trace: TraceError" in receipt.facts["order"]
    assert "is not called" in why(receipt, "other")
    receipt = fold(model)
    assert not receipt.edits
    assert set(receipt.skipped) == {"bn", "other"}
    assert "no trace" in receipt.facts["order"]
    assert receipt.max_difference is None


def test_optional_arguments_and_mappings():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, mask=None):
            y = self.conv(x)
            return self.bn(y) if mask is None else self.bn(y * mask)

    model, x = lively(Masked()), torch.randn(2, 3, 5, 5)
    assert set(fold(model).edits) == {"bn"}
    assert set(fold(model, {"x": x}).edits) == {"bn"}
    assert set(fold(model, (x, torch.zeros(2))).edits) == {"bn"}
    receipt = fold(model, {"x": x, "mask": torch.rand(3, 3)})
    assert "bn" in receipt.skipped
    assert "the inputs name optional arguments" in receipt.facts["order"]
    assert set(fold(model, [x], forward=lambda m, batch: m(*batch)).edits) == {"bn"}
    with pytest.raises(ValueError, match="pass inputs= too"):
        fold(model, forward=lambda m, batch: m(*batch))


def test_left_alone_with_a_reason():
    x = torch.randn(2, 3, 6, 6)

    def reason(layer, norm, change=lambda model: None):
        model = lively(nn.Sequential(layer, norm, nn.ReLU()))
        change(model)
        receipt = fold(model, x)
        assert not receipt.edits
        assert_close(receipt.model(x), model(x), 1)
        assert fold(model).skipped.keys() == receipt.skipped.keys()
        return receipt.skipped["1"]

    def conv():
        return nn.Conv2d(3, 4, 3)

    def norm():
        return nn.BatchNorm2d(4)

    assert "no running statistics" in reason(conv(), nn.BatchNorm2d(4, track_running_stats=False))
    assert "no running statistics" in reason(conv(), nn.InstanceNorm2d(4))
    assert "class whose forward is not known" in reason(conv(), type("Mine", (nn.BatchNorm2d,), {})(4))
    assert "is a Mine" in reason(type("Mine", (nn.Conv2d,), {})(3, 4, 3), norm())
    assert "hooks" in reason(conv(), norm(), lambda m: m[1].register_forward_hook(lambda *_: None))
    assert "hooks" in reason(conv(), norm(), lambda m: m[0].register_forward_pre_hook(lambda *_: None))
    assert "replaced on the instance" in reason(conv(), norm(), lambda m: setattr(m[1], "forward", m[1].forward))
    weight_norm = nn.utils.parametrizations.weight_norm(conv())
    assert "is a Parametrized" in reason(weight_norm, norm())

    model = lively(nn.Sequential(nn.Sequential(conv()), norm()))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert "read elsewhere" in why(check(model, x), "1")
    assert "read elsewhere" in why(fold(model), "1")
    assert all(type(output) is torch.Tensor for output in seen)  # no hook was called with fx's proxies

    tied = lively(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)))
    tied[2].weight = tied[0].weight
    assert "tied" in why(check(tied, x), "1")

    with pytest.raises(RuntimeError, match="Call `forward` with a dummy batch"):
        fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()).eval())
    alone = fold(lively(nn.BatchNorm2d(3)), x)
    assert alone.skipped.keys() == {""}


class Calls(nn.Module):
    """Two layers called by a function."""

    def __init__(self, first, second, call):
        super().__init__()
        self.first, self.second, self.call = first, second, call
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.call(self, x)


def test_calls_with_more_than_an_input():
    x = torch.randn(2, 3, 6, 6)
    twin = Calls(nn.Conv2d(3, 3, 1), twins.BatchNorm2d(3), lambda m, x: m.second(m.first(x), residual=x))
    sized = Calls(
        nn.ConvTranspose2d(3, 4, 2, stride=2),
        nn.BatchNorm2d(4),
        lambda m, x: m.second(m.first(x, output_size=[13, 13])),
    )
    for model in (twin, sized):
        lively(model)
        for receipt in (fold(model, x), fold(model), fold(model, x, forward=lambda m, b: m(b))):
            assert "called with more than its input" in why(receipt, "second")
            assert receipt.model.count == model.count  # the runs' own counting is undone
            assert torch.equal(receipt.model(x), model(x))
            model(x)
            receipt.model.count, model.count = torch.zeros(()), torch.zeros(())


def test_a_branch_on_the_value_between_is_a_reader():
    model = lively(
        Calls(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            lambda m, x: m.second(y * 0 if (y := m.first(x)).isnan().any() else y),
        )
    )
    assert "not what the layer" in why(check(model, torch.randn(2, 3, 6, 6)), "second")


def test_more_that_is_left_alone():
    x = torch.randn(2, 3, 6, 6)
    inplace = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)))
    assert "is a ReLU" in why(fold(inplace, x, forward=lambda m, b: m(b)), "2")
    dropout = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4)))
    for receipt in (check(dropout, x), fold(dropout), fold(dropout, x, forward=lambda m, b: m(b))):
        assert "Dropout" in why(receipt, "2")
    late = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)))
    late[1].track_running_stats = False
    assert "no running statistics" in why(check(late, x), "1")
    unbatched = lively(nn.Sequential(nn.Linear(7, 5), nn.InstanceNorm1d(5, track_running_stats=True)))
    assert "axis 1 of 2" in why(check(unbatched, torch.randn(5, 7)), "1")
    wrong = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5))
    assert "another number of channels" in why(fold(wrong), "1")


def test_wrapped_models_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(TypeError, match="give the model inside"):
            fold(wrapped)


def test_a_fold_that_is_not_finite_or_not_equal_is_not_made():
    x = torch.randn(2, 3, 6, 6)
    padded = nn.Conv2d(4, 4, 3, padding=1)
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), padded, nn.BatchNorm2d(4)))
    model[1].running_var[2] = torch.inf
    model[1].running_mean[2] = torch.inf
    receipt = fold(model, x)
    assert "not be finite" in why(receipt, "1")
    half = copy.deepcopy(model).half()
    half[1].running_var[2], half[1].running_mean[2] = 1.0, 0.0
    half[1].weight.data[2] = 6e4
    half[0].weight.data[2] = 60
    assert "not be finite" in why(fold(half, x.half()), "1")

    nan = x.clone()
    nan[0, 0, 0, 0] = torch.nan
    model[1].running_var[2], model[1].running_mean[2] = 1.0, 0.0
    receipt = fold(model, nan)
    assert {"not finite" in reason for reason in receipt.skipped.values()} == {True}
    assert not receipt.edits

    class Conv2d(nn.Conv2d):  # says that it is torch's and is not: only the comparison finds it
        __module__ = nn.Conv2d.__module__

        def forward(self, x):
            return super().forward(x).clamp(-0.3, 0.3)

    model = lively(nn.Sequential(Conv2d(3, 4, 3), nn.BatchNorm2d(4), copy.deepcopy(padded), nn.BatchNorm2d(4)))
    receipt = fold(model, x)
    assert "rounding explains" in why(receipt, "1")
    assert set(receipt.edits) == {"3"}
    assert_close(receipt.model(x), model(x), 36)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype):
    model = lively(nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU())).to(dtype)
    x = torch.randn(4, 16, 8, 8).to(dtype)
    truth = copy.deepcopy(model).double()(x.double())
    receipt = fold(model, x)
    assert set(receipt.edits) == {"1"}
    assert {p.dtype for p in receipt.model.parameters()} == {dtype}
    assert_close(receipt.model(x), truth, 144)


def test_large_means_are_within_the_bound_and_small_errors_are_not():
    """Rounding at a mean of 3000 is no error; an epsilon forgotten in one channel is."""
    model = lively(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    model[1].running_mean.add_(3000)
    model[0].bias.data.add_(3000)
    assert set(fold(model, torch.randn(5, 8)).edits) == {"1"}
    model = lively(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    model[1].eps, model[1].running_var[:] = 1e-3, 1.0

    class BatchNorm1d(nn.BatchNorm1d):
        __module__ = nn.BatchNorm1d.__module__

        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.0)

    model[1].__class__ = BatchNorm1d
    assert "rounding explains" in why(fold(model, torch.randn(5, 8)), "1")


def small():
    return lively(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 5, 3),
            twins.BatchNorm2d(5, act="silu"),
            nn.ConvTranspose2d(5, 4, 2, groups=1),
            nn.BatchNorm2d(4, affine=False),
            nn.Flatten(),
            nn.Linear(36, 6),
            nn.BatchNorm1d(6),
        )
    )


def test_on_the_fly_gradients_are_those_of_the_frozen_network():
    model, x = small().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    receipt = fold(model, x, differentiable=True)
    folded = receipt.model
    assert len(receipt.edits) == 5
    assert list(folded.state_dict()) == list(model.state_dict())
    assert [name for name, _ in folded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert isinstance(folded[1], nn.BatchNorm2d)
    for mode in (True, False):
        folded.train(mode)  # statistics are frozen in training mode too
        weights = torch.randn(2, 6, dtype=torch.float64)
        for network in (model, folded):
            network.zero_grad()
            (network(x) * weights).sum().backward()
        for (name, p), q in zip(model.named_parameters(), folded.parameters(), strict=True):
            assert q.grad is not None, name
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert torch.equal(folded[1].running_mean, model[1].running_mean)
    assert torch.equal(folded[1].num_batches_tracked, model[1].num_batches_tracked)


def test_on_the_fly_follows_training_and_loading():
    model, x = small(), torch.randn(2, 3, 6, 6)
    receipt = fold(model, x, differentiable=True)
    folded = receipt.model
    optimizer = torch.optim.SGD(folded.parameters(), 0.05)
    folded(x).square().sum().backward()
    optimizer.step()
    model.load_state_dict(folded.state_dict())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    lively(model)
    folded.load_state_dict(model.state_dict())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    for again in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)):
        assert torch.equal(again(x), folded(x))
        assert again[0]._folds[0][0] is again[1]
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), folded(x))
    receipt.undo()
    assert [type(m) for m in folded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(folded(x), model(x))


def test_on_the_fly_makes_no_pass_over_the_activation():
    """One convolution and one activation touch tensors of the activation's size; the norm does not."""
    model, x = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())), torch.randn(8, 3, 30, 30)
    folded = fold(model, x, differentiable=True).model
    size = folded(x).numel()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        folded(x)
    # what ReLU keeps, and the input, which the convolution keeps; no third
    assert sum(t.numel() == size for t in saved) == 1
    operations = [event.name for event in profile(folded, x)]
    assert not [name for name in operations if "batch_norm" in name]
    assert operations.count("aten::conv2d") == 1


def profile(model, x):
    with torch.profiler.profile() as events:
        model(x)
    return events.events()


def test_an_exception_leaves_the_model_and_hooks_as_they_were():
    model = small()
    calls = []

    def fails(module, args, output):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt

    model[2].register_forward_hook(fails)
    before = [(type(m), dict(vars(m)), dict(m._parameters)) for m in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        fold(model, torch.randn(2, 3, 6, 6))
    assert [(type(m), dict(vars(m)), dict(m._parameters)) for m in model.modules()] == before


def test_undo_modes_hooks_and_marks():
    model, x = small().train(), torch.randn(2, 3, 6, 6)
    model[2].eval()
    model[1].nw_frozen = True
    names = names_of_parameters(model)
    receipt = fold(model, x)
    folded = receipt.model
    assert [m.training for m in folded.modules()] == [m.training for m in model.modules()]
    assert folded[1].nw_frozen
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in folded.modules())
    assert receipt.max_difference < 1e-4
    assert "5 edited, 0 skipped" in str(receipt)
    receipt.undo()
    assert list(chain(*names_of_parameters(folded).values())) == list(chain(*names.values()))
    assert all(
        torch.equal(a, b) for a, b in zip(folded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(folded.eval()(x), model.eval()(x))


def test_layouts_and_compilation():
    model = lively(nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    folded = fold(model, x).model
    assert folded[0].weight.stride() == model[0].weight.stride()
    assert folded(x).is_contiguous(memory_format=torch.channels_last)
    fly = fold(small(), differentiable=True).model
    x = torch.randn(2, 3, 6, 6)
    exported = torch.export.export(fly, (x,)).module()
    torch.testing.assert_close(exported(x), fly(x))
    assert torch.compile(fly, backend="eager", fullgraph=True)(x).equal(fly(x))
