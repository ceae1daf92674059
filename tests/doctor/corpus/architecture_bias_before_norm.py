"""Convolutions keep a bias that the batch norm behind them subtracts again.

Modelled on milesial/Pytorch-UNet pull request 325, "delete convolution bias before BN",
https://github.com/milesial/Pytorch-UNet/pull/325
"""

import torch
from torch import nn

from .common import images

CODES = {"NW701"}


class DoubleConv(nn.Sequential):
    def __init__(self, inner, outer, bias):
        super().__init__(
            nn.Conv2d(inner, outer, 3, padding=1, bias=bias), nn.BatchNorm2d(outer), nn.ReLU(inplace=True),
            nn.Conv2d(outer, outer, 3, padding=1, bias=bias), nn.BatchNorm2d(outer), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.inc, self.down = DoubleConv(1, 8, bias), nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 16, bias))
        self.up, self.conv = nn.ConvTranspose2d(16, 8, 2, stride=2), DoubleConv(16, 8, bias)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = self.inc(x)
        b = self.up(self.down(a))
        return self.out(self.conv(torch.cat([a, b], 1)))


def program(bias):
    x, _ = images(64, size=16)
    return {"model": UNet(bias), "inputs": x[:32]}


def buggy():
    return program(True)


def fixed():
    return program(False)
