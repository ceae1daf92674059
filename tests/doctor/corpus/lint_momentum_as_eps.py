"""A port from Keras writes BatchNormalization(momentum=0.8) as BatchNorm2d(c, 0.8), whose second argument is eps.

Modelled on eriklindernoren/PyTorch-GAN issue 116, "Infogan batchnorm2d layers have eps=0.8 ?",
https://github.com/eriklindernoren/PyTorch-GAN/issues/116
"""

CODES = {"NW914"}

PROGRAM = """
from torch import nn


class Discriminator(nn.Module):
    def __init__(self, channels):
        super().__init__()

        def block(inner, outer, norm=True):
            layers = [nn.Conv2d(inner, outer, 3, 2, 1, bias=not norm), nn.LeakyReLU(0.2), nn.Dropout2d(0.25)]
            if norm:
                layers.append(NORM)
            return layers

        self.blocks = nn.Sequential(*block(channels, 16, norm=False), *block(16, 32), *block(32, 64))
        self.validity = nn.Linear(64 * 4 * 4, 1)

    def forward(self, image):
        return self.validity(self.blocks(image).flatten(1))
"""


def buggy():
    return PROGRAM.replace("NORM", "nn.BatchNorm2d(outer, 0.8)")


def fixed():
    return PROGRAM.replace("NORM", "nn.BatchNorm2d(outer, momentum=0.2)")
