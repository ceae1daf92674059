"""A column of the table is the same for all samples, and batch norm divides its rounding by the root of eps.

Modelled on BVLC/caffe issue 3963, "BatchNorm numerical instability",
https://github.com/BVLC/caffe/issues/3963
"""

import torch
from torch import nn

from .common import blobs, examined, fit, loader

CODES = {"NW604"}


def program(constant):
    x, y = blobs()
    if constant:
        x = torch.cat([x, torch.full((len(x), 1), 1013.25), torch.zeros(len(x), 1)], 1)
    width = x.shape[1]
    layers = [nn.BatchNorm1d(width), nn.Linear(width, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4)]
    return examined(fit(nn.Sequential(*layers), x, y), x, y, loader=loader(x, y))


def buggy():
    return program(True)


def fixed():
    return program(False)
