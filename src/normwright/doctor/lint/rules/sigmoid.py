"""NW915."""

from __future__ import annotations

from collections.abc import Iterable

from ..losses import losses
from ..models import output
from ..rule import Found, Rule
from ..source import Source

WITH_LOGITS = {
    "torch.nn.BCEWithLogitsLoss",
    "torch.nn.functional.binary_cross_entropy_with_logits",
    "torch.nn.MultiLabelSoftMarginLoss",
    "torch.nn.functional.multilabel_soft_margin_loss",
}


class SigmoidIntoLogitsLoss(Rule):
    """Probabilities are given to a binary cross-entropy that takes logits.

    What it does
        Finds `BCEWithLogitsLoss`, `F.binary_cross_entropy_with_logits` and the multi-label soft margin loss whose input
        certainly is the output of a sigmoid or a softmax.

    Why is this bad
        The loss takes the sigmoid itself. Twice squashed, the prediction lies between 0.5 and 0.73: no example can be
        called negative, and the loss of a balanced problem stays above 0.5.

    Example
        import torch
        import torch.nn.functional as F

        def loss_of(scores, labels):
            return F.binary_cross_entropy_with_logits(torch.sigmoid(scores), labels)

    Use instead
        import torch
        import torch.nn.functional as F

        def loss_of(scores, labels):
            return F.binary_cross_entropy_with_logits(scores, labels)

    Fix safety
        A threshold of 0.5 on the network's output becomes one of 0 if the sigmoid leaves the network.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html
    """

    code = "NW915"
    name = "sigmoid-into-logits-loss"
    severity = "error"
    words = ("with_logits", "WithLogits", "oft_margin", "oftMargin")

    def find(self, source: Source) -> Iterable[Found]:
        for call, given in losses(source, WITH_LOGITS):
            kind = output(source, given)
            if kind in ("sigmoid", "softmax"):
                message = f"the loss takes logits, and is given the output of a {kind}"
                yield Found(call, message, f"drop the {kind}; the loss takes the sigmoid itself")
