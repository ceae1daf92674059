"""The paper's group size is passed as the number of groups, and with as many channels each group is one channel.

Modelled on IAmSuyogJadhav/3d-mri-brain-tumor-segmentation-using-autoencoder-regularization issue 12, "about group norm
size", https://github.com/IAmSuyogJadhav/3d-mri-brain-tumor-segmentation-using-autoencoder-regularization/issues/12
"""

from torch import nn

from .common import examined, images

CODES = {"NW208"}


def program(groups):
    x, y = images(size=16)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(groups(8), 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.GroupNorm(groups(8), 8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return examined(model, x, y)


def buggy():
    return program(lambda channels: 8)


def fixed():
    return program(lambda channels: channels // 4)
