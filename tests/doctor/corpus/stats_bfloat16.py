"""The whole model is cast to bfloat16, and with a small momentum the running statistics stop moving halfway.

Modelled on NVIDIA/apex pull request 137, "don't convert to float bn with affine=False", and the mixed-precision rule
discussed there that statistics stay in float32, https://github.com/NVIDIA/apex/pull/137
"""

import torch
from torch import nn

from .common import images

CODES = {"NW105", "NW805", "NW602", "NW101"}


def program(norms_in_float):
    x, _ = images(512, channels=3)
    x = 255 * x  # pictures as bytes
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=0.002), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).to(torch.bfloat16)  # fmt: skip
    if norms_in_float:
        model[1].float()
    model.train()
    with torch.no_grad():  # as in a long run whose weights have settled
        for step in range(2400):
            at = (step * 32) % 512
            model[1](model[0](x[at : at + 32].bfloat16()))
    model.eval()
    return {"model": model, "inputs": x[:64].bfloat16()}


def buggy():
    return program(False)


def fixed():
    return program(True)
