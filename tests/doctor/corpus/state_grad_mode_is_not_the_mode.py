"""A batch norm by hand asks whether gradients are enabled, so eval() without no_grad still uses the batch.

Modelled on ShusenTang/Dive-into-DL-PyTorch issue 129, "5.10 批量归一化" (batch normalization), and the chapter's code,
https://github.com/ShusenTang/Dive-into-DL-PyTorch/issues/129
"""

import torch
from torch import nn

from .common import blobs, examined, fit

CODES = {"NW504"}


class ChapterNorm(nn.Module):
    def __init__(self, width, by_mode):
        super().__init__()
        self.by_mode = by_mode
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("moving_mean", torch.zeros(width))
        self.register_buffer("moving_var", torch.ones(width))

    def forward(self, x):
        batch = self.training if self.by_mode else torch.is_grad_enabled()
        if not batch:
            hat = (x - self.moving_mean) / torch.sqrt(self.moving_var + 1e-5)
        else:
            mean = x.mean(0)
            var = ((x - mean) ** 2).mean(0)
            hat = (x - mean) / torch.sqrt(var + 1e-5)
            n = len(x)
            self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
            self.moving_var = 0.9 * self.moving_var + 0.1 * var.detach() * n / (n - 1)
        return self.gamma * hat + self.beta


def program(by_mode):
    x, y = blobs()
    model = nn.Sequential(nn.Linear(12, 24, bias=False), ChapterNorm(24, by_mode), nn.Sigmoid(), nn.Linear(24, 4))
    return examined(fit(model, x, y, lr=0.1), x, y)


def buggy():
    return program(False)


def fixed():
    return program(True)
