"""Validation inside the epoch puts the model into evaluation mode, and the loop goes on training in it.

Modelled on fartashf/vsepp issue 4, "Finish validation without running model.train()",
https://github.com/fartashf/vsepp/issues/4
"""

CODES = {"NW907"}

PROGRAM = """
import torch


def validate(model, loader):
    model.eval()
    right = 0
    with torch.no_grad():
        for x, y in loader:
            right += (model(x).argmax(1) == y).sum().item()
    return right


def train(model, train_loader, val_loader, optimizer, loss_function, epochs, every):
    step = 0
    for epoch in range(epochs):
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            loss_function(model(x), y).backward()
            optimizer.step()
            step += 1
            if step % every == 0:
                print(validate(model, val_loader))
                BACK
"""


def buggy():
    return PROGRAM.replace("                BACK\n", "")


def fixed():
    return PROGRAM.replace("BACK", "model.train()")
