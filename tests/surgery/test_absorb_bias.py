"""absorb_bias: outputs, running statistics and other gradients to the last digits, and every way a bias may matter."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.vgg import make_layers

import normwright as nw
from normwright.surgery.absorb_bias import absorb_bias


def randomized(model):
    """In double, with biases, statistics and affine parameters of a size at which a mistake shows."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and "running_var" in name:
            tensor.data.uniform_(0.5, 2.0)
        elif tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data.normal_()
    return model.double()


def check(model, x, dropped, steps=3):
    """The layers in `dropped` lose their bias, and nothing else changes, at evaluation or through training steps."""
    receipt = absorb_bias(model, x)
    work = receipt.model
    assert list(receipt.edits) == list(dropped)
    assert receipt.max_difference < 1e-10
    lost = {f"{name}.bias" for name in dropped}
    assert set(model.state_dict()) - set(work.state_dict()) == lost
    assert list(work.state_dict()) == [key for key in model.state_dict() if key not in lost]
    pairs = dict(work.named_parameters(remove_duplicate=False))
    reference = copy.deepcopy(model)
    torch.testing.assert_close(work.eval()(x), reference.eval()(x), rtol=1e-11, atol=1e-11)
    for _ in range(steps):
        outputs = [m.train()(x) for m in (work, reference)]
        torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
        for m, y in zip((work, reference), outputs, strict=True):
            m.zero_grad()
            y.square().sum().backward()
        for name, p in reference.named_parameters():
            if name in lost:
                assert p.grad is None or p.grad.abs().max() < 1e-9
            elif p.grad is not None:
                torch.testing.assert_close(pairs[name].grad, p.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(work.eval()(x), reference.eval()(x), rtol=1e-11, atol=1e-11)
    return receipt, reference


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), (5, 2, 7)),
        (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), (5, 2, 6, 6)),
        (nn.Conv2d(2, 4, 3, groups=2, padding=1, padding_mode="reflect"), nw.BatchNorm2d(4), (5, 2, 6, 6)),
        (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4, momentum=None), (3, 2, 3, 4, 3)),
        (nn.ConvTranspose2d(2, 4, 3, stride=2), nn.SyncBatchNorm(4), (3, 2, 4, 4)),
        (nn.Linear(2, 4), nn.BatchNorm1d(4, affine=False), (6, 2)),
        (nn.Conv2d(2, 4, 3), nw.GhostBatchNorm(4, 2), (6, 2, 5, 5)),
        (nn.Conv2d(2, 4, 3), nw.BatchRenorm(4), (6, 2, 5, 5)),
        (nn.Conv2d(2, 4, 3), timm.layers.BatchNormAct2d(4), (6, 2, 5, 5)),
        (nw.ScaledStdConv2d(2, 4, 3), nn.BatchNorm2d(4), (6, 2, 5, 5)),
        (timm.layers.StdConv2d(2, 4, 3, bias=True), nn.BatchNorm2d(4), (6, 2, 5, 5)),
        (weight_norm(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4), (6, 2, 5, 5)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_every_pair_is_exact_in_both_modes(layer, norm, shape):
    model = randomized(nn.Sequential(layer, nn.Identity(), norm, nn.ReLU()))
    x = torch.randn(shape).double()
    receipt, reference = check(model, x, ["0"])
    work = receipt.model
    torch.testing.assert_close(work[2].running_var, reference[2].running_var, rtol=1e-11, atol=1e-11)
    assert torch.equal(work[2].num_batches_tracked, reference[2].num_batches_tracked)
    assert receipt.edits["0"].what == "bias moved into the running mean of 2"
    assert repr(work[0]).count("bias=False") == 1
    # the running mean, of the values without the bias, starts lower by it and stays so
    torch.testing.assert_close(work[2].running_mean + model[0].bias.detach(), reference[2].running_mean)


def test_without_running_statistics_the_bias_is_dropped():
    model = randomized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))
    receipt, _ = check(model, torch.randn(3, 2, 5, 5).double(), ["0"])
    assert receipt.edits["0"].what == "bias dropped before 1"
    kept = randomized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)))
    kept[1].track_running_stats = False
    receipt, _ = check(kept, torch.randn(3, 2, 5, 5).double(), ["0"])
    assert receipt.edits["0"].what == "bias moved into the running mean of 1"


