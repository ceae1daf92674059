"""A recommender ends in a sigmoid and is trained by BCEWithLogitsLoss.

Modelled on yudi-mars/daisyRec pull request 15, "Do not need sigmoid because there is sigmoid in BCEWithLogitsLoss",
https://github.com/yudi-mars/daisyRec/pull/15
"""

CODES = {"NW915"}

PROGRAM = """
import torch
from torch import nn


class Factors(nn.Module):
    def __init__(self, users, items, width):
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width)
        self.criterion = nn.BCEWithLogitsLoss(reduction="sum")

    def forward(self, user, item):
        score = (self.users(user) * self.items(item)).sum(dim=-1)
        return RESULT

    def step(self, batch, optimizer):
        user, item, label = batch
        optimizer.zero_grad()
        loss = self.criterion(self.forward(user, item), label)
        loss.backward()
        optimizer.step()
        return loss.item()
"""


def buggy():
    return PROGRAM.replace("RESULT", "torch.sigmoid(score)")


def fixed():
    return PROGRAM.replace("RESULT", "score")
