"""accelerate against the model it copied: the same outputs, gradients, statistics; nothing of the original moved."""

import copy
import io
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwright as nw
from normwright.layers import twins
from normwright.surgery.accelerate import accelerate


class BasicBlock(nn.Module):
    """torchvision's, without its options."""

    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out  # noqa: RET504 - as torchvision writes it


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block, layers, width=4, classes=5):
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        for i, count in enumerate(layers):
            setattr(self, f"layer{i + 1}", self._layer(block, width << i, count, 1 if i == 0 else 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, classes)

    def _layer(self, block, planes, count, stride):
        down = None
        out = planes * block.expansion
        if stride != 1 or self.inplanes != out:
            down = nn.Sequential(nn.Conv2d(self.inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        blocks = [block(self.inplanes, planes, stride, down)]
        self.inplanes = out
        return nn.Sequential(*blocks, *(block(out, planes) for _ in range(1, count)))

    def _forward_impl(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward(self, x):
        return self._forward_impl(x)


def resnet18(**kwargs):
    return randomized(ResNet(BasicBlock, [2, 2, 2, 2], **kwargs))


def randomized(model):
    """Parameters and running statistics away from 1 and 0, so that a dropped one shows."""
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
        for name, tensor in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor.add_(torch.rand_like(tensor))
    return model


def step(model, *inputs, training=True):
    """Output, gradients of inputs and parameters, and buffers after one step; the buffers are put back."""
    for module in model.modules():
        module.training = training
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    rng = torch.get_rng_state()
    out = model(*inputs)
    torch.set_rng_state(rng)
    wanted = [t for t in (*inputs, *model.parameters()) if t.requires_grad]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view(out.shape)
    gradients = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
    after = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    return [out.detach()], [g for g in gradients if g is not None], after


def assert_same(original, fast, *inputs, tol=1e-9, modes=(True, False)):
    """Both models compute the same: largest error at most `tol` of each tensor's largest value."""
    for training in modes:
        for what, a, b in zip(
            ("output", "gradient", "buffer"),
            step(original, *inputs, training=training),
            step(fast, *inputs, training=training),
            strict=True,
        ):
            assert len(a) == len(b)
            largest = max((float(t.double().abs().max()) for t in a), default=0.0)
            for i, (want, got) in enumerate(zip(a, b, strict=True)):
                assert got.dtype == want.dtype
                assert got.shape == want.shape
                # a gradient that cancels to nothing is as exact as the gradients around it
                scale = max(float(want.double().abs().max()), 1e-3 * largest)
                error = float((got.double() - want.double()).abs().max())
                assert error <= tol * scale, f"{what} {i}, training {training}: off by {error:.3g} of {scale:.3g}"


@pytest.fixture
def calls(monkeypatch):
    """The (act, residual given) of every normalization that a twin does."""
    seen = []
    real = twins.normalize

    def spy(x, spec, *args, **kwargs):
        seen.append((kwargs.get("act"), kwargs.get("residual") is not None))
        return real(x, spec, *args, **kwargs)

    monkeypatch.setattr(twins, "normalize", spy)
    monkeypatch.setattr(twins, "at_once", lambda *_: False)  # small inputs too
    return seen


def fused(seen):
    return sum(act is not None for act, _ in seen), sum(residual for _, residual in seen)


# ------------------------------------------------------------------------------------------------ whole networks


def test_resnet18_counts_and_equality(calls):
    model, x = resnet18().double(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    receipt = accelerate(model, x)
    assert receipt.facts["norms"] == len(receipt.edits) == 20
    assert (receipt.facts["activations fused"], receipt.facts["residuals fused"]) == (17, 8)
    assert receipt.skipped == {}
    assert receipt.edits["bn1"].what == "BatchNorm2d → nw.BatchNorm2d + relu"
    assert receipt.edits["layer1.0.bn2"].what == "BatchNorm2d → nw.BatchNorm2d + residual + relu"
    assert receipt.edits["layer2.0.downsample.1"].what == "BatchNorm2d → nw.BatchNorm2d"
    assert receipt.max_difference < 1e-9
    assert "17" in str(receipt)
    calls.clear()
    receipt.model(x)
    assert len(calls) == 20
    assert fused(calls) == (17, 8)
    assert_same(model, receipt.model, x)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-3), (torch.bfloat16, 0.15)])
def test_bottleneck_in_lower_precision(dtype, tol):
    model = randomized(ResNet(Bottleneck, [1, 1, 1, 1])).to(dtype)
    receipt = accelerate(model)
    assert (len(receipt.edits), receipt.facts["activations fused"], receipt.facts["residuals fused"]) == (17, 13, 4)
    assert_same(model, receipt.model, torch.randn(8, 3, 16, 16).to(dtype), tol=tol, modes=(False,))
    x = torch.randn(8, 3, 16, 16).to(dtype)
    # in training, rounding is amplified from layer to layer, and both are only as good as the type
    largest = (step(model, x)[0][0].double() - step(receipt.model, x)[0][0].double()).abs().max()
    assert float(largest) <= tol * float(step(model, x)[0][0].double().abs().max())


def test_channels_last():
    model = resnet18().double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert_same(model, accelerate(model).model, x)


TORCHVISION = [("resnet18", 20, 17, 8), ("resnet50", 53, 49, 16), ("vgg11_bn", 8, 8, 0)]
TIMM = [
    ("resnet18", 20, 17, 8, 32),
    ("efficientnet_b0", 49, 33, 0, 32),
    ("mobilenetv3_small_100", 34, 5, 0, 32),
    ("convnext_atto", 17, 0, 0, 32),
    ("vit_tiny_patch16_224", 25, 0, 0, 224),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norms", "acts", "residuals"), TORCHVISION)
def test_torchvision(name, norms, acts, residuals):
    models = pytest.importorskip("torchvision.models")
    model = randomized(getattr(models, name)(num_classes=3)).double().eval()
    receipt = accelerate(model)
    facts = receipt.facts
    assert (facts["norms"], facts["activations fused"], facts["residuals fused"]) == (norms, acts, residuals)
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(receipt.model(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norms", "acts", "residuals", "size"), TIMM)
def test_timm(name, norms, acts, residuals, size):
    timm = pytest.importorskip("timm")
    model = randomized(timm.create_model(name, num_classes=3)).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    receipt = accelerate(model)
    facts = receipt.facts
    assert (facts["norms"], facts["activations fused"], facts["residuals fused"]) == (norms, acts, residuals)
    assert receipt.skipped == {}
    assert list(receipt.model.state_dict()) == list(model.state_dict())
    assert [type(m).__name__ for m in pickle.loads(pickle.dumps(receipt.model)).modules()] == [
        type(m).__name__ for m in receipt.model.modules()
    ]
    assert_same(model, receipt.model, x, tol=1e-7)


def test_batch_norm_act_of_timm(calls):
    layers = pytest.importorskip("timm.layers")
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    for act, name in ((nn.ReLU, "relu"), (nn.SiLU, "silu"), ("gelu", "gelu"), (nn.Hardswish, None)):
        model = nn.ModuleDict({"norm": randomized(layers.BatchNormAct2d(6, act_layer=act).double())})
        receipt = accelerate(model)
        norm = receipt.model["norm"]
        assert isinstance(norm, layers.BatchNormAct2d)
        assert receipt.edits["norm"].what == f"BatchNormAct2d → nw.BatchNorm2d{f' + {name}' if name else ''}"
        calls.clear()
        norm(x)
        assert calls == [(name, False)]
        assert_same(model["norm"], norm, x)
        # somebody who watches the activation sees it work
        seen = []
        norm.act.register_forward_pre_hook(lambda module, args, seen=seen: seen.append((args[0].min() < 0).item()))
        torch.testing.assert_close(norm.eval()(x), model["norm"].eval()(x), rtol=1e-9, atol=1e-9)
        assert seen == [True]
    dropping = accelerate(layers.BatchNormAct2d(6, drop_layer=nn.Dropout)).model
    calls.clear()
    assert (dropping(torch.randn(4, 6, 5, 5)) == 0).double().mean() > 0.6
    assert calls == [(None, False)]


def test_transformer_encoder_and_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
    model = randomized(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8))).double()
    receipt = accelerate(model)
    assert receipt.facts["norms"] == 5
    assert receipt.skipped == {}
    assert type(receipt.model.layers[1].norm2) is nw.LayerNorm
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert_same(model, receipt.model, x)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model.eval()
    receipt.model.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="nested tensors"):  # torch's own remark on its fast path
        want, got = (side(x, src_key_padding_mask=padding) for side in (model, receipt.model))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class Llama(nn.Module):
    """A decoder layer's skeleton: pre-norm RMSNorm, a gated unit, a branch on an argument."""

    def __init__(self, d=8):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.gate, self.up, self.down = nn.Linear(d, 16), nn.Linear(d, 16), nn.Linear(16, d)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(self.input_layernorm(x)).chunk(3, -1)
        if mask is not None:
            k = k * mask[..., None]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        h = self.post_attention_layernorm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def test_llama_like():
    model = randomized(nn.ModuleList([Llama().double()]))
    receipt = accelerate(model)
    assert type(receipt.model[0].input_layernorm) is nw.RMSNorm
    assert receipt.facts["norms"] == 2
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert_same(model[0], receipt.model[0], x)
    assert_same(model[0], receipt.model[0], x, torch.rand(2, 5, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of other people's imports
def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=11, **size))
    model = randomized(model).double().eval()
    inputs = {"input_ids": torch.randint(0, 11, (2, 7))}
    receipt = accelerate(model, inputs)
    assert receipt.facts["norms"] == 5
    assert type(receipt.model.encoder.layer[0].output.LayerNorm) is nw.LayerNorm
    assert receipt.facts["evaluation, at most"] < 1e-9
    llama = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=11, **size))
    receipt = accelerate(llama, inputs)
    assert receipt.max_difference == 0  # its own RMSNorm is no torch class


