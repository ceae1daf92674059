"""The learning rate never falls, so the running averages lag behind weights that still move: eval() is far off.

Modelled on pytorch/pytorch issue 4741, "Using model.eval() with batchnorm gives high error",
https://github.com/pytorch/pytorch/issues/4741
"""

import torch
import torch.nn.functional as F
from torch import nn

from .common import batches, examined, images, loader

CODES = {"NW101"}


def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Conv2d(6, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 24, bias=False), nn.BatchNorm1d(24), nn.Sigmoid(), nn.Linear(24, 6),
    )  # fmt: skip


def program(lr, last):
    x, y = images(512, classes=6)
    g = torch.Generator().manual_seed(3)
    noisy = torch.where(torch.rand(512, generator=g) < 0.3, torch.randint(6, (512,), generator=g), y)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step, (inputs, targets) in enumerate(batches(x, noisy, 64, 480)):
        for group in optimizer.param_groups:
            group["lr"] = lr + (last - lr) * step / 479
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return examined(model.eval(), x, y, loader=loader(x, y))


def buggy():
    return program(10.0, 10.0)


def fixed():
    return program(0.5, 0.005)
