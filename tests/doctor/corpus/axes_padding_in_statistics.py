"""Sequences of different lengths are padded with zeros, and batch norm takes the padding for data.

Modelled on "Masked Batch Normalization", discuss.pytorch.org,
https://discuss.pytorch.org/t/masked-batch-normalization/57813
"""

import torch
import torch.nn.functional as F
from torch import nn

import normwright as nw

CODES = {"NW303"}


class Speech(nn.Module):
    def __init__(self, masked):
        super().__init__()
        self.masked = masked
        self.conv1, self.conv2 = nn.Conv1d(20, 32, 1, bias=False), nn.Conv1d(32, 32, 1, bias=False)
        self.norm1, self.norm2 = nw.BatchNorm1d(32), nw.BatchNorm1d(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x, mask):
        given = {"mask": mask} if self.masked else {}
        m = mask[:, None].to(x)
        x = F.relu(self.norm1(self.conv1(x), **given)) * m
        x = F.relu(self.norm2(self.conv2(x), **given)) * m
        return self.head(x.sum(2) / m.sum(2))


def program(masked):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, 60, (32,), generator=g)
    lengths[0] = 60
    mask = torch.arange(60) < lengths[:, None]
    x = (4 + 2 * torch.randn(32, 20, 60, generator=g)) * mask[:, None]
    y = torch.randint(5, (32,), generator=g)
    return {"model": Speech(masked), "inputs": {"x": x, "mask": mask}, "targets": y, "loss": F.cross_entropy}


def buggy():
    return program(False)


def fixed():
    return program(True)
