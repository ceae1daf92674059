"""The epoch's mean loss is summed as tensors with their graphs, and memory grows until the epoch ends.

Modelled on jostmey/NakedAttention issue 1, "Memory issues caused by += with pytorch graph objects",
https://github.com/jostmey/NakedAttention/issues/1
"""

CODES = {"NW906"}

PROGRAM = """
import torch


def fit(model, loader, epochs, loss_function):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_function(model(x), y)
            loss.backward()
            optimizer.step()
            total += VALUE / len(loader)
        print(epoch, float(total))
"""


def buggy():
    return PROGRAM.replace("VALUE", "loss")


def fixed():
    return PROGRAM.replace("VALUE", "loss.item()")
