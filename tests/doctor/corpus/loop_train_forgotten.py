"""Validation calls eval() and nothing calls train() again: from the second epoch on the norms are frozen.

Modelled on HuiZeng/Grid-Anchor-based-Image-Cropping-Pytorch issue 2, "Why to freeze BatchNorm after the second epoch",
https://github.com/HuiZeng/Grid-Anchor-based-Image-Cropping-Pytorch/issues/2
"""

import torch
import torch.nn.functional as F

import normwright as nw

from .common import batches, cnn, images

CODES = {"NW801"}


def program(each_epoch):
    x, y = images()
    model = cnn()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with nw.watch(model, optimizer) as watch:
        for epoch in range(4):
            if each_epoch:
                model.train()
            for inputs, targets in batches(x, y, 32, seed=epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                model(x[:64])
    return watch.report


def buggy():
    return program(False)


def fixed():
    return program(True)
