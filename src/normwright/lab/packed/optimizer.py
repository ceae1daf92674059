"""K optimizers of torch as a few operations on one flat buffer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from .network import Packed

__all__ = ["FlatOptimizer"]

# What torch's optimizers keep of a parameter, beside the number of steps.
_STATE = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adagrad: ("sum",),
    torch.optim.RMSprop: ("square_avg",),
    torch.optim.Adadelta: ("square_avg", "acc_delta"),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
}


class FlatOptimizer:
    """The step of K optimizers of torch, alike but for learning rate and weight decay, on a pack's flat buffer.

    `optimizers[k]` is one that `engine.make_optimizer` made for network k, as new or with a state loaded; what they do
    is what torch's own classes document. `state_dict(k)` is what torch's own would be.
    """

    def __init__(self, pack: Packed, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.pack, self.kind = pack, type(optimizers[0])
        self.groups = [optimizer.param_groups[0] for optimizer in optimizers]
        self.dicts = [optimizer.state_dict() for optimizer in optimizers]
        first = self.groups[0]
        self.names = _STATE[self.kind]
        if self.kind is torch.optim.SGD and not first["momentum"]:
            self.names = ()
        flat = pack.flat
        self.lr, self.decay = (
            pack.expand(torch.tensor([group[key] for group in self.groups], dtype=flat.dtype, device=flat.device))
            for key in ("lr", "weight_decay")
        )
        self.decays = any(group["weight_decay"] for group in self.groups)
        self.state = {name: torch.zeros_like(flat) for name in self.names}
        # float64 and a tensor: corrections of the first steps are exact, and a CUDA graph can count
        self.steps = torch.zeros((), dtype=torch.float64, device=flat.device)
        for k, optimizer in enumerate(optimizers):
            states = [optimizer.state.get(parameter, {}) for parameter in optimizer.param_groups[0]["params"]]
            for name, kept in zip(pack.trained, states, strict=True):
                for key in self.names:
                    if kept.get(key) is not None:
                        pack.rows(self.state[key], name)[k].copy_(kept[key])
                if "step" in kept:
                    self.steps.fill_(float(kept["step"]))
        self._scratch = torch.empty_like(flat)

    def freeze(self, k: int) -> None:
        """Let network k be: no step moves it any more."""
        for name in self.pack.trained:
            for tensor in (self.lr, self.decay, *self.state.values()):
                self.pack.rows(tensor, name)[k].zero_()

    def state_dict(self, k: int) -> dict[str, Any]:
        """The state of network k's optimizer, in torch's format."""
        result = copy.deepcopy(self.dicts[k])
        stepped = bool(self.steps > 0)
        if self.names and (stepped or self.kind is torch.optim.Adagrad):
            for i, name in enumerate(self.pack.trained):
                kept = {key: self.pack.rows(self.state[key], name)[k].clone() for key in self.names}
                if self.kind is not torch.optim.SGD:
                    kept = {"step": self.steps.to("cpu", torch.float32), **kept}
                result["state"][i] = kept
        return result

    @torch.no_grad()
    def clip(self, largest: float) -> None:
        """Scale each network's gradient so that its norm is `largest` at most, as torch's `clip_grad_norm_` does."""
        pack = self.pack
        squares = torch.zeros(pack.K, dtype=pack.flat.dtype, device=pack.flat.device)
        for name in pack.trained:
            squares += pack.rows(pack.gradient, name).reshape(pack.K, -1).square().sum(1)
        factor = (largest / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        pack.gradient.mul_(pack.expand(factor))

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters by their gradients."""
        p, g, group, state, scratch = self.pack.flat, self.pack.gradient, self.groups[0], self.state, self._scratch
        self.steps.add_(1)
        if self.decays:
            g.addcmul_(self.decay, p)
        if self.kind is torch.optim.SGD:
            if group["momentum"]:
                g = state["momentum_buffer"].mul_(group["momentum"]).add_(g)
            p.addcmul_(self.lr, g, value=-1)
        elif self.kind is torch.optim.Adagrad:
            total = state["sum"].addcmul_(g, g)
            torch.sqrt(total, out=scratch).add_(group["eps"])
            p.addcmul_(self.lr, g.div_(scratch), value=-1)
        elif self.kind is torch.optim.RMSprop:
            average = state["square_avg"].mul_(group["alpha"]).addcmul_(g, g, value=1 - group["alpha"])
            torch.sqrt(average, out=scratch).add_(group["eps"])
            p.addcmul_(self.lr, g.div_(scratch), value=-1)
        elif self.kind is torch.optim.Adadelta:
            rho, eps = group["rho"], group["eps"]
            average = state["square_avg"].mul_(rho).addcmul_(g, g, value=1 - rho)
            moves = state["acc_delta"]
            torch.add(average, eps, out=scratch).sqrt_()
            g.mul_(moves.add(eps).sqrt_().div_(scratch))
            moves.mul_(rho).addcmul_(g, g, value=1 - rho)
            p.addcmul_(self.lr, g, value=-1)
        else:
            first, second = group["betas"]
            mean = state["exp_avg"].lerp_(g, 1 - first)
            square = state["exp_avg_sq"].mul_(second).addcmul_(g, g, value=1 - second)
            unbias = (1 - second**self.steps).sqrt().to(p.dtype)
            torch.sqrt(square, out=scratch).div_(unbias).add_(group["eps"])
            g.copy_(mean).div_(scratch).div_((1 - first**self.steps).to(p.dtype))
            p.addcmul_(self.lr, g, value=-1)
