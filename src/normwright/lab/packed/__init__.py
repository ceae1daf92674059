"""Training K networks as one: channels concatenated, `(b, (k c), …)`, K outermost.

Runs that differ in their starting values, learning rate and weight decay alone do the same operations on other
numbers. Here each operation is done once for all: convolutions have K groups (the first a single ungrouped one where
all see the same images), dense layers are one `baddbmm`, norms are `[b] (k c) [s...]`, and an optimizer's step is a few
operations on one flat buffer of all parameters. A layer of an unknown kind runs K times, once for each network.

Equal to the sequential engine up to rounding: the sums inside convolutions and matrix products are taken in another
order. `pack` proves the forward passes equal before anything is trained. Dropout draws other masks, of the same law.
How convolutions are done is measured, so that the rounding may differ from one process to the next, too.
"""

from __future__ import annotations

from .fastest import fastest
from .leaves import CannotPack
from .network import Packed, pack
from .optimizer import FlatOptimizer
from .train import Step, evaluate, packed, train_epoch
from .width import WIDTH, width

__all__ = [
    "WIDTH",
    "CannotPack",
    "FlatOptimizer",
    "Packed",
    "Step",
    "evaluate",
    "fastest",
    "pack",
    "packed",
    "train_epoch",
    "width",
]
