"""The averaged copy takes over parameters but not buffers, and is evaluated with the statistics of a new network.

Modelled on facebookresearch/moco issue 70, "Buffer of BN in EMA update",
https://github.com/facebookresearch/moco/issues/70
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from .common import batches, cnn, images

CODES = {"NW101", "NW102", "NW112"}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = cnn()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def update(self, decay, buffers):
        with torch.no_grad():
            for mean, p in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.lerp_(p, 1 - decay)
            for mean, b in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
                if buffers:
                    mean.copy_(b)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x):
        return self.student(x) if self.training else self.teacher(x)


def program(buffers):
    x, y = images()
    model = Pair().train()
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for inputs, targets in batches(x, y, 32, 150):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
        model.update(0.9, buffers)
    model.eval()
    return {"model": model, "inputs": x[:64], "targets": y[:64], "loss": F.cross_entropy}


def buggy():
    return program(False)


def fixed():
    return program(True)
