"""A layer norm by hand adds eps 1e-12 in half precision, where it is 0: a padded position becomes NaN.

Modelled on pytorch/pytorch issue 41527, "torch.nn.functional.layer_norm returns nan for fp16 all 0 tensor",
https://github.com/pytorch/pytorch/issues/41527
"""

import torch
from torch import nn

CODES = {"NW603"}


class HalfNorm(nn.Module):
    def __init__(self, width, wide):
        super().__init__()
        self.wide = wide
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        h = x.float() if self.wide else x
        mean = h.mean(-1, keepdim=True)
        var = (h - mean).square().mean(-1, keepdim=True)
        return ((h - mean) / (var + 1e-12).sqrt()).to(x.dtype) * self.weight + self.bias


def program(wide):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 12, 16, generator=g)
    x[:16, 9:] = 0  # padding
    model = nn.Sequential(HalfNorm(16, wide), nn.Linear(16, 8)).half().eval()
    return {"model": model, "inputs": x.half()}


def buggy():
    return program(False)


def fixed():
    return program(True)
