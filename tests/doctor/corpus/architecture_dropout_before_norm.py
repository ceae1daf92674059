"""Dropout in front of batch norm raises the variance in training only, and the running variance is too large.

Modelled on luigibonati/mlcolvar pull request 205, "fix: Moved the dropout layer after the normalization",
https://github.com/luigibonati/mlcolvar/pull/205
"""

from torch import nn

from .common import blobs, examined, fit

CODES = {"NW705", "NW101"}


def program(before):
    x, y = blobs()
    layers = []
    for width in (12, 32):
        layers += [nn.Linear(width, 32, bias=False)]
        layers += [nn.Dropout(0.5), nn.BatchNorm1d(32)] if before else [nn.BatchNorm1d(32)]
        layers += [nn.ReLU()]
    layers += [] if before else [nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    return examined(fit(model, x, y, steps=200), x, y)


def buggy():
    return program(True)


def fixed():
    return program(False)
