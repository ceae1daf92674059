"""Normalization in PyTorch networks: fast, correct and understood."""

from .catalog import CATALOG
from .functional import ACTIVATIONS, activate, normalize
from .kernels.dispatch import explain, use
from .layers.norm import ChannelNorm, FilterResponseNorm, GhostBatchNorm, Norm
from .layers.twins import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
    RMSNorm,
)
from .spec import NormSpec, PatternError

__version__ = "0.1.0"
__all__ = [
    "ACTIVATIONS",
    "CATALOG",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ChannelNorm",
    "FilterResponseNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "Norm",
    "NormSpec",
    "PatternError",
    "RMSNorm",
    "activate",
    "explain",
    "normalize",
    "use",
]
