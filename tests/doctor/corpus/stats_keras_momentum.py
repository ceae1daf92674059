"""A momentum of 0.99 taken over from TensorFlow weighs the new batch by 0.99 in PyTorch.

Modelled on r9y9/tacotron_pytorch issue 19, "About BatchNorm",
https://github.com/r9y9/tacotron_pytorch/issues/19
"""

from torch import nn

from .common import blobs, examined, fit, mlp

CODES = {"NW108", "NW101"}


def program(momentum):
    x, y = blobs()
    model = fit(mlp(norm=lambda c: nn.BatchNorm1d(c, momentum=momentum)), x, y)
    return examined(model, x, y)


def buggy():
    return program(0.99)


def fixed():
    return program(0.01 * 10)
