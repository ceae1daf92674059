"""F.dropout is called without training=self.training and drops at evaluation too.

Modelled on rixwew/pytorch-fm issue 21, "F.dropout的问题" (a problem of F.dropout),
https://github.com/rixwew/pytorch-fm/issues/21
"""

CODES = {"NW917"}

PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn


class Attentional(nn.Module):
    def __init__(self, width, attention, dropouts):
        super().__init__()
        self.attention = nn.Linear(width, attention)
        self.projection = nn.Linear(attention, 1)
        self.fc = nn.Linear(width, 1)
        self.dropouts = dropouts

    def forward(self, pairs):
        scores = F.softmax(self.projection(F.relu(self.attention(pairs))), dim=1)
        scores = F.dropout(scores, p=self.dropouts[0]MODE)
        pooled = torch.sum(scores * pairs, dim=1)
        return self.fc(F.dropout(pooled, p=self.dropouts[1]MODE))
"""


def buggy():
    return PROGRAM.replace("MODE", "")


def fixed():
    return PROGRAM.replace("MODE", ", training=self.training")
