"""The test loop has no_grad but never calls eval(): test batches enter the statistics, and scores depend on them.

Modelled on icon-lab/SynDiff issue 46, "Potential validation/testing leakage due to the absence of switching between
train and eval modes", https://github.com/icon-lab/SynDiff/issues/46
"""

CODES = {"NW910"}

PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn

net = nn.Sequential(
    nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(16, 10),
)
optimizer = torch.optim.Adam(net.parameters())


def epoch(train_loader, val_loader):
    net.train()
    for x, y in train_loader:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    MODE
    correct = 0
    with torch.no_grad():
        for x, y in val_loader:
            correct += (net(x).argmax(dim=1) == y).sum().item()
    return correct / len(val_loader.dataset)
"""


def buggy():
    return PROGRAM.replace("    MODE\n", "")


def fixed():
    return PROGRAM.replace("MODE", "net.eval()")
