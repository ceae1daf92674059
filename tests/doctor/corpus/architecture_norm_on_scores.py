"""A classifier's scores pass a last batch norm: what a picture scores depends on the pictures beside it.

Modelled on yaoing/DAN issue 14, "Why Batchnorm at the final network output?",
https://github.com/yaoing/DAN/issues/14
"""

from torch import nn

from .common import cnn, examined, fit, images

CODES = {"NW704"}


def program(norm):
    x, y = images()
    model = cnn()
    if norm:
        model[8] = nn.Linear(16, 3, bias=False)
        model.append(nn.BatchNorm1d(3))
    return examined(fit(model, x, y), x, y)


def buggy():
    return program(True)


def fixed():
    return program(False)
