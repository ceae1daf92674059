"""Source and target go through one set of norms in turn, so the running statistics belong to neither.

Modelled on adapt-python/adapt issue 92, "BatchNorm deep DA",
https://github.com/adapt-python/adapt/issues/92
"""

import torch
import torch.nn.functional as F
from torch import nn

from .common import batches, blobs, mlp

CODES = {"NW101", "NW114"}


class Adapted(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.source = mlp()
        self.target = self.source if shared else mlp()
        if not shared:  # one set of weights, a norm for each domain
            for ours, theirs in zip(self.source, self.target, strict=True):
                if isinstance(ours, nn.Linear):
                    theirs.weight, theirs.bias = ours.weight, ours.bias

    def forward(self, source, target):
        return self.source(source), self.target(target)


def program(shared):
    x, y = blobs()
    moved = 6 * x - 60  # the same clouds, measured in another unit
    model = Adapted(shared).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for (a, ya), (b, yb) in zip(batches(x, y, 32, 150), batches(moved, y, 32, 150, seed=1), strict=True):
        optimizer.zero_grad()
        source, target = model(a, b)
        (F.cross_entropy(source, ya) + F.cross_entropy(target, yb)).backward()
        optimizer.step()
        schedule.step()
    return {
        "model": model.eval(),
        "inputs": {"source": x[:64], "target": moved[64:128]},
        "loss": lambda out: F.cross_entropy(out[0], y[:64]) + F.cross_entropy(out[1], y[64:128]),
    }


def buggy():
    return program(True)


def fixed():
    return program(False)
