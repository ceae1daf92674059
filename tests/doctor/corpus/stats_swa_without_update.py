"""The averaged weights of stochastic weight averaging are evaluated with statistics they were never run with.

Modelled on mosaicml/composer issue 624, "Update SWA batch norm statistics",
https://github.com/mosaicml/composer/issues/624
"""

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

from .common import batches, blobs, examined, loader, mlp

CODES = {"NW101", "NW102", "NW113"}


def program(update):
    x, y = blobs()
    model = mlp()
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, (inputs, targets) in enumerate(batches(x, y, 32, 160)):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if step >= 80 and step % 8 == 0:
            averaged.update_parameters(model)
    if update:
        update_bn(loader(x, y), averaged)
    return examined(averaged.eval(), x, y, loader=loader(x, y))


def buggy():
    return program(False)


def fixed():
    return program(True)
