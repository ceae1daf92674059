"""Tracing a module by torch.fx, where the graph must show everything that the forward does."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

__all__ = ["NotProved", "Proxy", "Tracer", "ambient", "hooked", "inplace", "outside_torch"]


class NotProved(Exception):
    """Why the graph would not show all that a forward does."""


def hooked(module: nn.Module) -> bool:
    state = module.__dict__
    forward = state["_forward_hooks"] or state["_forward_pre_hooks"]
    return bool(forward or state["_backward_hooks"] or state["_backward_pre_hooks"])


class Proxy(fx.Proxy):
    """A proxy that says so when the traced code asks what type it has, which isinstance does."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        if outside_torch(sys._getframe(1)):
            raise NotProved("its forward asks for the type of a tensor")
        return Proxy


def inplace(name: str, left: Any, right: Any) -> Any:
    """`left += right` and its like: writes into a tensor, makes a new number."""
    return getattr(operator, name)(left, right)


def _record_inplace(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", inplace, (name, self, other), {})


# fx knows none of these, so Python makes `x += y` an `x + y` that leaves x alone
for _name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Proxy, f"__{_name}__", _record_inplace(_name))


def outside_torch(frame: Any) -> bool:
    while frame.f_globals.get("__name__") == "abc":  # isinstance with an abstract class
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", __name__.partition(".")[0])


class Tracer(fx.Tracer):
    """Traces one module with all its children as leaves, and refuses what the graph would not show."""

    proxy_buffer_attributes = True

    def __init__(self, inputs: list[str]) -> None:
        super().__init__()
        self.inputs = inputs
        self.ambient = ambient()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        # only the required ones: the others keep their defaults, and a call that passes them gets the original
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs]
        return root_fn, [self.root, *proxies]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if ambient() != self.ambient:
            raise NotProved("its forward switches gradients, autocast or checkpointing")
        return super().create_node(*args, **kwargs)


def ambient() -> tuple[Any, ...]:
    """What a context manager around a call can change and a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,  # type: ignore[attr-defined]
    )
