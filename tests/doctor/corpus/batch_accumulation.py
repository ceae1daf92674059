"""Gradients of eight micro-batches of four are added up for a batch of 32, but each norm sees four samples.

Modelled on ErenBalatkan/Bts-PyTorch issue 2, "gradient accumulation",
https://github.com/ErenBalatkan/Bts-PyTorch/issues/2
"""

import torch
import torch.nn.functional as F

import normwright as nw

from .common import batches, blobs, mlp

CODES = {"NW202", "NW204", "NW803"}


def program(micro):
    x, y = blobs()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    parts = 32 // micro
    with nw.watch(model, optimizer) as watch:
        for inputs, targets in batches(x, y, 32, 30):
            optimizer.zero_grad()
            for part, labels in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                (F.cross_entropy(model(part), labels) / parts).backward()
            optimizer.step()
    return watch.report


def buggy():
    return program(4)


def fixed():
    return program(32)
