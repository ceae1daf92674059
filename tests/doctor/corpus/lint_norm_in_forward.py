"""A norm is made in each forward, because its size is known only there: it is never trained, saved or averaged.

Modelled on mapillary/inplace_abn issue 101, "declare bn inside forward",
https://github.com/mapillary/inplace_abn/issues/101
"""

CODES = {"NW912"}

PROGRAM = """
import torch
from torch import nn


class Graph(nn.Module):
    def __init__(self, channels, places):
        super().__init__()
        self.phi = nn.Conv2d(channels, channels // 4, 1, bias=False)
        MADE

    def forward(self, x):
        n, c, h, w = x.shape
        y = self.phi(x).flatten(2).transpose(1, 2)
        y = CALLED(y)
        return torch.softmax(y @ y.transpose(1, 2), dim=-1)
"""


def buggy():
    return PROGRAM.replace("        MADE\n", "").replace("CALLED", "nn.BatchNorm1d(h * w).to(x.device)")


def fixed():
    return PROGRAM.replace("MADE", "self.bn = nn.BatchNorm1d(places)").replace("CALLED", "self.bn")
