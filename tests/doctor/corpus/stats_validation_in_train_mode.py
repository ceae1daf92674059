"""Validation runs in training mode under no_grad, and writes the validation data into the running statistics.

Modelled on princeton-vl/pytorch_stacked_hourglass issue 44, "`model.train()` usage",
https://github.com/princeton-vl/pytorch_stacked_hourglass/issues/44
"""

import torch
import torch.nn.functional as F

import normwright as nw

from .common import batches, cnn, images

CODES = {"NW802", "NW803", "NW110"}


def program(evaluate):
    x, y = images()
    x_val, _ = images(128, seed=1)
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with nw.watch(model, optimizer) as watch:
        for epoch in range(4):
            model.train()
            for inputs, targets in batches(x, y, 32, seed=epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            if evaluate:
                model.eval()
            with torch.no_grad():
                for at in range(0, len(x_val), 32):
                    model(x_val[at : at + 32])
    return watch.report


def buggy():
    return program(False)


def fixed():
    return program(True)