class Block(nn.Module):
    """A residual block and branches, as they are written by hand."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.skip = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.skip(x))


class Deep(nn.Module):
    def __init__(self, untraceable=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)
        self.untraceable = untraceable

    def forward(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            if self.untraceable and bool(x.sum() > 1e9):
                continue
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("untraceable", [False, True])
def test_data_flow_through_blocks_by_trace_or_by_a_run(untraceable):
    model = randomized(Deep(untraceable))
    x = torch.randn(3, 2, 6, 6).double()
    dropped = ["stem.0", *(f"blocks.{i}.{conv}" for i in range(2) for conv in ("conv1", "conv2"))]
    receipt, _ = check(model, x, dropped, steps=2)
    assert receipt.facts["order"].startswith("recorded on the inputs (no trace:" if untraceable else "torch.fx")
    alone = absorb_bias(model)
    assert list(alone.edits) == ([] if untraceable else dropped)
    assert alone.max_difference is None
    if untraceable:
        assert alone.facts["order"].startswith("not known; pass inputs (no trace:")


def test_the_original_is_untouched_and_undo_gives_the_biases_back():
    model = randomized(Deep())
    before = copy.deepcopy(model.state_dict())
    receipt = absorb_bias(model)
    assert len(receipt.edits) == 5
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    receipt.undo()
    torch.testing.assert_close(receipt.model.state_dict(), before, rtol=0, atol=0)
    assert [n for n, _ in receipt.model.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert "absorb_bias: 5 edited" in str(receipt)


def test_frozen_and_tied_biases_go_and_the_other_owner_keeps_its_own():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].bias = model[0].bias
    model[0].bias.requires_grad_(False)
    randomized(model)
    receipt = absorb_bias(model, torch.randn(3, 2, 4, 4).double())
    assert list(receipt.edits) == ["0"]
    assert receipt.max_difference < 1e-12
    assert torch.equal(receipt.model[2].bias, model[0].bias)


# ----------------------------------------------------------------------------------------------- where the bias matters


class Wired(nn.Module):
    """One convolution and one batch norm, and a forward that reads them in its own way."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), way
        self.kept = []

    def forward(self, x):
        return self.way(self, x)


def keeps(m, x):
    m.kept = m.conv(x)
    return m.norm(m.kept)


def keeps_in_a_list(m, x):
    y = m.conv(x)
    m.kept.append(y)
    return m.norm(y)


WAYS = {
    "added": lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),
    "returned": lambda m, x: (lambda y: (m.norm(y), y))(m.conv(x)),
    "written": lambda m, x: m.norm(m.conv(x).relu_()),
    "branch": lambda m, x: (lambda y: m.norm(y) * (y.mean() > 0))(m.conv(x)),
    "rare branch": lambda m, x: (lambda y: m.norm(y) * (y.mean() > -1e6))(m.conv(x)),
    "bias read": lambda m, x: m.norm(m.conv(x)) + m.conv.bias.sum(),
    "mean read": lambda m, x: m.norm(m.conv(x)) + m.norm.running_mean.sum(),
    "conv twice": lambda m, x: m.norm(m.conv(x)) + m.conv(x),
    "norm twice": lambda m, x: m.norm(m.norm(m.conv(x))),
    "kept": keeps,
    "kept in a list": keeps_in_a_list,
}


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_bias_that_somebody_else_sees_stays(way, traced):
    # the forward asks for a number, which no trace can give
    function = WAYS[way] if traced else lambda m, x: WAYS[way](m, x) if float(x.sum()) < 1e9 else x
    model = randomized(Wired(function)).eval()
    receipt = absorb_bias(model, torch.randn(3, 2, 4, 4).double())
    assert receipt.edits == {}
    assert receipt.max_difference == 0
    assert receipt.model.conv.bias is not None
    if way != "written":  # there the norm does not read the convolution's output at all
        assert list(receipt.skipped) == ["conv"]
    if traced:
        assert absorb_bias(model).edits == {}


def test_one_bad_pair_does_not_keep_the_others():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.good = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
            self.bad = Wired(WAYS["bias read"])

        def forward(self, x):
            return self.good(x), self.bad(x) if float(x.sum()) < 1e9 else x

    receipt = absorb_bias(randomized(Two()), torch.randn(3, 2, 4, 4).double())
    assert list(receipt.edits) == ["good.0"]
    assert receipt.skipped == {
        "bad.conv": "on the inputs it shows that its output, its bias or the running mean is read elsewhere"
    }


