"""A helper builds convolutions without bias whether or not a norm follows; where none does, nothing shifts.

Modelled on udacity/deep-learning-v2-pytorch issue 200, "Batch Normalization and Bias",
https://github.com/udacity/deep-learning-v2-pytorch/issues/200
"""

from torch import nn

from .common import images

CODES = {"NW702"}


def conv(inner, outer, batch_norm, bias):
    layers = [nn.Conv2d(inner, outer, 4, 2, 1, bias=bias)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(outer)] if batch_norm else []))


def program(bias_where_no_norm):
    x, _ = images(64, size=64)
    model = nn.Sequential(
        conv(1, 8, False, bias_where_no_norm), nn.LeakyReLU(0.2),
        conv(8, 16, True, False), nn.LeakyReLU(0.2), conv(16, 32, True, False), nn.LeakyReLU(0.2),
        conv(32, 32, True, False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(32 * 16, 1),
    )  # fmt: skip
    return {"model": model, "inputs": x}


def buggy():
    return program(False)


def fixed():
    return program(True)
