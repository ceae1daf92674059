"""An adaptive loss calls the model a second time in training mode in each step, only to weigh the terms.

Modelled on m2lines/Samudra issue 572, "BatchNorm running stats likely skewed by checkpointing + extra forward pass",
https://github.com/m2lines/Samudra/issues/572
"""

import torch
import torch.nn.functional as F

import normwright as nw

from .common import batches, blobs, mlp

CODES = {"NW802", "NW803", "NW111"}


def program(careful):
    x, y = blobs()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with nw.watch(model, optimizer) as watch:
        for inputs, targets in batches(x, y, 64, 30):
            if careful:
                model.eval()
            with torch.no_grad():
                weight = 1 / F.cross_entropy(model(inputs), targets).clamp(0.5, 2)
            model.train()
            optimizer.zero_grad()
            (weight * F.cross_entropy(model(inputs), targets)).backward()
            optimizer.step()
    return watch.report


def buggy():
    return program(False)


def fixed():
    return program(True)
