"""With momentum 0 the running statistics stay 0 and 1 however long the model trains.

Modelled on pytorch/pytorch issue 15298, "Momentum problem (1-momentum is correct?) in BatchNorm2d",
https://github.com/pytorch/pytorch/issues/15298
"""

from torch import nn

from .common import cnn, examined, fit, images

CODES = {"NW107", "NW102", "NW101"}


def program(momentum):
    x, y = images()
    return examined(fit(cnn(norm=lambda c: nn.BatchNorm2d(c, momentum=momentum)), x, y), x, y)


def buggy():
    return program(0.0)


def fixed():
    return program(0.1)
