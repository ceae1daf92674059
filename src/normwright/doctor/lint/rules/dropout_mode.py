"""NW917."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from ..models import keyword
from ..rule import Found, Rule
from ..source import Function, Source

DROPOUTS = {
    f"torch.nn.functional.{name}"
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}


class DropoutWithoutMode(Rule):
    """`F.dropout` in a module's forward does not know the mode.

    What it does
        Finds `F.dropout` and its kin in `forward` of a module without the argument `training`, and not under a
        condition on `self.training`. With an explicit `training=True` it is taken as meant.

    Why is this bad
        The functional's `training` is true by default and `eval()` does not reach it: the network drops at evaluation
        too, its outputs are random, and its accuracy is lower than it could be.

    Example
        import torch.nn.functional as F
        from torch import nn

        class Head(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(64, 10)

            def forward(self, x):
                return self.fc(F.dropout(x, 0.5))

    Use instead
        import torch.nn.functional as F
        from torch import nn

        class Head(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(64, 10)

            def forward(self, x):
                return self.fc(F.dropout(x, 0.5, training=self.training))

    Fix safety
        Training is unchanged.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.dropout.html
    """

    code = "NW917"
    name = "dropout-without-mode"
    severity = "error"
    words = ("dropout",)

    def find(self, source: Source) -> Iterable[Found]:
        for call in source.calls:
            if source.qual(call.func) not in DROPOUTS or keyword(call, "training", 2) is not None:
                continue
            if any(k.arg is None for k in call.keywords) or any(isinstance(a, ast.Starred) for a in call.args):
                continue
            function, cls = source.function(call), source.owner(call)
            if function is None or cls is None or function.name != "forward" or not source.is_module(cls):
                continue
            if "prenet" in cls.name.lower():
                continue  # Tacotron 2 (arXiv:1712.05884, 2.2) drops in its pre-net at synthesis on purpose
            p = keyword(call, "p", 1)
            if (isinstance(p, ast.Constant) and p.value == 0) or _conditional(source, call):
                continue
            name = source.qual(call.func).rpartition(".")[2]
            message = f"{name} without training=self.training drops at evaluation too"
            yield Found(call, message, "training=self.training")


def _conditional(source: Source, call: ast.Call) -> bool:
    """Whether the call stands under a condition, or after a return, that asks for the mode."""
    for parent, _ in source.up(call):
        if isinstance(parent, Function):
            return any(
                isinstance(node, ast.If)
                and isinstance(node.body[-1], ast.Return)
                and node.lineno < call.lineno
                and any(isinstance(n, ast.Attribute) and n.attr == "training" for n in ast.walk(node.test))
                for node in parent.body
            )
        if isinstance(parent, (ast.If, ast.IfExp)) and any(
            "train" in getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(parent.test)
        ):
            return True
    return False
