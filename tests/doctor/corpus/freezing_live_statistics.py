"""The pretrained backbone is frozen by requires_grad alone; its running statistics move with the new data.

Modelled on pytorch/pytorch issue 86590, "Easy way to \"freeze\" BatchNorm running_mean/running_var",
https://github.com/pytorch/pytorch/issues/86590
"""

from torch import nn

import normwright as nw

from .common import cnn, examined, fit, images

CODES = {"NW401"}


def program(freeze):
    x, y = images()
    backbone = fit(cnn(), x, y)[:-1]
    model = nn.Sequential(backbone, nn.Linear(16, 5))
    if freeze:
        nw.freeze(backbone)
    for p in backbone.parameters():
        p.requires_grad_(False)
    return examined(model.train(), x, y % 5)


def buggy():
    return program(False)


def fixed():
    return program(True)
