"""fold, accelerate and convert-to-twin keep what timm's architectures compute, with random weights and statistics.

The truth is the network itself in float64. An operation may be off by rounding; how much that is, after this depth and
its cancellations, the network's own error in the same type says.
"""

import copy

import pytest
import torch
from torch import nn

from normwright.surgery import accelerate, convert, fold

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.slow

# the name; image size where it is not 64; how many of the batch norms do not fold
ARCHITECTURES = {
    "resnet10t": (64, 0),
    "resnet18": (64, 0),
    "resnetv2_50": (64, 17),  # the norm comes first: those behind an addition or a pooling stay
    "resnest14d": (64, 0),
    "res2net50_14w_8s": (64, 0),
    "skresnet18": (64, 0),
    "cspresnet50": (64, 0),
    "seresnext26d_32x4d": (64, 0),
    "regnetx_002": (64, 0),
    "regnety_002": (64, 0),
    "gernet_s": (64, 0),
    "densenet121": (64, 62),
    "dla46_c": (64, 0),
    "ese_vovnet19b_slim": (64, 0),
    "hrnet_w18_small": (64, 0),
    "selecsls42": (64, 0),
    "darknet17": (64, 0),
    "inception_v3": (96, 0),
    "mobilenetv2_050": (64, 0),
    "mobilenetv3_small_050": (64, 0),
    "mobilenetv4_conv_small": (64, 0),
    "efficientnet_b0": (64, 0),
    "efficientnet_lite0": (64, 0),
    "tf_efficientnet_b0": (64, 0),
    "mnasnet_050": (64, 0),
    "hardcorenas_a": (64, 0),
    "lcnet_050": (64, 0),
    "tinynet_e": (64, 0),
    "rexnet_100": (64, 0),
    "ghostnet_050": (64, 0),
    "mixnet_s": (64, 34),  # a concatenation of convolutions before the norm
    "repvgg_a0": (64, 17),  # a norm is a branch of its own
    "mobileone_s0": (64, 35),
    "starnet_s1": (64, 1),
    "convmixer_768_32": (32, 65),  # the activation comes before the norm
    "fastvit_t8": (64, 24),
    "levit_128s": (224, 46),  # a flatten between Linear and norm
    "efficientformer_l1": (224, 0),
    "mobilevit_xxs": (64, 0),
    "edgenext_xx_small": (64, 0),
    "convnext_atto": (64, 0),
    "convnextv2_atto": (64, 0),
    "vit_tiny_patch16_224": (64, 0),
    "deit_tiny_patch16_224": (64, 0),
    "mixer_s32_224": (64, 0),
    "poolformer_s12": (64, 0),
    "swin_tiny_patch4_window7_224": (112, 0),
}


def build(name, size):
    """The network in evaluation mode, its statistics and affine moved, and a head that is not zero."""
    try:
        model = timm.create_model(name, img_size=size)
    except TypeError:  # it has no fixed size
        model = timm.create_model(name)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


CASES = [(name, torch.float32) for name in ARCHITECTURES]
CASES += [(name, torch.bfloat16) for name in ("resnet18", "densenet121", "regnety_002", "mobilenetv3_small_050")]
CASES += [(name, torch.bfloat16) for name in ("tinynet_e", "mixnet_s", "levit_128s", "edgenext_xx_small")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_architecture(name, dtype):
    size, left = ARCHITECTURES[name]
    model, x = build(name, size).to(dtype), torch.randn(2, 3, size, size).to(dtype)
    norms = sum(getattr(module, "running_mean", None) is not None for module in model.modules())
    truth = copy.deepcopy(model).double()(x.double())
    scale = truth.abs().max()
    rounding = ((model(x) - truth).abs().max() / scale).item()
    # of the network's own rounding there is one sample, so that the operation's may be a few times larger
    limit = max(8 * rounding, 8 * torch.finfo(dtype).eps)

    receipts = {"fold": fold(model, x), "accelerate": accelerate(model), "twin": convert(model, "twin")}
    assert len(receipts["fold"].edits) == norms - left, receipts["fold"]
    assert len(receipts["twin"].edits) >= norms
    for operation, receipt in receipts.items():
        error = ((receipt.model(x) - truth).abs().max() / scale).item()
        assert error <= limit, f"{operation}: off by {error:.2g} of the largest output, the network by {rounding:.2g}"