# ------------------------------------------------------------------------------------------------ what joins, what not


class Block(nn.Module):
    """A convolution, a norm and whatever `tail` does with its output and the block's input."""

    def __init__(self, tail, **modules):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.register_buffer("steps", torch.zeros(()))
        self.flag, self.rate, self.log = True, 0.5, []
        self.tail = tail

    def forward(self, x):
        return TAILS[self.tail](self, x, self.bn(self.conv(x)))


def _inplace(y, x):
    y += x
    return torch.relu_(y)


def _into_identity(y, x):
    x = x * 1
    x += y
    return F.relu(x)


def _seen_changed(y, x):
    x = x * 1
    z = x
    x += 1
    x *= 2
    return F.relu(y) + z


def _write(y, self, x):
    self.seen = 1
    return F.relu(y)


def _append(y, self):
    self.log.append(1)
    return F.relu(y)


def _switched(y):
    with torch.no_grad():
        z = y * 2
    return F.relu(y) + z


TAILS = {
    # joined: (activation, residual)
    "module": lambda s, x, y: s.act(y),
    "F.relu": lambda s, x, y: F.relu(y, inplace=True),
    "torch.relu": lambda s, x, y: torch.relu(y),
    "method": lambda s, x, y: y.relu(),
    "method_": lambda s, x, y: y.tanh_(),
    "sigmoid": lambda s, x, y: torch.sigmoid(input=y),
    "silu": lambda s, x, y: F.silu(y),
    "gelu": lambda s, x, y: F.gelu(y, approximate="none"),
    "leaky": lambda s, x, y: F.leaky_relu(y),
    "add relu": lambda s, x, y: F.relu(x + y),
    "torch.add": lambda s, x, y: torch.add(y, x).relu(),
    "iadd": lambda s, x, y: _inplace(y, x),
    "add_": lambda s, x, y: s.act(y.add_(x)),
    "add": lambda s, x, y: y + x,
    "identity add identity act": lambda s, x, y: s.act(s.drop(s.drop2(y) + s.down(x))),
    "flag": lambda s, x, y: F.relu(y) if s.flag else y,
    "twice": lambda s, x, y: s.act(s.conv(s.act(y))),
    # not joined
    "two users": lambda s, x, y: F.relu(y) + y.mean(),
    "twice the norm": lambda s, x, y: F.relu(s.bn(y)),
    "itself": lambda s, x, y: F.relu(y + y),
    "into identity": lambda s, x, y: _into_identity(y, x),
    "others see it change": lambda s, x, y: _seen_changed(y, x),
    "alpha": lambda s, x, y: torch.add(y, x, alpha=2).relu(),
    "number": lambda s, x, y: F.relu(y + 1),
    "slope": lambda s, x, y: F.leaky_relu(y, 0.2),
    "approximate": lambda s, x, y: F.gelu(y, approximate="tanh"),
    # forward kept
    "dropout": lambda s, x, y: F.dropout(F.relu(y), 0.0, training=s.training),
    "child's mode": lambda s, x, y: F.relu(y) * (2 if s.act.training else 1),
    "value": lambda s, x, y: F.relu(y) if y.sum() > 1e9 else y,
    "isinstance": lambda s, x, y: F.relu(y) if isinstance(y, Tensor) else y,
    "random": lambda s, x, y: F.relu(y) if random.random() < 2 else y,
    "noise": lambda s, x, y: F.relu(y) + 0 * torch.rand(1, dtype=torch.float64),
    "grad mode": lambda s, x, y: F.relu(y) if torch.is_grad_enabled() else y.relu() * 1,
    "no_grad": lambda s, x, y: _switched(y),
    "constant": lambda s, x, y: F.relu(y) + torch.ones(1, dtype=torch.float64),
    "writes": lambda s, x, y: _write(y, s, x),
    "appends": lambda s, x, y: _append(y, s),
}
JOINED = {
    "module": "silu",
    "F.relu": "relu",
    "torch.relu": "relu",
    "method": "relu",
    "method_": "tanh",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "gelu": "gelu",
    "leaky": "leaky_relu",
    "add relu": "residual + relu",
    "torch.add": "residual + relu",
    "iadd": "residual + relu",
    "add_": "residual + silu",
    "add": "residual",
    "identity add identity act": "residual + silu",
    "flag": "relu",
    "twice": "silu",
    "others see it change": "relu",
}
KEPT = {
    "dropout": "self.training",
    "child's mode": "training",
    "value": "cannot trace",
    "isinstance": "asks for the type",
    "random": "random numbers",
    "noise": "random numbers",
    "grad mode": "gradients",
    "no_grad": "switches gradients",
    "constant": "makes a tensor",
    "writes": "sets self.seen",
    "appends": "self.log, a list",
}


