"""convert_sync_batchnorm rebuilds a norm that carries its activation as a bare one: the activation is never called.

Modelled on huggingface/pytorch-image-models issue 1254, "[BUG] Broken SyncBatchNorm due to BatchNormAct2d",
https://github.com/huggingface/pytorch-image-models/issues/1254
"""

from torch import nn

from .common import examined, fit, images

CODES = {"NW510"}


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


def program(convert):
    x, y = images()
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), NormAct(8), nn.Conv2d(8, 16, 3, stride=2, bias=False), NormAct(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    model = fit(model, x, y)
    if convert:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return examined(model, x, y)


def buggy():
    return program(True)


def fixed():
    return program(False)
