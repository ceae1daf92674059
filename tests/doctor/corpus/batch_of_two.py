"""Batch norm with two volumes in a batch and few places left: each statistic is over a handful of values.

Modelled on wolny/pytorch-3dunet issue 53, "Need to set the model to 'eval' mode when assessing the validation data",
https://github.com/wolny/pytorch-3dunet/issues/53
"""

import torch
import torch.nn.functional as F
from torch import nn

CODES = {"NW201", "NW202", "NW101"}


def program(norm):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 8, 8, 8, generator=g)
    model = nn.Sequential(
        nn.Conv3d(1, 8, 3, stride=2, padding=1, bias=False), norm(8), nn.ReLU(),
        nn.Conv3d(8, 16, 3, stride=4, padding=1, bias=False), norm(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    return {"model": model, "inputs": x, "targets": torch.tensor([0, 1]), "loss": F.cross_entropy}


def buggy():
    return program(nn.BatchNorm3d)


def fixed():
    return program(lambda c: nn.GroupNorm(4, c))