def block(tail):
    extra = {"drop": nn.Identity(), "drop2": nn.Identity(), "down": nn.Conv2d(4, 4, 1)}
    return randomized(Block(tail, act=nn.SiLU(), **extra)).double()


X = torch.linspace(-2, 2, 2 * 4 * 5 * 5, dtype=torch.float64).sin().view(2, 4, 5, 5)


@pytest.mark.parametrize("tail", TAILS)
def test_what_joins(tail, calls):
    model = block(tail)
    receipt = accelerate(model, X)
    what, skipped = receipt.edits["bn"].what, receipt.skipped.get("", "")
    calls.clear()
    receipt.model(X)
    if tail in JOINED:
        assert what == f"BatchNorm2d → nw.BatchNorm2d + {JOINED[tail]}"
        act = JOINED[tail].removeprefix("residual").removeprefix(" + ") or None
        assert calls == [(act, "residual" in JOINED[tail])]
    else:
        assert what == "BatchNorm2d → nw.BatchNorm2d"
        assert fused(calls) == (0, 0)
    assert KEPT.get(tail, "") in skipped
    assert bool(skipped) == (tail in KEPT)
    assert receipt.max_difference < 1e-12
    assert_same(model, receipt.model, X)
    assert model.log == ([] if tail != "appends" else model.log)
    if tail == "writes":
        assert receipt.model.seen == 1  # by the runs above, not by tracing


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.LeakyReLU(0.2), None),
        (nn.ReLU6(), None),
        (nn.GELU(approximate="tanh"), None),
        (nn.Softplus(), None),
    ],
)
def test_sequential(act, name, calls):
    norms = [nn.BatchNorm1d(8), nn.LayerNorm(6), nn.GroupNorm(2, 8), nn.InstanceNorm1d(8, affine=True), nn.RMSNorm(6)]
    for norm in norms:
        model = randomized(
            nn.Sequential(nn.Conv1d(3, 8, 1), norm, nn.Identity(), act, nn.Conv1d(8, 8, 1), act)
        ).double()
        receipt = accelerate(model)
        assert receipt.facts["activations fused"] == (name is not None)
        x = torch.randn(4, 3, 6, dtype=torch.float64)
        calls.clear()
        receipt.model(x)
        assert calls == [(name, False)]
        assert_same(model, receipt.model, x)


