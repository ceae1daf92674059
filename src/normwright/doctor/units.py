"""When units count as dead: what the checks of activations share."""

from __future__ import annotations

__all__ = ["MANY", "enough_dead"]

# batches: a unit that answers in half of them is taken for dead once in 256
MANY = 8


def enough_dead(dead: int, units: int) -> bool:
    """Whether more units are dead than chance puts on one side: half, and 4.75 deviations of a fair coin (1e-6).

    Behind a pooling, as in squeeze-and-excitation, what a unit reads hardly varies, and half of the units are off for
    every sample by their random weights alone, in a healthy network.
    """
    return dead > units / 2 + 4.75 * units**0.5 / 2
