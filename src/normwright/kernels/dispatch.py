"""Which kernel runs: `choose` decides, `explain` says why, `use` demands.

A backend is a module with `prepare(call, demanded)`, which returns a sentence that says why it cannot run this call, or
(unless it was demanded) should not, and otherwise whatever it wants back in `normalize(call, prepared)`. The order of
`BACKENDS` is the order of preference; native, which comes after them, refuses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import cpu, native, triton
from .call import Call

__all__ = [
    "BACKENDS",
    "Choice",
    "Explanation",
    "Recorded",
    "at_once",
    "explain",
    "own_backend",
    "recorded",
    "run",
    "use",
]


# name -> module, best first
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton}
# the backend that a device has; another's refusal would say nothing
_OWN = {"cpu": "cpu", "cuda": "triton"}

_demanded: str | None = None
_record: Recorded | None = None


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


class Recorded(NamedTuple):
    """What a forward pass did: a choice for every call, the call itself without its values, and who owns a tensor."""

    choices: list[Choice]
    calls: list[Call]
    devices: list[torch.device]
    owners: dict[int, str]


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
    """Demand a kernel by name (`"native"`, `"cpu"`, `"triton"`), or `None` to choose freely again; process-wide.

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


def own_backend(device: torch.device) -> str | None:
    """The name of the backend that is a device's own."""
    return _OWN.get(device.type)


def at_once(x: Tensor, operator: str, act: str | None, residual: Tensor | None) -> bool:
    """Whether torch's operator may run without asking: too few values for a kernel, and nobody demands or watches."""
    return (
        x.is_cpu
        and _demanded is None
        and _record is None
        and not torch.compiler.is_compiling()
        and cpu.few(x, operator, act is not None or residual is not None)
        and x.numel() != 0
        and (residual is None or residual.shape == x.shape)
    )


def run(call: Call) -> Tensor:
    """Run the call on the demanded backend, or on the first that does not refuse."""
    refused: dict[str, str] = {}
    chosen, backend, prepared = "native", native, None
    if _demanded != "native":
        own = own_backend(call.x.device)
        for name, candidate in BACKENDS.items():
            if name != _demanded and (_demanded is not None or own not in (None, name)):
                continue
            prepared = candidate.prepare(call, _demanded is not None)
            if not isinstance(prepared, str):
                chosen, backend = name, candidate
                break
            refused[name] = prepared
        if _demanded is not None and chosen != _demanded:
            raise RuntimeError(
                f"The kernel {_demanded!r} was demanded and cannot run {call.spec.pattern!r} on a "
                f"{call.x.dtype} tensor of shape {tuple(call.x.shape)} on {call.x.device}: {refused[_demanded]}. "
                f"Demand another with nw.use(...), or nw.use(None) to let the library choose."
            )
    if _record is not None:
        owned = (call.weight, call.bias, call.running_mean, call.running_var)
        where = next((_record.owners[id(t)] for t in owned if id(t) in _record.owners), "")
        _record.choices.append(Choice(chosen, refused, call.spec.pattern, tuple(call.x.shape), where))
        _record.devices.append(call.x.device)
        _record.calls.append(call._replace(**{name: _shadow(getattr(call, name)) for name in _TENSORS}))
    return backend.normalize(call, prepared)


_TENSORS = ("x", "weight", "bias", "running_mean", "running_var", "residual", "mask")


def _shadow(t: Tensor | None) -> Tensor | None:
    """Size, strides, type and whether a gradient is wanted, and no values."""
    if t is None:
        return None
    shadow = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return shadow.requires_grad_(t.requires_grad) if t.is_floating_point() else shadow


def recorded(module: nn.Module, inputs: tuple, kwargs: dict[str, object]) -> Recorded:
    """Run the forward pass once and record it; buffers and the random state of the CPU are put back afterwards."""
    global _record
    owners = {
        id(tensor): name or type(child).__name__
        for name, child in module.named_modules()
        for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False))
    }
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    previous, _record = _record, Recorded([], [], [], owners)
    try:
        with torch.random.fork_rng(devices=[]):
            module(*inputs, **kwargs)
        return _record
    finally:
        _record = previous
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def explain(module: nn.Module, *inputs: object, **kwargs: object) -> Explanation:
    """Say which kernel each normalization in `module(*inputs)` runs on, and why not a faster one.

    Runs the forward pass once; buffers and the random state of the CPU are put back afterwards. What is faster depends
    on whether a backward pass follows: the answer is for torch's grad mode as it is, so ask for inference under
    `torch.no_grad()`. Layers are named by the parameters or buffers that their kernel is given.
    """
    return Explanation(tuple(recorded(module, inputs, kwargs).choices))