def test_norm_into_norm_and_two_norms_added(calls):
    class Rep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: "Tensor") -> "Tensor":
            return F.relu(self.b(self.a(x)) + self.c(x))

    model = randomized(Rep()).double()
    receipt = accelerate(model)
    assert [edit.what.partition("d + ")[2] for edit in receipt.edits.values()] == ["", "", "residual + relu"]
    assert_same(model, receipt.model, X)


def test_a_norm_does_not_wait_for_someone_who_writes_into_its_input():
    class Late(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.bn, self.change = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            if conv:
                self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = x * 1
            y = self.bn(self.conv(x) if hasattr(self, "conv") else x)
            return y + self.change(x)

    for conv, joined in ((False, 0), (True, 1)):
        model = Late(conv).double()
        receipt = accelerate(model, X)
        assert receipt.facts["residuals fused"] == joined
        assert receipt.max_difference < 1e-12


def test_children_that_are_called_in_order_by_a_list():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.relu(norm(conv(x)))
            return x

    model = randomized(Stages()).double()
    receipt = accelerate(model)
    assert receipt.facts["activations fused"] == 3
    assert_same(model, receipt.model, X)


# ------------------------------------------------------------------------------------------------ looks before it runs


def same_output(model, fast, x=X):
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x), model.eval()(x), rtol=1e-10, atol=1e-10)


