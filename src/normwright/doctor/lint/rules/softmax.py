"""NW904."""

from __future__ import annotations

from collections.abc import Iterable

from ..losses import losses
from ..models import output
from ..rule import Found, Rule
from ..source import Source


class SoftmaxIntoCrossEntropy(Rule):
    """Probabilities are given to the cross-entropy, which takes logits.

    What it does
        Finds `CrossEntropyLoss` and `F.cross_entropy` whose input certainly is the output of a softmax: directly,
        through names, or because the network of the same file ends in one.

    Why is this bad
        The loss takes the softmax itself. Twice softmaxed, ten classes cannot get below a loss of 1.46, and the
        gradient is small where the network is most wrong; training is slow and ends early, without any message.
        A log-softmax before the loss only costs time, as it is its own log-softmax; this rule is silent there.

    Example
        import torch.nn.functional as F
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(784, 10)

            def forward(self, x):
                return F.softmax(self.fc(x), dim=1)

        net = Net()
        criterion = nn.CrossEntropyLoss()

        def loss_of(batch, labels):
            return criterion(net(batch), labels)

    Use instead
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(784, 10)

            def forward(self, x):
                return self.fc(x)

        net = Net()
        criterion = nn.CrossEntropyLoss()

        def loss_of(batch, labels):
            return criterion(net(batch), labels)

    Fix safety
        The network then returns logits: take the softmax where probabilities are shown. The argmax is the same.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """

    code = "NW904"
    name = "softmax-into-cross-entropy"
    severity = "error"
    words = ("cross_entropy", "CrossEntropyLoss")

    def find(self, source: Source) -> Iterable[Found]:
        for call, given in losses(source, {"torch.nn.CrossEntropyLoss", "torch.nn.functional.cross_entropy"}):
            if output(source, given) == "softmax":
                message = "the cross-entropy takes logits, and is given the output of a softmax"
                yield Found(call, message, "drop the softmax; the loss takes it itself")
