"""The norms are put into evaluation mode once, and the epoch's model.train() puts them back.

Modelled on pgniewko/gt-pyg issue 112, "`freeze()` BatchNorm eval mode is reset by the next model.train()",
https://github.com/pgniewko/gt-pyg/issues/112
"""

from torch import nn

from .common import cnn, examined, fit, images

CODES = {"NW401", "NW402"}


class FineTuned(nn.Module):
    def __init__(self, encoder, stays):
        super().__init__()
        self.encoder, self.head, self.stays = encoder, nn.Linear(16, 3), stays
        self.encoder.requires_grad_(False).eval()

    def train(self, mode=True):
        super().train(mode)
        if self.stays:
            self.encoder.eval()
        return self

    def forward(self, x):
        return self.head(self.encoder(x))


def program(stays):
    x, y = images()
    model = FineTuned(fit(cnn(), x, y)[:-1], stays)
    return examined(model.train(), x, y)


def buggy():
    return program(False)


def fixed():
    return program(True)
