"""How many networks a pack has at most, by device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import EVALUATION_BATCH, Job, Start, initial
from .network import PROBE

__all__ = ["MOST", "WIDTH", "footprint", "width"]

# On the CPU. LeNet with batch norm, batches of 256, one order of images: CPU time of an image by hand over that of an
# image and model here 1.66 at 4, 1.77 at 8, 1.96 at 16; one thread of a Zen 5, medians of 9 turns.
WIDTH = 16
# On CUDA, where small networks leave most of a GPU idle: as many as fit, and so many at most. Not measured: no GPU was
# at hand. LeNet in batches of 256 needs 30 MB a network.
MOST = 256
# Of the free memory: a quarter, as two graphs of the step are alive while ways are measured, and others may be there.
SHARE = 0.25
# Of the saved activations: gradients and what is not saved come on top.
PASSING = 2.0
# Of the parameters' bytes: values, gradient, rates, decay, owner (of eight bytes), scratch, two states; the networks
# themselves, their copy as new, and those of a checkpoint.
COPIES = 16


def width(job: Job, arm: str, settings: Mapping[str, Any]) -> int:
    """The most networks with these settings that train as one on the job's device."""
    if job.device.type != "cuda":
        return WIDTH
    model = initial(job, Start(0, arm, 0, settings))
    batch = max(settings["batch_size"], EVALUATION_BATCH)
    free, _ = torch.cuda.mem_get_info(job.device)
    fits = math.floor(SHARE * free / footprint(model, (job.data.channels, *job.data.size), batch))
    return min(MOST, max(1, fits))


def footprint(model: nn.Module, shape: tuple[int, ...], batch: int) -> float:
    """Estimated bytes that one network in training needs, on batches of so many images of `shape` (C, …).

    Formula: `PASSING · batch · saved + COPIES · parameters`, where `saved` are the bytes an image that autograd keeps
    for the backward pass, by a forward pass of a few random ones.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that no address is used again
        return tensor

    parameters = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    some = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(PROBE, *shape, dtype=some.dtype)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.train()(x)
    per_image = sum(storage.nbytes() for storage in saved.values()) / PROBE
    return PASSING * batch * per_image + COPIES * parameters
