"""A forward of zeros before training, to learn a width, moves the running statistics.

Modelled on ultralytics/ultralytics issue 17469, "why initialize running_var is 0.8999",
https://github.com/ultralytics/ultralytics/issues/17469
"""

CODES = {"NW908"}

PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn


def main(loader):
    backbone = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    QUIET
    with torch.no_grad():
        width = backbone(torch.zeros(1, 1, 28, 28)).shape[1]
    model = nn.Sequential(backbone, nn.Linear(width, 10))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model
"""


def buggy():
    return PROGRAM.replace("    QUIET\n", "")


def fixed():
    return PROGRAM.replace("QUIET", "backbone.eval()")
