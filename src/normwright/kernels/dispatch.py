"""Which kernel runs: `choose` decides, `explain` says why, `use` demands.

A backend is a module with `refusal(call) -> str | None` (why it cannot or should not run this call; None if it does)
and `normalize(*call)`. The order of `BACKENDS` is the order of preference; native refuses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..spec import NormSpec
from . import native

__all__ = ["BACKENDS", "Call", "Choice", "Explanation", "choose", "explain", "use"]


class Call(NamedTuple):
    """One normalization to be done: the arguments of `functional.normalize`, all of them."""

    x: Tensor
    spec: NormSpec
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    use_batch_stats: bool
    new_weight: float
    eps: float
    act: str | None
    residual: Tensor | None
    mask: Tensor | None


# name -> module, best first
BACKENDS: dict[str, ModuleType] = {}

_demanded: str | None = None
_record: list[Choice] | None = None


@dataclass(frozen=True)
class Choice:
    """The kernel that one call gets, and why the better ones were refused."""

    kernel: str
    refused: dict[str, str]
    pattern: str
    shape: tuple[int, ...]
    where: str = ""

    def __str__(self) -> str:
        call = f"{self.where or 'call'}: {self.pattern!r} on {tuple(self.shape)} runs on {self.kernel}"
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.refused.items())
        return f"{call} ({why})" if why else call


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: one `Choice` for every normalization that the forward pass did."""

    choices: tuple[Choice, ...]

    @property
    def kernel(self) -> str:
        """The kernel of the first call."""
        return self.choices[0].kernel

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices)) or "no call of normwright's kernels"


class use:
    """Demand a kernel by name (`"native"`, `"cpu"`), or `None` to choose freely again; process-wide.

    Takes effect at once; as a context manager it is undone on leaving. A demanded kernel that cannot run a call raises
    and never falls back.

    Example:
        >>> import normwright as nw
        >>> with nw.use("native"):
        ...     layer = nw.LayerNorm(8)
    """

    def __init__(self, kernel: str | None) -> None:
        global _demanded
        if kernel is not None and kernel != "native" and kernel not in BACKENDS:
            known = ", ".join(map(repr, (*BACKENDS, "native")))
            raise ValueError(f"A kernel is one of {known}, or None for the best; got {kernel!r}.")
        self._previous, _demanded = _demanded, kernel

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exception: object) -> None:
        global _demanded
        _demanded = self._previous


def choose(call: Call) -> ModuleType:
    """The backend for this call: the demanded one, or the first that does not refuse."""
    if _demanded == "native" or torch.compiler.is_exporting():
        chosen, refused = "native", dict.fromkeys(BACKENDS, "native was demanded")
    else:
        chosen, refused = "native", {}
        for name, backend in BACKENDS.items():
            reason = backend.refusal(call) if _demanded in (None, name) else f"{_demanded} was demanded"
            if reason is None:
                chosen = name
                break
            refused[name] = reason
        if _demanded is not None and chosen != _demanded:
            raise RuntimeError(
                f"The kernel {_demanded!r} was demanded and cannot run {call.spec.pattern!r} on a "
                f"{call.x.dtype} tensor of shape {tuple(call.x.shape)} on {call.x.device}: {refused[_demanded]}. "
                f"Demand another with nw.use(...), or nw.use(None) to let the library choose."
            )
    if _record is not None:
        _record.append(Choice(chosen, refused, call.spec.pattern, tuple(call.x.shape)))
    return native if chosen == "native" else BACKENDS[chosen]


def explain(module: nn.Module, *inputs: object, **kwargs: object) -> Explanation:
    """Say which kernel each normalization in `module(*inputs)` runs on, and why not a faster one.

    Runs the forward pass once without gradients; buffers and the random state of the CPU are put back afterwards.
    """
    global _record
    names = {child: name or type(child).__name__ for name, child in module.named_modules()}
    found: list[Choice] = []

    def leave(child: nn.Module, args: object, output: object) -> None:
        while len(found) < len(record):
            choice = record[len(found)]
            found.append(Choice(choice.kernel, choice.refused, choice.pattern, choice.shape, names[child]))

    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    handles = []
    record: list[Choice] = []
    previous, _record = _record, record
    try:
        for child in names:
            handles.append(child.register_forward_hook(leave))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module(*inputs, **kwargs)
    finally:
        _record = previous
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return Explanation(tuple(found))
