"""The moving statistics of a batch norm by hand are plain attributes, moved to the device in forward.

Modelled on the notebook of TuRan-H/Learn, "动手学深度学习 章节7.5 批量规范化" (batch normalization),
https://github.com/TuRan-H/Learn
"""

CODES = {"NW902"}

PROGRAM = """
import torch
from torch import nn


class MovingNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        shape = (1, channels, 1, 1)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        STATISTICS

    def forward(self, x):
        if self.training:
            mean = x.mean(dim=(0, 2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
            with torch.no_grad():
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean
                self.moving_var = 0.9 * self.moving_var + 0.1 * var
        else:
            mean, var = self.moving_mean, self.moving_var
        return self.gamma * (x - mean) / torch.sqrt(var + 1e-5) + self.beta
"""
PLAIN = "self.moving_mean = torch.zeros(shape)\n        self.moving_var = torch.ones(shape)"
BUFFERS = (
    'self.register_buffer("moving_mean", torch.zeros(shape))\n'
    '        self.register_buffer("moving_var", torch.ones(shape))'
)


def buggy():
    return PROGRAM.replace("STATISTICS", PLAIN)


def fixed():
    return PROGRAM.replace("STATISTICS", BUFFERS)
