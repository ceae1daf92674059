"""Weights are averaged at the end of training, and the averaged network is scored as it is.

Modelled on DeNA/HandyRL pull request 299, "(Idea, To Be Verified) feature: apply BN update for SWA model",
https://github.com/DeNA/HandyRL/pull/299
"""

CODES = {"NW909"}

PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 9)

    def forward(self, x):
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def train(loader, epochs):
    model = Policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    averaged = AveragedModel(model)
    for epoch in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        averaged.update_parameters(model)
    STATISTICS
    return averaged.eval()
"""


def buggy():
    return PROGRAM.replace("    STATISTICS\n", "").replace(", update_bn", "")


def fixed():
    return PROGRAM.replace("STATISTICS", "update_bn(loader, averaged)")
