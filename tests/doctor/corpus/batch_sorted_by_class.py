"""The data lie sorted by class and are not shuffled, so a batch's statistics are those of one class.

Modelled on openpifpaf/openpifpaf pull request 308, "shuffle val loader",
https://github.com/openpifpaf/openpifpaf/pull/308
"""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from .common import blobs, examined, mlp

CODES = {"NW205", "NW101"}


def program(shuffle):
    x, y = blobs(512)
    order = y.argsort(stable=True)
    data = DataLoader(TensorDataset(x[order], y[order]), batch_size=64, shuffle=shuffle)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(20):
        for inputs, targets in data:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        schedule.step()
    return examined(model, x, y, loader=data)


def buggy():
    return program(False)


def fixed():
    return program(True)