def test_hooks_see_what_they_see_in_the_original(calls):
    model = block("add relu")
    fast = accelerate(model).model
    seen = []
    handle = fast.bn.register_forward_hook(lambda module, args, out: seen.append(out))
    same_output(model, fast)
    assert len(seen) == 1
    assert float(seen[0].min()) < 0  # before the activation
    torch.testing.assert_close(seen[0], model.bn.eval()(model.conv(X)), rtol=1e-10, atol=1e-10)
    handle.remove()
    calls.clear()
    same_output(model, fast)
    assert calls == [("relu", True)]
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    fast(X)
    everywhere.remove()
    assert nw.BatchNorm2d in seen


def test_hooks_that_were_there_are_kept_and_nothing_joins_them():
    model = block("module")
    seen = []
    model.act.register_forward_hook(lambda *args: seen.append("act"))
    model.bn.register_forward_pre_hook(lambda *args: seen.append("bn"))
    receipt = accelerate(model)
    assert receipt.facts["activations fused"] == 0
    receipt.model(X)
    assert seen == ["bn", "act"]
    sequential = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).double()
    sequential[1].register_forward_hook(lambda *args: seen.append("relu"))
    receipt = accelerate(sequential)
    receipt.model(X)
    assert receipt.facts["activations fused"] == 0
    assert seen[-1] == "relu"


