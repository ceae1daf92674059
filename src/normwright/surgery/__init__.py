"""Operations that mend a model, each `op(model, …) -> Receipt`."""

from .absorb_bias import absorb_bias
from .accelerate import accelerate
from .adapt import adapt
from .conventions import Translated, from_flax, from_keras, to_flax, to_keras
from .convert import convert
from .fold import fold
from .freeze import freeze, unfreeze
from .param_groups import param_groups
from .recalibrate import recalibrate
from .receipt import Edit, Receipt
from .split_domains import join_domains, split_domains
from .swap_ema import swap_ema

__all__ = [
    "Edit",
    "Receipt",
    "Translated",
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
]
