"""NW914."""

from __future__ import annotations

from collections.abc import Iterable

from ..models import keyword, norm_kind
from ..numbers import number
from ..rule import Found, Rule
from ..source import Source


class MomentumAsEps(Rule):
    """A batch norm's eps is as large as a momentum.

    What it does
        Finds batch and instance norms with an `eps` of at least 0.05, by keyword or as the second argument.

    Why is this bad
        The second argument of torch's batch norm is eps. `BatchNorm2d(64, 0.8)` adds 0.8 to every variance: channels
        of small variance are hardly normalized, the output's deviation is well below one, and the momentum stays 0.1.

    Example
        from torch import nn

        norm = nn.BatchNorm2d(64, 0.8)

    Use instead
        from torch import nn

        norm = nn.BatchNorm2d(64, momentum=0.2)

    Fix safety
        A network that was trained with the large eps must keep it, or be trained again.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """

    code = "NW914"
    name = "momentum-as-eps"
    severity = "warning"
    words = ("Norm",)

    def find(self, source: Source) -> Iterable[Found]:
        for call in source.calls:
            qual = source.qual(call.func)
            if not norm_kind(qual):
                continue
            given = keyword(call, "eps", 0 if ".Lazy" in qual else 1)
            value = number(source, given)
            if given is not None and value is not None and value >= 0.05:
                message = f"eps={value:g} is added to every variance; was it meant as momentum?"
                yield Found(given, message, "give eps and momentum by keyword: momentum is the weight of the new batch")
