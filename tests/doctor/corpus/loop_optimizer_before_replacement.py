"""Layers are replaced after the optimizer was made; it goes on training the parameters that nothing uses.

Modelled on microsoft/nni issue 4521, "The parameters are not updated when the pruned model is finetuned",
https://github.com/microsoft/nni/issues/4521
"""

from torch import nn

from .common import cnn, examined, fit, images, norm_free_decay

CODES = {"NW709"}


def program(again):
    x, y = images()
    model = fit(cnn(), x, y)
    optimizer = norm_free_decay(model)
    model[3], model[4], model[8] = nn.Conv2d(8, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 3)
    if again:
        optimizer = norm_free_decay(model)
    fit(model, x, y)
    return examined(model, x, y, optimizer=optimizer)


def buggy():
    return program(False)


def fixed():
    return program(True)
