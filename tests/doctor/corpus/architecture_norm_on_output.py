"""Batch norm stands behind the last layer of a regression: the prediction of a sample depends on the batch.

Modelled on Lab41/attalos pull request 89, "Regress2sum",
https://github.com/Lab41/attalos/pull/89
"""

import torch.nn.functional as F
from torch import nn

from .common import blobs, fit

CODES = {"NW704"}
MISSED = (
    "a batch norm that ends in floating-point targets is also right, as in distillation onto normalized embeddings; "
    "with shuffled batches it costs about 1 / batch size of the targets' variance, which no run tells from noise"
)


def program(norm):
    x, _ = blobs()
    y = x[:, :2] @ x.new_tensor([[1.0, -0.5], [0.3, 2.0]])
    layers = [nn.Linear(12, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2, bias=not norm)]
    model = nn.Sequential(*layers, *([nn.BatchNorm1d(2)] if norm else []))
    fit(model, x, y, loss=F.mse_loss, lr=0.01, steps=200)
    return {"model": model, "inputs": x[:64], "targets": y[:64], "loss": F.mse_loss}


def buggy():
    return program(True)


def fixed():
    return program(False)
