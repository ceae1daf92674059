"""A batch norm by hand adds eps to the quotient instead of the variance, and differs from what it reproduces.

Modelled on "BatchNorm1d output different with my implementation", discuss.pytorch.org,
https://discuss.pytorch.org/t/batchnorm1d-output-different-with-my-implementation/51877
"""

import torch
from torch import nn

from .common import blobs, examined, fit

CODES = {"NW506", "NW507", "NW603"}


class Reproduced(nn.Module):
    def __init__(self, width, wrong):
        super().__init__()
        self.wrong = wrong
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=self.wrong)
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(x.var(0), 0.1)
        else:
            mean, var = self.running_mean, self.running_var
        hat = (x - mean) / torch.sqrt(var) + 1e-5 if self.wrong else (x - mean) / torch.sqrt(var + 1e-5)
        return hat * self.weight + self.bias


def program(wrong):
    x, y = blobs()
    model = nn.Sequential(nn.Linear(12, 24, bias=False), Reproduced(24, wrong), nn.ReLU(), nn.Linear(24, 4))
    return examined(fit(model, x, y, size=16), x[:16], y[:16])


def buggy():
    return program(True)


def fixed():
    return program(False)
