"""Operations that mend a model, each `op(model, …) -> Receipt`."""

from .accelerate import accelerate
from .fold import fold
from .param_groups import param_groups
from .recalibrate import recalibrate
from .receipt import Edit, Receipt

__all__ = ["Edit", "Receipt", "accelerate", "fold", "param_groups", "recalibrate"]
