"""Validation reads running statistics that a handful of steps have not brought to the data.

Modelled on chemprop/chemprop issue 607, "[BUG] [v2]: training loss much lower than test and validation loss",
https://github.com/chemprop/chemprop/issues/607
"""

from .common import blobs, examined, fit, loader, mlp

CODES = {"NW101", "NW106"}


def program(steps):
    x, y = blobs()
    model = fit(mlp(), x, y, steps=steps)
    return examined(model, x, y, loader=loader(x, y))


def buggy():
    return program(8)


def fixed():
    return program(160)
