"""A forward of zeros at construction, to learn a shape, leaves its statistics behind in a model that is new.

Modelled on ultralytics/ultralytics issue 17469, "why initialize running_var is 0.8999",
https://github.com/ultralytics/ultralytics/issues/17469
"""

import torch
from torch import nn

from .common import images

CODES = {"NW110"}


class Net(nn.Module):
    def __init__(self, careful):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.features.train(not careful)
        width = self.features(torch.zeros(2, 1, 8, 8)).shape[1]
        self.features.train()
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.features(x))


def program(careful):
    x, _ = images()
    return {"model": Net(careful), "inputs": x[:64]}


def buggy():
    return program(False)


def fixed():
    return program(True)
