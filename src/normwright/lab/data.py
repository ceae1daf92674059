"""Image sets, whole and in memory: from scikit-learn, a checked download, IDX files, CIFAR batches, folders and zips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Dataset", "load"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification set of images, all of it in memory, scaled once.

    `x_train`, `x_test`: (N, C, H, W) float32 in [0, 1]; `y_train`, `y_test`: (N,) int64 below `len(classes)`.
    `source` says in words where the images come from and how they were split or resized. `sha256` is the hash of the
    images as stored (before scaling), the labels and the class names: what the journal keeps.
    """

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: tuple[str, ...]
    source: str
    sha256: str

    @property
    def channels(self) -> int:
        return self.x_train.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.x_train.shape[2], self.x_train.shape[3]

    def to(self, device: torch.device | str) -> Dataset:
        """The same set with its tensors on `device`."""
        raise NotImplementedError


def load(
    name_or_path: str | Path, data_dir: Path | None = None, *, limit: int | None = None, progress: bool = True
) -> Dataset:
    """Load a set by name (`digits`, `fashion-mnist`) or from a path; every fault of the input is a `UserError`.

    `data_dir`: folder with Fashion-MNIST's files. `limit`: at most so many training and so many test images, spread
    evenly over the classes. `progress`: draw a bar on the terminal for what takes long (download, decoding).
    """
    raise NotImplementedError
