"""A momentum copied from a long run is so small that a short run never leaves the initial statistics.

Modelled on pytorch/examples issue 289, "batchnorm momentum convention",
https://github.com/pytorch/examples/issues/289
"""

from torch import nn

from .common import blobs, examined, fit, loader, mlp

CODES = {"NW101", "NW106"}


def program(momentum):
    x, y = blobs()
    model = fit(mlp(norm=lambda c: nn.BatchNorm1d(c, momentum=momentum)), x, y, steps=120)
    return examined(model, x, y, loader=loader(x, y))


def buggy():
    return program(0.001)


def fixed():
    return program(0.1)
