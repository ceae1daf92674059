"""The averaged weights of stochastic weight averaging are evaluated with statistics they were never run with.

Modelled on mosaicml/composer issue 624, "Update SWA batch norm statistics",
https://github.com/mosaicml/composer/issues/624
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from .common import batches, examined, images, loader

CODES = {"NW101", "NW102", "NW113"}


def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 6),
    )  # fmt: skip


def program(update):
    x, y = images(512, classes=6)
    g = torch.Generator().manual_seed(3)
    noisy = torch.where(torch.rand(512, generator=g) < 0.3, torch.randint(6, (512,), generator=g), y)
    model = net()
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.5)
    for step, (inputs, targets) in enumerate(batches(x, noisy, 64, 200)):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if step % 10 == 0:
            averaged.update_parameters(model)
    if update:
        update_bn(loader(x, y), averaged)
    return examined(averaged.eval(), x, y, loader=loader(x, y))


def buggy():
    return program(False)


def fixed():
    return program(True)
