"""Data made up for the tests of engines and executors."""

import pytest
import torch

from normwright.lab.data import Dataset


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(3, 1, 4, 4, generator=generator)

    def draw(n):
        y = torch.arange(n) % 3
        return centres[y] + 0.3 * torch.randn(n, 1, 4, 4, generator=generator), y

    (x_train, y_train), (x_test, y_test) = draw(100), draw(50)
    return Dataset("blobs", x_train, y_train, x_test, y_test, ("a", "b", "c"), "made up", "0" * 64)
