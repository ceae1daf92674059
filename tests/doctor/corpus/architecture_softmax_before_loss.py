"""The model ends in softmax and is trained by cross_entropy, which applies log-softmax to what it gets.

Modelled on opendataval/opendataval issue 25, "no need to have sigmoid function if to use cross_entropy",
https://github.com/opendataval/opendataval/issues/25
"""

from torch import nn

from .common import cnn, examined, fit, images

CODES = {"NW707"}


def program(softmax):
    x, y = images()
    model = cnn()
    if softmax:
        model.append(nn.Softmax(dim=1))
    return examined(fit(model, x, y), x, y)


def buggy():
    return program(True)


def fixed():
    return program(False)
