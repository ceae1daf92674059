"""What is timed: a row is a norm on a shape, layout and type, with what follows it and the passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

FAMILIES = ("BN", "IN", "GN", "LN", "RMS")


@dataclass(frozen=True)
class Row:
    """What is timed.

    Arguments:
        family: one of `FAMILIES`. IN is affine; GN has 32 groups, or two channels a group where there are fewer.
        layout: "NCHW", "NHWC" (channels_last), or "" for the dense shapes, which have one layout.
        dtype: of input, residual and gradient. Parameters are float32 for BN, IN and GN, as under autocast, and of the
            input's type for LN and RMS, as in a transformer in bfloat16 (torch's RMS norm warns of any other).
        training: batch statistics; otherwise the running ones.
        backward: with gradients and backward; otherwise forward alone, without gradients.
        forward: whether forward is timed; if not, backward alone is, again and again through one graph.
    """

    family: str
    shape: tuple[int, ...]
    layout: str = ""
    dtype: torch.dtype = torch.float32
    act: str | None = None
    residual: bool = False
    training: bool = True
    backward: bool = True
    forward: bool = True

    @property
    def norm(self) -> str:
        """The norm with what follows it, such as "BN+add+relu"."""
        return "+".join([self.family, *(["add"] if self.residual else []), *([self.act] if self.act else [])])

    @property
    def passes(self) -> str:
        """The mode and the passes, such as "train fwd+bwd"."""
        passes = "+".join([*(["fwd"] if self.forward else []), *(["bwd"] if self.backward else [])])
        return f"{'train' if self.training else 'eval'} {passes}"

    @property
    def name(self) -> str:
        """All of it in words; what `--filter` looks at."""
        size = "×".join(map(str, self.shape))
        return " ".join(part for part in (self.norm, size, self.layout, dtype_name(self.dtype), self.passes) if part)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def statistics_of(row: Row) -> int:
    """The number of statistics."""
    N, C = row.shape[:2]
    if row.family == "BN":
        return C
    if row.family == "IN":
        return N * C
    return N * (32 if C >= 64 else max(1, C // 2)) if row.family == "GN" else N


def least_traffic(row: Row, cache_bytes: int) -> int:
    """The least that must move between memory and processor, in sizes of the tensor.

    Forward reads x and writes y: 2, and with training 3 if a tile does not stay in cache between its two readings; a
    residual adds 1. Backward reads x and dy and writes dx: 3, or 5 if they must be read again; with a residual and an
    activation it writes the residual's gradient: 1 more. A tile is what one statistic sums (for NHWC, whose statistics
    lie side by side, the sample or, for batch norm, the batch); it stays if it fits into `cache_bytes`: a core's
    second-level cache, or registers and shared memory of a GPU's multiprocessor.
    """
    side_by_side = row.layout == "NHWC" or (row.family == "BN" and len(row.shape) == 2)
    tiles = statistics_of(row)
    if side_by_side:
        tiles = 1 if row.family == "BN" else row.shape[0]
    tile = math.prod(row.shape) // tiles * row.dtype.itemsize
    again = row.training or row.family in ("LN", "RMS", "IN", "GN")
    forward = 2 + row.residual + (again and tile > cache_bytes)
    backward = 3 + (row.residual and row.act is not None) + 2 * (again and 2 * tile > cache_bytes)
    return row.forward * forward + row.backward * backward


LENET = [(256, 6, 24, 24), (256, 16, 8, 8), (256, 120), (256, 84)]
RESNET = [
    (32, 64, 112, 112), (32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7),
    (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7),
]  # fmt: skip
# every input of a batch norm of torchvision's ResNet-50, at a batch that fills a GPU
RESNET50 = [
    (128, 64, 112, 112), (128, 64, 56, 56), (128, 256, 56, 56), (128, 128, 56, 56), (128, 128, 28, 28),
    (128, 512, 28, 28), (128, 256, 28, 28), (128, 256, 14, 14), (128, 1024, 14, 14), (128, 512, 14, 14),
    (128, 512, 7, 7), (128, 2048, 7, 7),
]  # fmt: skip
LONG_ROWS = [(8192, 1024), (8192, 2048), (8192, 4096), (4096, 8192), (4096, 16384)]
IMAGES = [(32, 64, 56, 56), (32, 256, 14, 14)]
TOKENS = [(8192, 768), (2048, 4096), (12608, 384)]
TINY = (8, 4, 8, 8)
BN_VARIANTS: list[dict[str, Any]] = [{}, {"act": "relu"}, {"act": "sigmoid"}, {"act": "relu", "residual": True}]
DTYPES = (torch.float32, torch.bfloat16)


def rows(device: str = "cpu") -> list[Row]:
    """The whole set for a device.

    On the CPU: training steps at the shapes of LeNet, ResNet-18, ResNet-50 and transformers, then forward alone. The
    steps are forward and backward, in float32 and bfloat16, images in both layouts, and a tiny input. Forward alone,
    training and evaluation, is taken at a few of these shapes; so are gelu, silu, float64 and float16.

    On "cuda": training steps of ResNet-50's batch norms at batch 128, alone, with ReLU and with addition and ReLU, in
    both layouts; layer and RMS norm of rows of 1024 to 16384 values, forward alone and backward alone; all in float32
    and bfloat16.
    """
    if device == "cuda":
        return list(_cuda_rows())
    return list(dict.fromkeys([*_training_rows(), *_forward_rows(), *_other_rows()]))


def quick_rows(device: str = "cpu") -> list[Row]:
    """A dozen small rows that cover every family, layout, type and direction."""
    small = (32, 64, 14, 14)
    if device == "cuda":
        # torch's group norm on CUDA takes no float32 parameters with a bfloat16 input
        found = [row for row in quick_rows() if row.family != "GN" or row.dtype == torch.float32]
        for family in ("LN", "RMS"):
            found += [
                Row(family, (2048, 384), "", torch.bfloat16, backward=False),
                Row(family, (2048, 384), forward=False),
            ]
        return found
    return [
        Row("BN", (256, 120)),
        Row("BN", small, "NCHW", act="relu"),
        Row("BN", small, "NHWC", act="relu", residual=True),
        Row("BN", small, "NCHW", torch.bfloat16, act="sigmoid"),
        Row("BN", small, "NCHW", act="relu", training=False, backward=False),
        Row("IN", small, "NCHW"),
        Row("IN", small, "NHWC"),
        Row("GN", small, "NCHW"),
        Row("GN", small, "NHWC", torch.bfloat16),
        Row("LN", (2048, 384)),
        Row("RMS", (2048, 384)),
        Row("BN", TINY, "NCHW"),
    ]


def _layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("NCHW", "NHWC") if len(shape) == 4 else ("",)


def _training_rows() -> Iterator[Row]:
    for dtype in DTYPES:
        for variant in BN_VARIANTS:
            for shape in (*LENET, *RESNET):
                for layout in _layouts(shape):
                    yield Row("BN", shape, layout, dtype, **variant)
        for family in ("IN", "GN"):
            for shape in IMAGES:
                for layout in _layouts(shape):
                    yield Row(family, shape, layout, dtype)
        for family in ("LN", "RMS"):
            for shape in TOKENS:
                yield Row(family, shape, "", dtype)
    for variant in BN_VARIANTS:
        yield Row("BN", TINY, "NCHW", **variant)
    for family in ("IN", "GN"):
        yield Row(family, TINY, "NCHW")
    for family in ("LN", "RMS"):
        yield Row(family, (8, 256))


def _forward_rows() -> Iterator[Row]:
    for training in (True, False):
        for variant in BN_VARIANTS[:2]:
            for layout in ("NCHW", "NHWC"):
                yield Row("BN", (32, 256, 14, 14), layout, **variant, training=training, backward=False)
    yield Row("BN", (32, 256, 14, 14), "NCHW", act="relu", training=False, backward=True)  # a frozen batch norm
    for family in ("IN", "GN"):
        yield Row(family, (32, 256, 14, 14), "NCHW", backward=False)
    for family in ("LN", "RMS"):
        yield Row(family, (8192, 768), backward=False)


def _other_rows() -> Iterator[Row]:
    for act in ("leaky_relu", "tanh", "silu", "gelu"):
        yield Row("BN", (32, 256, 14, 14), "NCHW", act=act)
    for dtype in (torch.float64, torch.float16):
        yield Row("BN", (32, 256, 14, 14), "NCHW", dtype)
        yield Row("LN", (2048, 4096), "", dtype)


def _cuda_rows() -> Iterator[Row]:
    variants = [variant for variant in BN_VARIANTS if variant.get("act") != "sigmoid"]
    for dtype in DTYPES:
        for variant in variants:
            for shape in RESNET50:
                for layout in _layouts(shape):
                    yield Row("BN", shape, layout, dtype, **variant)
        for family in ("LN", "RMS"):
            for shape in LONG_ROWS:
                yield Row(family, shape, "", dtype, backward=False)
                yield Row(family, shape, "", dtype, forward=False)
