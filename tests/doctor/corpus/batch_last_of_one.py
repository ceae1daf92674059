"""The training set does not divide by the batch size, and the last batch of an epoch holds one sample.

Modelled on fastai/fastai issue 1352, "\"Expected more than 1 value per channel when training\".",
https://github.com/fastai/fastai/issues/1352
"""

from torch.utils.data import DataLoader, TensorDataset

from .common import blobs, examined, fit, mlp

CODES = {"NW203"}


def program(drop_last):
    x, y = blobs(257)
    model = fit(mlp(), x, y)
    data = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, drop_last=drop_last)
    return examined(model, x, y, loader=data)


def buggy():
    return program(False)


def fixed():
    return program(True)
