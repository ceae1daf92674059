"""Weight decay is applied to every parameter, the scales and shifts of the norms among them.

Modelled on autrainer/autrainer pull request 166, "Skip Optimizer Weight Decay for Biases and Normalization Layers",
https://github.com/autrainer/autrainer/pull/166
"""

import torch

from .common import cnn, examined, fit, images, norm_free_decay

CODES = {"NW703"}


def program(split):
    x, y = images()
    model = fit(cnn(), x, y)
    everything = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return examined(model, x, y, optimizer=norm_free_decay(model, decay=5e-4) if split else everything)


def buggy():
    return program(False)


def fixed():
    return program(True)
