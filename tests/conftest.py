"""Shared fixtures: every test starts from the same random state and leaves torch's settings as it found them."""

from __future__ import annotations

import os

# before torch is imported, here and in the processes that tests start: two workers share two cores, and the waiting
# threads of one would stall every parallel loop of the other for milliseconds. Tests of threads ask for theirs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# before triton is imported, by whomever: its own functions are interpreted or compiled from then on. With a GPU too,
# for the tests' tensors are on the CPU; there `normwright bench --device cuda` checks every row before it times it
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
