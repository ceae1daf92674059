"""The loop steps without ever zeroing gradients, which add up from step to step.

Modelled on wz0919/waypoint-predictor issue 4, "Is optimizer.zero_grad() intentionally omitted in training loop?",
https://github.com/wz0919/waypoint-predictor/issues/4
"""

import torch
import torch.nn.functional as F

import normwright as nw

from .common import batches, blobs, mlp

CODES = {"NW806"}


def program(zero):
    x, y = blobs()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    with nw.watch(model, optimizer) as watch:
        for inputs, targets in batches(x, y, 32, 30):
            loss = F.cross_entropy(model(inputs), targets)
            if zero:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watch.report


def buggy():
    return program(False)


def fixed():
    return program(True)
