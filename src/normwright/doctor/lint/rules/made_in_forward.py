"""NW912."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..models import keyword, norm_kind
from ..rule import Found, Rule
from ..source import Source, dotted

LEARNED = {
    f"torch.nn.{name}"
    for name in ("Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d",
                 "ConvTranspose3d", "LazyLinear", "LazyConv1d", "LazyConv2d", "LazyConv3d", "Embedding", "LSTM", "GRU",
                 "RNN")
}  # fmt: skip


class LayerMadeInForward(Rule):
    """A layer with parameters or statistics is made anew in each forward.

    What it does
        Finds batch norms, convolutions, dense and recurrent layers that `forward` of a module makes and runs at once.

    Why is this bad
        Such a layer is not part of the network: its parameters are never trained and random again in each forward, its
        running statistics never leave their first batch, `eval()` does not reach it (it always normalizes by the
        batch), and it is not saved.

    Example
        from torch import nn

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3)

            def forward(self, x):
                x = self.conv(x)
                return nn.BatchNorm2d(8)(x)

    Use instead
        from torch import nn

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3)
                self.norm = nn.BatchNorm2d(8)

            def forward(self, x):
                x = self.conv(x)
                return self.norm(x)

    Fix safety
        The network gains keys in `state_dict` and must be trained again.

    References
        https://docs.pytorch.org/docs/stable/notes/modules.html#modules-as-building-blocks
    """

    code = "NW912"
    name = "layer-made-in-forward"
    severity = "error"
    words = ("forward",)

    def find(self, source: Source) -> Iterable[Found]:
        for call in source.calls:
            qual = source.qual(call.func)
            if norm_kind(qual) != "batch" and qual not in LEARNED:
                continue
            function = source.function(call)
            if function is None or function.name != "forward" or source.scope(call) is not function:
                continue
            cls = source.owner(call)
            if cls is None or not source.is_module(cls) or _stateless(call, qual):
                continue
            if _run_at_once(source, call, function):
                name = qual.rpartition(".")[2]
                message = f"{name} is made in forward, new in each call: never trained, saved or set to evaluation"
                yield Found(call, message, "make it in __init__ and keep it on self")


def _stateless(call: ast.Call, qual: str) -> bool:
    """A batch norm without parameters and statistics is a function of its input."""
    if norm_kind(qual) != "batch":
        return False
    given = [keyword(call, "affine", 3), keyword(call, "track_running_stats", 4)]
    return all(isinstance(value, ast.Constant) and value.value is False for value in given)


def _run_at_once(source: Source, call: ast.Call, function: Any) -> bool:
    """Whether the layer is called where it is made, or by the local name that it gets."""
    made: ast.AST = call
    parent = source.parents[made]
    while isinstance(parent, ast.Attribute) and parent.attr in ("to", "cuda", "double", "half"):
        made = source.parents[parent]
        parent = source.parents[made]
    if isinstance(parent, ast.Call) and parent.func is made:
        return True
    if not isinstance(parent, ast.Assign) or parent.value is not made or len(parent.targets) != 1:
        return False
    name = dotted(parent.targets[0])
    if name.startswith("self."):
        # set anew without condition in each forward; `if self.norm is None:` makes it once
        return parent in function.body and any(
            isinstance(n, ast.Call) and dotted(n.func) == name for n in ast.walk(function)
        )
    uses = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
    calls = [source.parents[n] for n in uses]
    return bool(uses) and all(isinstance(c, ast.Call) and c.func is n for c, n in zip(calls, uses, strict=True))
