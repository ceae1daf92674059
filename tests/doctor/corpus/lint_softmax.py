"""A network returns softmax and the loop calls CrossEntropyLoss on it.

Modelled on the page "Should I use softmax as output when using cross-entropy loss in PyTorch?",
https://pythonkb.com/python-should-i-use-softmax-as-output-when-using-cross-entropy-loss-in-pytorch
"""

CODES = {"NW904"}

PROGRAM = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(10, 20)
        self.out = nn.Linear(20, 3)

    def forward(self, x):
        x = F.relu(self.hidden(x))
        return LAST


def train(loader):
    net = Net()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        optimizer.step()
    return net
"""


def buggy():
    return PROGRAM.replace("LAST", "F.softmax(self.out(x), dim=1)")


def fixed():
    return PROGRAM.replace("LAST", "self.out(x)")
