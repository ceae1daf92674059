"""Operations that mend a model, each `op(model, …) -> Receipt`."""

from .accelerate import accelerate
from .adapt import adapt
from .conventions import Translated, from_flax, from_keras, to_flax, to_keras
from .convert import convert
from .fold import fold
from .freeze import freeze, unfreeze
from .param_groups import param_groups
from .recalibrate import recalibrate
from .receipt import Edit, Receipt

__all__ = [
    "Edit",
    "Receipt",
    "Translated",
    "accelerate",
    "adapt",
    "convert",
    "fold",
    "freeze",
    "from_flax",
    "from_keras",
    "param_groups",
    "recalibrate",
    "to_flax",
    "to_keras",
    "unfreeze",
]
