"""The moving average written by hand takes torch's momentum for the weight of the old value.

Modelled on Jermmy/pytorch-quantization-demo issue 17, "计算移动平均值有误， BN的momentum默认值是0.1不是0.9",
https://github.com/Jermmy/pytorch-quantization-demo/issues/17
"""

import torch
from torch import nn

from .common import blobs, examined, fit

CODES = {"NW505", "NW108"}


class Averaging(nn.Module):
    def __init__(self, width, reversed_):
        super().__init__()
        self.momentum = 0.1
        self.reversed = reversed_
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            new = 1 - self.momentum if self.reversed else self.momentum
            with torch.no_grad():
                self.running_mean.mul_(1 - new).add_(mean, alpha=new)
                self.running_var.mul_(1 - new).add_(x.var(0), alpha=new)
        else:
            mean, var = self.running_mean, self.running_var
        return self.weight * (x - mean) * torch.rsqrt(var + 1e-5) + self.bias


def program(reversed_):
    x, y = blobs()
    model = nn.Sequential(nn.Linear(12, 24, bias=False), Averaging(24, reversed_), nn.ReLU(), nn.Linear(24, 4))
    return examined(fit(model, x, y), x, y)


def buggy():
    return program(True)


def fixed():
    return program(False)