class Recorder:
    def __init__(self):
        self.count = 0

    def __call__(self, *args):
        self.count += 1


def test_a_hook_is_the_same_object_and_a_method_is_bound_to_the_copy():
    class Counting(nn.Sequential):
        count = 0

        def seen(self, *args):
            self.count += 1

    recorder = Recorder()
    model = Counting(nn.BatchNorm2d(4), nn.ReLU()).double()
    model.register_forward_hook(recorder)
    model[0].register_forward_hook(model.seen)
    fast = accelerate(model).model
    fast(X)
    assert (recorder.count, fast.count, model.count) == (1, 1, 0)


def test_parts_swapped_afterwards():
    model = block("module")
    fast = accelerate(model).model
    for act in (nn.Identity(), nn.Softplus(), nn.GELU()):
        model.act = fast.act = act
        same_output(model, fast)
    model.bn = fast.bn = nn.Identity()
    same_output(model, fast)
    model = block("F.relu")
    fast = nn.SyncBatchNorm.convert_sync_batchnorm(accelerate(model).model)
    assert type(fast.bn) is nn.SyncBatchNorm
    same_output(model, fast)
    model = block("F.relu")
    fast = accelerate(model).model
    fast.bn.act = "tanh"  # before the ReLU that was joined, not in its place
    same_output(nn.Sequential(model.conv, model.bn, nn.Tanh(), nn.ReLU()), fast)
    model = block("identity add identity act")
    fast = accelerate(model).model
    model.drop = fast.drop = nn.Hardtanh()
    same_output(model, fast)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).double()
    fast = accelerate(model).model
    model[1] = fast[1] = nn.Hardtanh()
    same_output(model, fast)


def test_an_attribute_that_the_forward_read_changes(calls):
    model = block("flag")
    fast = accelerate(model).model
    model.flag = fast.flag = False
    calls.clear()
    same_output(model, fast)
    assert fused(calls) == (0, 0)
    fast.flag = 1  # equal to True and not it
    fast(X)
    assert fused(calls) == (0, 0)
    fast.flag = True
    fast(X)
    assert fused(calls) == (1, 0)


def test_a_residual_that_is_broadcast_or_wider(calls):
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x, other):
            return F.relu(self.bn(x) + other)

    model = randomized(Add()).double()
    fast = accelerate(model).model
    assert_same(model, fast, X, X.flip(0))
    for other in (X[:, :, :1, :1], X[0]):
        assert_same(model, fast, X, other)
    single = accelerate(model.float()).model
    calls.clear()
    out = single.eval()(X.float(), X)
    assert out.dtype == torch.float64 == model(X.float(), X).dtype
    assert fused(calls) == (0, 0)
    with torch.no_grad():
        torch.testing.assert_close(single(x=X.float(), other=X.float()), model.eval()(X.float(), X.float()))


def test_optional_arguments_get_the_original_forward():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x, scale=None):
            y = F.relu(self.bn(x))
            return y if scale is None else y * scale

    model = randomized(Scaled()).double()
    receipt = accelerate(model)
    assert receipt.facts["activations fused"] == 1
    for args in ((X,), (X, 2.0), (X, None)):
        torch.testing.assert_close(receipt.model.eval()(*args), model.eval()(*args), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(receipt.model(X, scale=3.0), model(X, scale=3.0), rtol=1e-10, atol=1e-10)


def test_a_required_argument_that_is_no_tensor_gets_the_original_forward():
    class Maybe(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x, scale):
            y = F.relu(self.bn(x))
            return y if scale is None else y * scale

    model = randomized(Maybe()).double()
    receipt = accelerate(model)
    assert receipt.facts["activations fused"] == 1
    for scale in (X, 2.0, None):
        torch.testing.assert_close(receipt.model.eval()(X, scale), model.eval()(X, scale), rtol=1e-10, atol=1e-10)


def test_children_taken_out_stay_what_they_are():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()).double()
    fast = accelerate(model).model
    same_output(model[:2], fast[:2])
    same_output(nn.Sequential(*model.children()), nn.Sequential(*fast.children()))
    same_output(model[1], fast[1])
    fast.append(nn.ReLU())
    same_output(nn.Sequential(*model, nn.ReLU()), fast)


