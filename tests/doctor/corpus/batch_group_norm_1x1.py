"""A group norm with as many groups as channels on pooled features has one value a group and returns its bias.

Modelled on pytorch/pytorch issue 19250, "InstanceNorm, GroupNorm doesn't crash with # of elements == 1",
https://github.com/pytorch/pytorch/issues/19250
"""

from torch import nn

from .common import examined, images

CODES = {"NW201", "NW207"}


def program(groups):
    x, y = images()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 16), nn.GroupNorm(groups, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip
    return examined(model, x, y)


def buggy():
    return program(16)


def fixed():
    return program(2)
