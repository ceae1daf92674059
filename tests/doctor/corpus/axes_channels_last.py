"""Spectrograms come as (batch, channels, time, frequency), and the norm takes another axis for the channels.

Modelled on sharathadavanne/seld-dcase2021 issue 8, "BatchNormalization axis",
https://github.com/sharathadavanne/seld-dcase2021/issues/8
"""

import torch
import torch.nn.functional as F
from torch import nn

CODES = {"NW304", "NW301"}


class Spectral(nn.Module):
    def __init__(self, right):
        super().__init__()
        self.right = right
        self.conv = nn.Conv2d(4, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16 if right else 24)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv(x)
        # a layer written for channels last gets the frequencies
        x = self.norm(x) if self.right else self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.head(F.relu(x).mean((2, 3)))


def program(right):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, 20, 24, generator=g) * torch.linspace(3, 0.3, 24) + torch.linspace(4, 0, 24)
    y = torch.randint(5, (32,), generator=g)
    return {"model": Spectral(right), "inputs": x, "targets": y, "loss": F.cross_entropy}


def buggy():
    return program(False)


def fixed():
    return program(True)
