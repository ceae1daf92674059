"""Spectrograms come as (batch, mel bands, time, channels), and the norm takes axis 1, the mel bands, for the channels.

Modelled on DCASE-REPO/dcase2018_baseline issue 18, "Task1: clarification of axis used in BatchNormalization layer",
https://github.com/DCASE-REPO/dcase2018_baseline/issues/18
"""

import torch
import torch.nn.functional as F
from torch import nn

CODES = {"NW304"}


class Bands(nn.Module):
    def __init__(self, right, bands=24, width=16):
        super().__init__()
        self.right = right
        self.embed = nn.Linear(4, width, bias=False)  # on the last axis
        self.norm = nn.BatchNorm2d(width if right else bands)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x)
        x = self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.right else self.norm(x)
        x = F.relu(self.mix(F.relu(x)))
        return self.head(x.mean((1, 2)))


def program(right):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 24, 20, 4, generator=g) * torch.tensor([0.2, 1.0, 5.0, 9.0]) + torch.tensor([3.0, 0, 8.0, -6.0])
    y = torch.randint(5, (32,), generator=g)
    return {"model": Bands(right), "inputs": x, "targets": y, "loss": F.cross_entropy}


def buggy():
    return program(False)


def fixed():
    return program(True)
