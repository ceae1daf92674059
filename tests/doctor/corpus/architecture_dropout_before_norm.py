"""Dropout in front of batch norm raises the variance in training only, and the running variance is too large.

Modelled on luigibonati/mlcolvar pull request 205, "fix: Moved the dropout layer after the normalization",
https://github.com/luigibonati/mlcolvar/pull/205
"""

import torch
import torch.nn.functional as F
from torch import nn

from .common import fit

CODES = {"NW705", "NW101"}


def program(before):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(512, 10, generator=g)
    y = (6 * x[:, :1]).sin() + 4 * (x[:, 1:2] - 0.5) ** 2 + 2 * x[:, 2:3] * x[:, 3:4]
    layers, width = [], 10
    for _ in range(3):
        layers += [nn.Linear(width, 48, bias=not before), nn.ReLU()]
        layers += [nn.Dropout(0.5), nn.BatchNorm1d(48)] if before else [nn.BatchNorm1d(48)]
        width = 48
    layers += [] if before else [nn.Dropout(0.1)]
    model = nn.Sequential(*layers, nn.Linear(48, 1))
    fit(model, x, y, steps=400, lr=0.01, loss=F.mse_loss)
    return {"model": model, "inputs": x[:128], "targets": y[:128], "loss": F.mse_loss}


def buggy():
    return program(True)


def fixed():
    return program(False)
