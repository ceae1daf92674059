"""Who is timed beside torch eager and this package: torch.compile, quack and Liger."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case, layer_of
from .row import Row


def _compiled(case: Case) -> tuple[Callable[..., Tensor], nn.Module]:
    import torch._functorch.config as config

    torch.compiler.reset()
    # a buffer that backward may overwrite serves one backward only; the switch is what torch's own error names
    config.donated_buffer = case.row.forward
    return torch.compile(case.eager), case.eager.norm


def _liger(case: Case) -> tuple[Callable[..., Tensor], nn.Module]:
    from liger_kernel.transformers import LigerLayerNorm, LigerRMSNorm  # type: ignore[import-not-found]

    size = case.row.shape[-1]
    # in place, its backward would overwrite the dy of all turns to come
    norm = LigerLayerNorm(size, eps=1e-6) if case.row.family == "LN" else LigerRMSNorm(size, eps=1e-6, in_place=False)
    norm.load_state_dict(case.ours.state_dict())
    norm = norm.to(case.x.device, case.row.dtype)
    return norm, norm


class _QuackLayerNorm(torch.autograd.Function):
    """quack's layer norm, which it has as two functions without autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        from quack.rmsnorm import layernorm_fwd  # type: ignore[import-not-found]

        y, rstd, mean = layernorm_fwd(x, weight, bias, eps, return_rstd=True, return_mean=True)
        ctx.save_for_backward(x, weight, rstd, mean)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # type: ignore[override]
        from quack.rmsnorm import layernorm_bwd  # type: ignore[import-not-found]

        x, weight, rstd, mean = ctx.saved_tensors
        return (*layernorm_bwd(x, weight, dy, rstd, mean), None)


def _quack(case: Case) -> tuple[Callable[..., Tensor], nn.Module]:
    from quack.rmsnorm import layernorm_fwd, rmsnorm  # type: ignore[import-not-found]

    norm: Any = layer_of(case.row, nn)
    norm.load_state_dict(case.ours.state_dict())
    norm = norm.to(case.x.device)
    if case.row.family == "RMS":
        return lambda x: rmsnorm(x, norm.weight, eps=norm.eps), norm
    norm = norm.float()  # the only type of parameters that its layer norm takes
    if case.row.backward:
        return lambda x: _QuackLayerNorm.apply(x, norm.weight, norm.bias, norm.eps), norm  # type: ignore[return-value]
    return lambda x: layernorm_fwd(x, norm.weight, norm.bias, norm.eps), norm


# name -> distribution, and how its norm with the case's parameters is made
LIBRARIES = {"quack": ("quack-kernels", _quack), "Liger": ("liger-kernel", _liger)}


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def others_of(row: Row, compiled: bool, libraries: bool) -> dict[str, Callable[[Case], tuple]]:
    """Who is timed beside torch eager and ours, and how each is made."""
    found: dict[str, Callable[[Case], tuple]] = {"torch.compile": _compiled} if compiled else {}
    if libraries and row.family in ("LN", "RMS"):
        found |= {name: make for name, (distribution, make) in LIBRARIES.items() if installed(distribution)}
    return found
