"""A network in PyTorch gives its batch norms the momentum of another library.

Modelled on kazuto1011/deeplab-pytorch issue 79, "BatchNorm Momentum Setting in Pytorch",
https://github.com/kazuto1011/deeplab-pytorch/issues/79
"""

CODES = {"NW911"}

PROGRAM = """
from torch import nn


class ConvNormReLU(nn.Sequential):
    def __init__(self, inner, outer, kernel, stride=1, dilation=1, relu=True):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.add_module("conv", nn.Conv2d(inner, outer, kernel, stride, padding, dilation, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outer, eps=1e-5, momentum=MOMENTUM))
        if relu:
            self.add_module("relu", nn.ReLU())
"""


def buggy():
    return PROGRAM.replace("MOMENTUM", "0.999")


def fixed():
    return PROGRAM.replace("MOMENTUM", "0.001")
