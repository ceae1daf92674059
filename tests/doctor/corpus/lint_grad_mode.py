"""A chapter's batch_norm takes torch.is_grad_enabled() for the training flag.

Modelled on the chapter's code as in the notebook of liuyixi520/code, "批量归一化" (batch normalization),
https://github.com/liuyixi520/code
"""

CODES = {"NW901"}

PROGRAM = """
import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, width, momentum=0.1, eps=1e-5):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.momentum, self.eps = momentum, eps

    def forward(self, x):
        if FLAG:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean) * (var + self.eps).rsqrt() * self.scale + self.shift
"""


def buggy():
    return PROGRAM.replace("FLAG", "torch.is_grad_enabled()")


def fixed():
    return PROGRAM.replace("FLAG", "self.training")
