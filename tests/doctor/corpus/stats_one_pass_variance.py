"""A masked batch norm computes E[x²] − E[x]² in float32, which is noise, or negative, for values far from zero.

Modelled on discuss.pytorch.org/t/masked-batch-normalization/57813, "Masked Batch Normalization",
https://discuss.pytorch.org/t/masked-batch-normalization/57813
"""

import torch
from torch import nn

from .common import examined

CODES = {"NW103", "NW104", "NW506", "NW507", "NW605"}


class HandNorm(nn.Module):
    def __init__(self, channels, one_pass):
        super().__init__()
        self.one_pass = one_pass
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        if self.training:
            mean = x.mean(0)
            var = (x * x).mean(0) - mean * mean if self.one_pass else (x - mean).square().mean(0)
            with torch.no_grad():
                n = len(x)
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var * n / (n - 1), 0.1)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


def program(one_pass):
    # a table with a column of years and one of postcodes, not scaled
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, generator=g) + torch.tensor([0.0, 2000.0, 8000.0, 1.0, 5000.0, 3.0])
    y = (x[:, 0] + x[:, 3] > 1).long()
    model = nn.Sequential(HandNorm(6, one_pass), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    model.train()
    with torch.no_grad():
        for at in range(0, 20 * 512, 32):
            model[0](x[at % 512 : at % 512 + 32])
    return examined(model.eval(), x, y)


def buggy():
    return program(True)


def fixed():
    return program(False)
