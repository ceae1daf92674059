"""Biases start far below zero: hidden ReLU units are never active, and get no gradient.

Modelled on facebookresearch/dlrm pull request 358, "switched bias initialization to initialize to zeros per standard
Xavier initialization", https://github.com/facebookresearch/dlrm/pull/358
"""

import torch
from torch import nn

from .common import blobs, examined, loader

CODES = {"NW708"}


def program(bias):
    x, y = blobs(2048)
    model = nn.Sequential(
        nn.Linear(12, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    for layer in (model[3], model[5]):
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        model[3].bias.add_(bias)
    return examined(model, x, y, loader=loader(x, y))


def buggy():
    return program(-12.0)


def fixed():
    return program(0.0)
