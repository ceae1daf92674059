"""Running statistics are parameters without gradient, until the usual loop that unfreezes a network unfreezes them.

Modelled on jmclong/random-fourier-features-pytorch pull request 7, "fix: use register_buffer instead of creating
parameter with no grad for b", https://github.com/jmclong/random-fourier-features-pytorch/pull/7
"""

import torch
from torch import nn

from .common import blobs, examined, fit

CODES = {"NW508"}


class ParameterNorm(nn.Module):
    def __init__(self, width, buffers):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        for name, value in (("running_mean", torch.zeros(width)), ("running_var", torch.ones(width))):
            if buffers:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x):
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(x.var(0), 0.1)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean) / torch.sqrt(var + 1e-5) * self.weight + self.bias


def program(buffers):
    x, y = blobs()
    model = nn.Sequential(nn.Linear(12, 24, bias=False), ParameterNorm(24, buffers), nn.ReLU(), nn.Linear(24, 4))
    model = fit(model, x, y)
    for p in model.parameters():  # fine-tuning begins, of everything
        p.requires_grad_(True)
    return examined(model, x, y)


def buggy():
    return program(False)


def fixed():
    return program(True)
