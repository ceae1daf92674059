"""A keyword spotter's loop steps the optimizer and never zeroes its gradients.

Modelled on wenet-e2e/wekws issue 72, "Questions about optimizer.zero_grad()",
https://github.com/wenet-e2e/wekws/issues/72
"""

CODES = {"NW905"}

PROGRAM = """
import torch
from torch.nn.utils import clip_grad_norm_


class Executor:
    def __init__(self):
        self.step = 0

    def train(self, model, optimizer, loader, device, clip=50.0):
        model.train()
        for keys, feats, target, lengths in loader:
            feats, target, lengths = feats.to(device), target.to(device), lengths.to(device)
            if feats.size(0) == 0:
                continue
            logits = model(feats)
            loss = torch.nn.functional.cross_entropy(logits, target)
            ZERO
            loss.backward()
            norm = clip_grad_norm_(model.parameters(), clip)
            if torch.isfinite(norm):
                optimizer.step()
            self.step += 1
"""


def buggy():
    return PROGRAM.replace("            ZERO\n", "")


def fixed():
    return PROGRAM.replace("ZERO", "optimizer.zero_grad()")
