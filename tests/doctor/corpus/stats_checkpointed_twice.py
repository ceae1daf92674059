"""Activation checkpointing runs the norms a second time in backward, so each step averages the batch in twice.

Modelled on Tencent/YOLO-Master issue 262, "Gradient checkpoint recomputation updates BatchNorm running statistics
twice", https://github.com/Tencent/YOLO-Master/issues/262
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import normwright as nw

from .common import batches, images

CODES = {"NW803", "NW111"}


class Net(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.whole = whole
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def block(self, x):
        return F.relu(self.bn2(self.conv2(x)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.whole:
            x = checkpoint(self.block, x, use_reentrant=False)
        else:  # what holds no statistics is recomputed, the norm is not
            x = F.relu(self.bn2(checkpoint(self.conv2, x, use_reentrant=False)))
        return self.head(x.mean((2, 3)))


def program(whole):
    x, y = images()
    model = Net(whole)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with nw.watch(model, optimizer) as watch:
        for inputs, targets in batches(x, y, 32, 24):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return watch.report


def buggy():
    return program(True)


def fixed():
    return program(False)