# ------------------------------------------------------------------------------------------------ the copy


def test_shares_tensors_and_keeps_everything_else():
    model = resnet18()
    model.note = {"made": "by hand"}
    model.layer1.eval()
    model.bn1.extra = 3
    model.fc.weight.requires_grad_(False)
    keys = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    receipt = accelerate(model, torch.randn(2, 3, 8, 8))
    fast = receipt.model
    assert fast is not model
    assert [type(module) for module in model.modules()] == classes
    assert list(fast.state_dict()) == keys
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    for a, b in zip(model.named_parameters(), fast.named_parameters(), strict=True):
        assert a[0] == b[0]
        assert a[1] is b[1]
    for a, b in zip(model.named_buffers(), fast.named_buffers(), strict=True):
        assert a[0] == b[0]
        assert a[1] is b[1]
    assert [m.training for m in fast.modules()] == [m.training for m in model.modules()]
    assert fast.bn1.extra == 3
    assert fast.note == model.note
    assert fast.note is not model.note
    assert isinstance(fast.layer1[0], BasicBlock)
    assert type(fast.layer1[0]).__name__ == "BasicBlock"
    fast.load_state_dict(model.state_dict())


def test_an_optimizer_of_the_original_trains_the_copy():
    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = accelerate(model).model
    before = copy.deepcopy(model.state_dict())
    fast(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in after if "num_batches" in key or "weight" in key)


def test_undo_gives_the_copy_its_structure_back(calls):
    model = resnet18().double()
    receipt = accelerate(model)
    receipt.undo()
    calls.clear()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert [type(m) for m in receipt.model.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(receipt.model(x), model(x))
    assert calls == []
    with pytest.raises(RuntimeError, match="undone once"):
        receipt.undo()


def test_pickle_deepcopy_save(calls):
    model = resnet18().double()
    fast = accelerate(model).model.eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for again in (
        copy.deepcopy(fast),
        *(pickle.loads(pickle.dumps(fast, protocol)) for protocol in (0, 2, 5)),
        torch.load(file, weights_only=False),
    ):
        calls.clear()
        assert torch.equal(again(x), fast(x))
        assert fused(calls) == (34, 16)
        assert type(again.layer1[0]) is type(fast.layer1[0])
        assert again.layer1[0].bn1.weight is not fast.layer1[0].bn1.weight
        assert not again.training


def test_accelerated_again():
    model = resnet18().double()
    once = accelerate(model).model
    again = accelerate(once)
    assert again.facts["norms"] == 0
    assert_same(model, again.model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    # twins that are there already are joined too
    twin = nn.Sequential(nw.BatchNorm2d(4), nn.ReLU(), nw.BatchNorm2d(4, act="tanh"), nn.ReLU()).double()
    receipt = accelerate(twin)
    assert {name: edit.what for name, edit in receipt.edits.items()} == {"0": "nw.BatchNorm2d + relu"}
    assert_same(twin, receipt.model, X)


def test_compile_export_script_trace():
    model = nn.Sequential(block("add relu"), nn.Sequential(nn.BatchNorm2d(4), nn.SiLU())).double().eval()
    fast = accelerate(model).model.eval()
    want = model(X)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), want, rtol=1e-10, atol=1e-10)
    exported = torch.export.export(fast, (X,)).module()
    torch.testing.assert_close(exported(X), want, rtol=1e-10, atol=1e-10)


def test_script_gets_torch_modules():
    model = resnet18().eval()
    fast = accelerate(model).model
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(fast)
    torch.testing.assert_close(scripted(x), model(x))


