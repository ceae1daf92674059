"""A layer norm over everything but the batch normalizes a whole sequence at once, not each token.

Modelled on Qualcomm-AI-research/geometric-algebra-transformer pull request 8, "Fix layernorm bug in baseline
transformer", https://github.com/Qualcomm-AI-research/geometric-algebra-transformer/pull/8
"""

import torch
import torch.nn.functional as F
from torch import nn

CODES = {"NW302"}


class Block(nn.Module):
    def __init__(self, shape, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape), nn.LayerNorm(shape)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, whole, length=20, width=32):
        super().__init__()
        shape = (length, width) if whole else width
        self.embed = nn.Embedding(100, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(Block(shape, width), Block(shape, width))
        self.norm = nn.LayerNorm(shape)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.position)).mean(1))


def program(whole):
    g = torch.Generator().manual_seed(0)
    tokens, y = torch.randint(100, (32, 20), generator=g), torch.randint(4, (32,), generator=g)
    return {"model": Model(whole), "inputs": tokens, "targets": y, "loss": F.cross_entropy}


def buggy():
    return program(True)


def fixed():
    return program(False)
