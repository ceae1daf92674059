"""A custom norm accumulates mean and variance for inference without leaving the graph.

Modelled on facebookresearch/synsin pull request 20, "Memory leak in custom batch-norm",
https://github.com/facebookresearch/synsin/pull/20
"""

CODES = {"NW903"}

PROGRAM = """
import torch
from torch import nn


class ConditionalNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x, gain, bias):
        if self.training:
            mean = x.mean(dim=(0, 2, 3))
            var = x.var(dim=(0, 2, 3), unbiased=False)
            self.stored_mean = self.stored_mean * 0.9 + MEAN * 0.1
            self.stored_var = self.stored_var * 0.9 + VAR * 0.1
        else:
            mean, var = self.stored_mean, self.stored_var
        hat = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
        return hat * gain[:, :, None, None] + bias[:, :, None, None]
"""


def buggy():
    return PROGRAM.replace("MEAN", "mean").replace("VAR", "var")


def fixed():
    return PROGRAM.replace("MEAN", "mean.detach()").replace("VAR", "var.detach()")
