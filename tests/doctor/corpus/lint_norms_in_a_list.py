"""Convolutions and norms are kept in plain lists: they are not trained, and eval() does not reach them.

Modelled on kanezaki/pytorch-unsupervised-segmentation pull request 6, "fix param collection, apply black formatting",
https://github.com/kanezaki/pytorch-unsupervised-segmentation/pull/6
"""

CODES = {"NW918"}

PROGRAM = """
import torch.nn.functional as F
from torch import nn


class Segments(nn.Module):
    def __init__(self, inputs, channels, depth):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = LIST()
        self.bn2 = LIST()
        for i in range(depth):
            self.conv2.append(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            self.bn2.append(nn.BatchNorm2d(channels))

    def forward(self, x):
        x = self.bn1(F.relu(self.conv1(x)))
        for conv, bn in zip(self.conv2, self.bn2):
            x = bn(F.relu(conv(x)))
        return x
"""


def buggy():
    return PROGRAM.replace("LIST()", "[]")


def fixed():
    return PROGRAM.replace("LIST", "nn.ModuleList")
