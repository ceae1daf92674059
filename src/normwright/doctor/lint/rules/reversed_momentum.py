"""NW911."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from ..models import keyword, norm_kind
from ..numbers import number
from ..rule import Found, Rule
from ..source import Source


class ReversedMomentum(Rule):
    """A batch norm's momentum is the weight of the old average, as in other libraries.

    What it does
        Finds a `momentum` of a batch norm from 0.9 up to, not including, 1.

    Why is this bad
        torch's momentum weighs the new batch: 0.1 by default. Keras, TensorFlow, JAX, CS231n and early editions of d2l
        weigh the old average: 0.99 or 0.9. With 0.9 in torch the running statistics are nearly those of the last batch,
        and the evaluation is as noisy as one batch.

    Example
        from torch import nn

        norm = nn.BatchNorm2d(64, eps=1e-3, momentum=0.99)

    Use instead
        from torch import nn

        norm = nn.BatchNorm2d(64, eps=1e-3, momentum=0.01)

    Fix safety
        Only running statistics change; recalibrate a network that is already trained.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html, the note on momentum
    """

    code = "NW911"
    name = "reversed-momentum"
    severity = "warning"
    words = ("momentum",)

    def find(self, source: Source) -> Iterable[Found]:
        for call in source.calls:
            given = _momentum(source, call)
            if given is None:
                continue
            value = number(source, given)
            if value is not None and 0.9 <= value < 1:
                message = f"momentum={value:g} weighs the new batch: torch's momentum is not that of the old average"
                yield Found(given, message, f"momentum={round(1 - value, 6):g}")


def _momentum(source: Source, call: ast.Call) -> ast.expr | None:
    """The momentum that a call gives to a batch norm that tracks statistics, also through `functools.partial`."""
    qual = source.qual(call.func)
    if qual == "functools.partial" and call.args and norm_kind(source.qual(call.args[0])) == "batch":
        given = keyword(call, "momentum")
    elif norm_kind(qual) == "batch":
        given = keyword(call, "momentum", 1 if ".Lazy" in qual else 2)
    else:
        return None
    tracking = keyword(call, "track_running_stats", 4)
    return None if isinstance(tracking, ast.Constant) and not tracking.value else given
