"""The critic of a WGAN with gradient penalty has batch norm, and a sample's gradient depends on the other samples.

Modelled on hwalsuklee/tensorflow-generative-model-collections issue 17, "Question about batch normalization in
WGAN_GP", https://github.com/hwalsuklee/tensorflow-generative-model-collections/issues/17
"""

import torch
from torch import nn

from .common import images

CODES = {"NW706"}


class Critic(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, 2, 1, bias=norm is not nn.BatchNorm2d), norm(32), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(32 * 16, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


def program(norm):
    real, _ = images(64, size=16)
    fake = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    critic = Critic(norm)

    def loss(scores):
        mix = torch.rand(64, 1, 1, 1)
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return critic(fake).mean() - scores.mean() + 10 * penalty

    return {"model": critic, "inputs": real, "loss": loss}


def buggy():
    return program(nn.BatchNorm2d)


def fixed():
    return program(lambda c: nn.GroupNorm(8, c))