def test_functional_transforms():
    model = block("add relu")
    fast = accelerate(model).model.eval()
    parameters = dict(fast.named_parameters())
    out = torch.func.functional_call(fast, {k: v * 2 for k, v in parameters.items()}, (X,))
    want = torch.func.functional_call(model.eval(), {k: v * 2 for k, v in parameters.items()}, (X,))
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.func.vmap(fast)(X[:, None]), torch.func.vmap(model)(X[:, None]), rtol=1e-10, atol=1e-10
    )


# ------------------------------------------------------------------------------------------------ left alone, refused


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_skipped_by_name():
    model = nn.ModuleDict(
        {
            "own": Own(4),
            "sync": nn.SyncBatchNorm(4),
            "lazy": nn.LazyBatchNorm2d(),
            "patched": nn.LayerNorm(4),
            "fine": nn.LayerNorm(4),
        }
    )
    model["patched"].forward = lambda x: x
    receipt = accelerate(model)
    assert list(receipt.edits) == ["fine"]
    assert "test_accelerate.Own is a subclass" in receipt.skipped["own"]
    assert "between processes" in receipt.skipped["sync"]
    assert "run the model once" in receipt.skipped["lazy"]
    assert "replaced on the instance" in receipt.skipped["patched"]
    assert type(receipt.model["own"]) is Own


def test_a_shared_norm_is_one_edit():
    norm = nn.BatchNorm2d(4)
    model = nn.ModuleList([nn.Sequential(norm, nn.ReLU()), nn.Sequential(norm, nn.Tanh())]).double()
    receipt = accelerate(model)
    assert list(receipt.edits) == ["0.0"]
    assert receipt.edits["0.0"].also == ("1.0",)
    for a, b in zip(model, receipt.model, strict=True):
        assert_same(a, b, X)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_refused(wrap):
    with pytest.raises(TypeError, match="accelerate works on plain modules"):
        accelerate(nn.Sequential(wrap(nn.BatchNorm2d(4))))


def test_an_exception_leaves_the_original_untouched():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)
            self.broken = False

        def forward(self, x):
            if self.broken:
                raise RuntimeError("no forward today")
            return F.relu(self.bn(x))

    model = nn.Sequential(Bad(), nn.BatchNorm2d(4))
    model[0].broken = True
    receipt = accelerate(model)
    assert "no forward today" in receipt.skipped["0"]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="no forward today"):
        accelerate(model, X.float())
    assert [type(m) for m in model.modules()] == classes
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert "__getattribute__" not in vars(nn.Module)


# ------------------------------------------------------------------------------------------------ what it measures


def test_measures_both_modes_and_moves_nothing():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng, draws, numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    x = X.float()
    given = x.clone()
    receipt = accelerate(model, (x, "label"))
    assert receipt.facts["training, at most"] < 1e-5  # the same dropout in both
    assert receipt.max_difference == max(receipt.facts["training, at most"], receipt.facts["evaluation, at most"])
    assert receipt.rms_difference <= receipt.max_difference
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == draws
    assert np.random.get_state()[1].tolist() == numbers  # noqa: NPY002
    assert torch.equal(x, given)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_difference_is_that_of_the_outputs(monkeypatch):
    import sys

    from normwright.surgery import accelerate as operation  # noqa: F401

    module = sys.modules["normwright.surgery.accelerate"]
    monkeypatch.setattr(module, "_apply", lambda norm, twin, act, x, residual=None: torch.zeros_like(x))
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    receipt = accelerate(model, X)
    assert receipt.facts["evaluation, at most"] == pytest.approx(model(X).max().item(), abs=1e-12)
    assert receipt.facts["evaluation, rms"] == pytest.approx(model(X).square().mean().sqrt().item(), abs=1e-12)


def test_training_mode_that_the_original_refuses():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    receipt = accelerate(model, torch.randn(1, 4))
    assert "not compared, the original raises ValueError" in receipt.facts["training"]
    assert receipt.max_difference == 0
