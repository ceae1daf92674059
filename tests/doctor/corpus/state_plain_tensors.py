"""A batch norm by hand keeps its statistics as plain attributes: no checkpoint holds them, and .to() leaves them.

Modelled on the notebook "BatchNormalization" of quas-modo/HandCraftedAI,
https://github.com/quas-modo/HandCraftedAI
"""

import torch
from torch import nn

from .common import blobs, examined, fit

CODES = {"NW501", "NW502"}


class HandNorm(nn.Module):
    def __init__(self, width, buffers):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        if buffers:
            self.register_buffer("running_mean", torch.zeros(width))
            self.register_buffer("running_var", torch.ones(width))
        else:
            self.running_mean, self.running_var = torch.zeros(width), torch.ones(width)

    def forward(self, x):
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean
                self.running_var = 0.9 * self.running_var + 0.1 * x.var(0)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean) / torch.sqrt(var + 1e-5) * self.gamma + self.beta


def program(buffers):
    x, y = blobs()
    model = nn.Sequential(
        nn.Linear(12, 24, bias=False), HandNorm(24, buffers), nn.ReLU(), nn.Linear(24, 4)
    )  # fmt: skip
    return examined(fit(model, x, y), x, y)


def buggy():
    return program(False)


def fixed():
    return program(True)
