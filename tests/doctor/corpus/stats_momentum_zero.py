"""With momentum 0 the running statistics stay 0 and 1 however long the model trains.

Modelled on Cadene/pretrained-models.pytorch issue 5, "BatchNorm momentum set to 0 in Inception models",
https://github.com/Cadene/pretrained-models.pytorch/issues/5
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