def test_only_in_training_somebody_reads_it():
    def way(m, x):
        y = m.conv(x)
        return m.norm(y) + (y if m.training else 0)

    for function in (way, lambda m, x: way(m, x) if float(x.sum()) < 1e9 else x):
        receipt = absorb_bias(randomized(Wired(function)).eval(), torch.randn(3, 2, 4, 4).double())
        assert receipt.edits == {}
        assert list(receipt.skipped) == ["conv"]
    assert list(absorb_bias(Wired(way)).skipped) == ["conv"]


def test_linear_layers_need_to_show_that_their_features_are_the_channels():
    model = randomized(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))
    receipt = absorb_bias(model)
    assert receipt.skipped == {
        "0": "its channels are those of the batch norm if that gets 2 axes, and nothing shows how many it gets; pass "
        "inputs that reach it"
    }
    # (N, C, L) with L = C: the norm's channels are axis 1, the linear layer's features axis 2
    receipt = absorb_bias(model, torch.randn(4, 5, 3).double())
    assert receipt.skipped == {"0": "its channels are those of the batch norm if that gets 2 axes, and it gets 3"}
    check(model, torch.randn(8, 3).double(), ["0"])
    unbatched = randomized(nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)))
    assert absorb_bias(unbatched, torch.randn(2, 4).double()).edits == {}


def test_other_norms_are_not_touched_and_not_named():
    for norm in (nn.GroupNorm(4, 4), nn.LayerNorm(3), nn.InstanceNorm2d(4), nw.EvoNormB0(4), nn.ReLU()):
        receipt = absorb_bias(nn.Sequential(nn.Conv2d(2, 4, 1), norm), torch.randn(2, 2, 3, 3))
        assert receipt.edits == receipt.skipped == {}


def test_hooks_unknown_classes_replaced_forwards_and_frozen_statistics():
    class MyNorm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + x

    class MyConv(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) ** 2

    def reason(change, conv=nn.Conv2d, norm=nn.BatchNorm2d):
        model = nn.Sequential(conv(2, 4, 1), norm(4))
        change(model)
        receipt = absorb_bias(model, torch.randn(3, 2, 3, 3))
        assert not receipt.edits
        return receipt.skipped["0"]

    assert "it has hooks" in reason(lambda m: m[0].register_forward_hook(lambda *a: None))
    assert "its batch norm has hooks" in reason(lambda m: m[1].register_forward_pre_hook(lambda *a: None))
    assert "MyNorm is a class whose forward is not known" in reason(lambda m: None, norm=MyNorm)
    assert "MyConv is a class whose forward is not known" in reason(lambda m: None, conv=MyConv)
    assert "its batch norm has its forward replaced" in reason(lambda m: setattr(m[1], "forward", m[1].forward))
    assert "are frozen, so that it acts and learns" in reason(lambda m: setattr(m[1], "nw_frozen", True))
    shared = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    receipt = absorb_bias(nn.Sequential(shared[0], shared[1], shared[0]), torch.randn(3, 2, 3, 3))
    assert receipt.skipped == {"0": "the layer or its batch norm is called more than once"}


def test_a_container_with_a_hook_that_sees_the_output():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 1)), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, args, output: None)
    assert list(absorb_bias(model).skipped) == ["0.0"]


def test_training_that_the_original_refuses_is_said_and_not_tried():
    model = randomized(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))
    receipt = absorb_bias(model, torch.randn(1, 2, 1, 1).double())
    assert list(receipt.edits) == ["0"]
    assert "the original raises ValueError" in receipt.facts["training"]
    assert receipt.max_difference < 1e-12


def test_wrapped_models_are_refused_and_half_precision_buffers_are_rounded_once():
    with pytest.raises(TypeError, match="absorb_bias works on plain modules"):
        absorb_bias(torch.compile(nn.Linear(2, 2), backend="eager"))
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).bfloat16()
    model[1].running_mean.normal_()
    work = absorb_bias(model).model
    exact = model[1].running_mean.double() - model[0].bias.detach().double()
    assert torch.equal(work[1].running_mean, exact.bfloat16())


def test_the_layers_of_a_published_network():
    model = randomized(make_layers([8, "M", 16, "M", 32, 32, "M"], batch_norm=True))  # as VGG's, but few
    receipt, _ = check(model, torch.randn(3, 3, 32, 32).double(), ["0", "4", "8", "11"])
    assert receipt.facts["order"] == "torch.fx"
    assert list(absorb_bias(model).edits) == ["0", "4", "8", "11"]
