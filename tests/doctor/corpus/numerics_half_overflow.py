"""In half precision the values that a norm receives come near 65504, and a batch a little larger becomes infinite.

Modelled on pytorch/pytorch issue 96798, "NAN of batchnorm in AMP",
https://github.com/pytorch/pytorch/issues/96798
"""

import torch
from torch import nn

CODES = {"NW601", "NW103"}


class Shared(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(64, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16, eps=1e-3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x * self.scale)))
        return self.head(x.mean((2, 3)))


def program(scale):
    g = torch.Generator().manual_seed(0)
    x = 9000 * torch.rand(16, 64, 8, 8, generator=g)  # features of a backbone without a norm at its end
    model = Shared(scale)
    with torch.no_grad():
        model.conv.weight.abs_()
        for _ in range(60):
            model.train()(x)
    model.conv.half(), model.head.half()  # the norm keeps float32, as autocast would have it
    return {"model": model.eval(), "inputs": x.half()}


def buggy():
    return program(1.0)


def fixed():
    return program(1 / 9000)
