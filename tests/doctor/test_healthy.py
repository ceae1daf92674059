"""Healthy models are met with silence: no error, no warning, nothing proved and nothing measured."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normwright as nw

pytestmark = pytest.mark.slow

# the name, and the image size where it is not 64
ARCHITECTURES = {
    "resnet10t": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnetv2_50": 64,
    "resnest14d": 64,
    "res2net50_14w_8s": 64,
    "skresnet18": 64,
    "cspresnet50": 64,
    "seresnext26d_32x4d": 64,
    "regnetx_002": 64,
    "regnety_002": 64,
    "gernet_s": 64,
    "densenet121": 64,
    "dla46_c": 64,
    "ese_vovnet19b_slim": 64,
    "hrnet_w18_small": 64,
    "selecsls42": 64,
    "darknet17": 64,
    "mobilenetv2_050": 64,
    "mobilenetv3_small_050": 64,
    "efficientnet_b0": 64,
    "efficientnet_lite0": 64,
    "mnasnet_050": 64,
    "hardcorenas_a": 64,
    "lcnet_050": 64,
    "tinynet_e": 64,
    "rexnet_100": 64,
    "ghostnet_050": 64,
    "mixnet_s": 64,
    "repvgg_a0": 64,
    "mobileone_s0": 64,
    "convmixer_768_32": 32,
    "fastvit_t8": 64,
    "mobilevit_xxs": 64,
    "edgenext_xx_small": 64,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "poolformer_s12": 64,
    "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224,
    "mixer_s32_224": 224,
    "xcit_nano_12_p16_224": 224,
}


def silent(model: nn.Module, inputs, dtype: torch.dtype, **given) -> None:
    """Diagnose with everything that a training run has, and expect nothing but advice."""
    model = model.to(dtype)
    report = nw.diagnose(
        model,
        inputs,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        **given,
    )
    loud = [f for f in report.findings if f.severity != "advice" or f.evidence != "advice"]
    assert not loud, "\n".join(f"{f.code} {f.evidence} {f.where[:2]}: {f.message}" for f in loud)
    raised = [(n.code, n.why) for n in report.not_run if "raised" in n.why]
    assert not raised


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timm(name):
    timm = pytest.importorskip("timm")
    size = ARCHITECTURES[name]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        batches = [(torch.randn(16, 3, size, size).to(dtype), torch.randint(0, 10, (16,))) for _ in range(2)]
        silent(
            timm.create_model(name, num_classes=10), batches[0][0], dtype,
            targets=batches[0][1], loss=lambda y, t: F.cross_entropy(y.float(), t), loader=batches,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def _torch_may_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")  # (L, N, D) is what the model is about
        yield


def transformer() -> tuple[nn.Module, tuple]:
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 32)
            self.transformer = nn.Transformer(32, 4, 2, 2, 64)  # (L, N, D)
            self.head = nn.Linear(32, 50)

        def forward(self, source, target):
            return self.head(self.transformer(self.embed(source), self.embed(target)))

    return Translator(), {"source": torch.randint(0, 50, (12, 16)), "target": torch.randint(0, 50, (9, 16))}


def lstm() -> tuple[nn.Module, tuple]:
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm = nn.Embedding(50, 24), nn.LSTM(24, 32, batch_first=True)
            self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 7)

        def forward(self, x):
            return self.head(self.norm(self.lstm(self.embed(x))[0]))

    return Tagger(), torch.randint(0, 50, (16, 20))


def generator() -> tuple[nn.Module, tuple]:
    layers = []
    for i, o in ((64, 64), (64, 32), (32, 16)):
        layers += [nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()), torch.randn(32, 64, 4, 4)


def discriminator() -> tuple[nn.Module, tuple]:
    layers = [nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for i, o in ((16, 32), (32, 64)):
        layers += [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(64, 1, 4)), torch.randn(32, 3, 32, 32)


def siamese() -> tuple[nn.Module, tuple]:
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Sequential(
                nn.Linear(20, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16, bias=True)
            )

        def forward(self, a, b):
            return F.cosine_similarity(self.tower(a), self.tower(b))

    return Siamese(), {"a": torch.randn(64, 20), "b": torch.randn(64, 20)}


def vae() -> tuple[nn.Module, tuple]:
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(40, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())
            self.mean, self.scale = nn.Linear(32, 4), nn.Linear(32, 4)
            self.decoder = nn.Sequential(nn.Linear(4, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 40))

        def forward(self, x):
            h = self.encoder(x)
            mean, scale = self.mean(h), self.scale(h)
            z = mean + torch.exp(0.5 * scale) * torch.randn_like(scale)
            return self.decoder(z), mean, scale

    return Autoencoder(), torch.randn(64, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [transformer, lstm, generator, discriminator, siamese, vae])
def test_others(make, dtype):
    torch.manual_seed(0)
    model, inputs = make()
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
        inputs = inputs.to(dtype)
    elif isinstance(inputs, dict):
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    silent(model, inputs, dtype)
