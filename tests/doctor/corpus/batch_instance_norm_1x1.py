"""Instance norm after the map has shrunk to one pixel subtracts each value from itself: the output is zero.

Modelled on pytorch/pytorch issue 45687, "nn.InstanceNorm behavior is not consistent with batch size for corner case of
inputs with spatial dimension = 1", https://github.com/pytorch/pytorch/issues/45687
"""

from torch import nn

from .common import examined, images

CODES = {"NW201", "NW207"}


def program(size):
    x, y = images(size=size)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.InstanceNorm2d(16, affine=True), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.InstanceNorm2d(16, affine=True), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return examined(model, x, y)


def buggy():
    return program(8)


def fixed():
    return program(32)
