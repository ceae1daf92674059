"""NLLLoss is given the output of softmax instead of log-softmax.

Modelled on the page "Understanding PyTorch's torch.nn.Softmax and CrossEntropyLoss",
https://runebook.dev/en/articles/pytorch/generated/torch.nn.softmax
"""

CODES = {"NW916"}

PROGRAM = """
import torch
import torch.nn as nn

model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4), LAST)
criterion = nn.NLLLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def run(batches):
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
"""


def buggy():
    return PROGRAM.replace("LAST", "nn.Softmax(dim=1)")


def fixed():
    return PROGRAM.replace("LAST", "nn.LogSoftmax(dim=1)")
