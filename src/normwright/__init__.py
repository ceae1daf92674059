"""Normalization in PyTorch networks: fast, correct and understood."""

from typing import TYPE_CHECKING, Any

from torch.nn import LocalResponseNorm

from .allocator import AllocatorTuning, tune_allocator
from .catalog import CATALOG
from .functional import ACTIVATIONS, activate, normalize
from .gradcheck import GradcheckReport, gradcheck
from .kernels.dispatch import explain, use
from .kernels.timed import Calibration, calibrate
from .layers.batch_renorm import BatchRenorm, schedule_batch_renorm
from .layers.dyt import DyT
from .layers.evonorm import EvoNormB0, EvoNormS0
from .layers.grn import GRN
from .layers.norm import ChannelNorm, FilterResponseNorm, GhostBatchNorm, Norm
from .layers.probability_integral import ProbabilityIntegralTransform
from .layers.split_batch_norm import SplitBatchNorm
from .layers.switch_norm import SwitchNorm
from .layers.sync_batch_norm import SyncBatchNorm, distributed_data_parallel, virtual_sync
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
from .layers.weight_standardization import ScaledStdConv2d, WeightStandardization, activation_gain, standardize_weights
from .layers.whitening import Whitening
from .spec import NormSpec, PatternError

if TYPE_CHECKING:
    from . import doctor
    from .doctor import Finding, Report, diagnose, intended, watch
    from .surgery import (
        Edit,
        Receipt,
        absorb_bias,
        accelerate,
        adapt,
        convert,
        fold,
        freeze,
        from_flax,
        from_keras,
        join_domains,
        param_groups,
        recalibrate,
        split_domains,
        swap_ema,
        to_flax,
        to_keras,
        unfreeze,
    )

__version__ = "0.1.0"
__all__ = [
    "ACTIVATIONS",
    "CATALOG",
    "GRN",
    "AllocatorTuning",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "Calibration",
    "ChannelNorm",
    "DyT",
    "Edit",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "Finding",
    "GhostBatchNorm",
    "GradcheckReport",
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
    "LocalResponseNorm",
    "Norm",
    "NormSpec",
    "PatternError",
    "ProbabilityIntegralTransform",
    "RMSNorm",
    "Receipt",
    "Report",
    "ScaledStdConv2d",
    "SplitBatchNorm",
    "SwitchNorm",
    "SyncBatchNorm",
    "WeightStandardization",
    "Whitening",
    "absorb_bias",
    "accelerate",
    "activate",
    "activation_gain",
    "adapt",
    "calibrate",
    "convert",
    "diagnose",
    "distributed_data_parallel",
    "doctor",
    "explain",
    "fold",
    "freeze",
    "from_flax",
    "from_keras",
    "gradcheck",
    "intended",
    "join_domains",
    "normalize",
    "param_groups",
    "recalibrate",
    "schedule_batch_renorm",
    "split_domains",
    "standardize_weights",
    "swap_ema",
    "to_flax",
    "to_keras",
    "tune_allocator",
    "unfreeze",
    "use",
    "virtual_sync",
    "watch",
]


# a quarter of this package's import time, so at first use
_SURGERY = {
    "Edit",
    "Receipt",
    "absorb_bias",
    "accelerate",
    "adapt",
    "convert",
    "fold",
    "freeze",
    "from_flax",
    "from_keras",
    "join_domains",
    "param_groups",
    "recalibrate",
    "split_domains",
    "swap_ema",
    "to_flax",
    "to_keras",
    "unfreeze",
}
_DOCTOR = {"Finding", "Report", "diagnose", "intended", "watch"}


def __getattr__(name: str) -> Any:
    if name in _SURGERY:
        from . import surgery

        return getattr(surgery, name)
    if name in _DOCTOR or name == "doctor":
        from importlib import import_module

        doctor = import_module(".doctor", __name__)
        return doctor if name == "doctor" else getattr(doctor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
