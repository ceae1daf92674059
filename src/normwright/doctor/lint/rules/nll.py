"""NW916."""

from __future__ import annotations

from collections.abc import Iterable

from ..losses import losses
from ..models import output
from ..rule import Found, Rule
from ..source import Source


class ProbabilitiesIntoNll(Rule):
    """Probabilities are given to the negative log-likelihood, which takes their logarithms.

    What it does
        Finds `NLLLoss` and `F.nll_loss` whose input certainly is the output of a softmax.

    Why is this bad
        The loss takes no logarithm: with probabilities it is minus the probability of the label. It falls and is
        negative, and its gradient vanishes for the examples that are most wrong.

    Example
        import torch.nn.functional as F

        def loss_of(scores, labels):
            return F.nll_loss(F.softmax(scores, dim=1), labels)

    Use instead
        import torch.nn.functional as F

        def loss_of(scores, labels):
            return F.nll_loss(F.log_softmax(scores, dim=1), labels)

    Fix safety
        None needed; code that shows the network's output as probabilities must take the exponential.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html
    """

    code = "NW916"
    name = "probabilities-into-nll"
    severity = "error"
    words = ("nll_loss", "NLLLoss")

    def find(self, source: Source) -> Iterable[Found]:
        for call, given in losses(source, {"torch.nn.NLLLoss", "torch.nn.functional.nll_loss"}):
            if output(source, given) == "softmax":
                message = "the negative log-likelihood takes logarithms, and is given the output of a softmax"
                yield Found(call, message, "log_softmax in place of softmax, or cross_entropy on the logits")
