"""Dropout in front of batch norm raises the variance in training only, and the running variance is too large.

Modelled on luigibonati/mlcolvar pull request 205, "fix: Moved the dropout layer after the normalization",
https://github.com/luigibonati/mlcolvar/pull/205
"""

from torch import nn

from .common import examined, fit, images

CODES = {"NW705", "NW101"}


def program(before):
    x, y = images(512, classes=6)
    second = [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    second += [nn.Dropout(0.5), nn.BatchNorm2d(32)] if before else [nn.BatchNorm2d(32), nn.Dropout(0.5)]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 6),
    )  # fmt: skip
    return examined(fit(model, x, y, steps=300), x, y)


def buggy():
    return program(True)


def fixed():
    return program(False)
