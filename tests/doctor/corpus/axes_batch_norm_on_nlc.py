"""BatchNorm1d on (batch, time, features): it normalizes each time step over features, not each feature.

Modelled on xieyulai/LSTM-for-Human-Activity-Recognition-using-2D-Pose_Pytorch issue 2, "Batch Norm operation needs
transpose of input shape",
https://github.com/xieyulai/LSTM-for-Human-Activity-Recognition-using-2D-Pose_Pytorch/issues/2
"""

import torch
import torch.nn.functional as F
from torch import nn

CODES = {"NW301"}


class Activity(nn.Module):
    def __init__(self, transpose, time=32, features=36, classes=6):
        super().__init__()
        self.transpose = transpose
        self.embed = nn.Linear(features, 30)
        self.norm = nn.BatchNorm1d(30 if transpose else time)
        self.lstm = nn.LSTM(30, 24, batch_first=True)
        self.head = nn.Linear(24, classes)

    def forward(self, x):
        x = F.relu(self.embed(x))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) if self.transpose else self.norm(x)
        out, _ = self.lstm(x)
        return self.head(out[:, -1])


def program(transpose):
    g = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 8, 36)
    x = 10 * torch.rand(64, 1, 36, generator=g) + scale * torch.randn(64, 32, 36, generator=g).cumsum(1) / 6
    y = torch.randint(6, (64,), generator=g)
    return {"model": Activity(transpose), "inputs": x, "targets": y, "loss": F.cross_entropy}


def buggy():
    return program(False)


def fixed():
    return program(True)
