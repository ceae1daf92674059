"""The running mean is updated without detach, so every step's graph hangs on the last and memory grows.

Modelled on bayesiains/nflows pull request 11, "Fix memory leak in batch norm",
https://github.com/bayesiains/nflows/pull/11
"""

import torch
from torch import nn

from .common import blobs, examined

CODES = {"NW503"}


class FlowNorm(nn.Module):
    def __init__(self, width, detach):
        super().__init__()
        self.detach = detach
        self.log_scale, self.shift = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            m, v = (mean.detach(), x.detach().var(0)) if self.detach else (mean, x.var(0))
            self.running_mean = 0.9 * self.running_mean + 0.1 * m
            self.running_var = 0.9 * self.running_var + 0.1 * v
        else:
            mean, var = self.running_mean, self.running_var
        return self.log_scale.exp() * (x - mean) / (var + 1e-5).sqrt() + self.shift


def program(detach):
    x, y = blobs()
    model = nn.Sequential(nn.Linear(12, 24, bias=False), FlowNorm(24, detach), nn.Tanh(), nn.Linear(24, 4))
    return examined(model.train(), x, y)


def buggy():
    return program(False)


def fixed():
    return program(True)
