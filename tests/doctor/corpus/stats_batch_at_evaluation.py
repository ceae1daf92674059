"""A norm without running statistics makes the score of one picture depend on the others in the batch.

Modelled on facebookresearch/pytorch_GAN_zoo issue 118, "Discriminator variability on the same image when in different
batches", https://github.com/facebookresearch/pytorch_GAN_zoo/issues/118
"""

from torch import nn

from .common import cnn, examined, fit, images

CODES = {"NW109"}


def program(track):
    x, y = images()
    return examined(fit(cnn(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=track)), x, y), x, y)


def buggy():
    return program(False)


def fixed():
    return program(True)
