"""Changing modules within a model: the tools that fold, freeze, convert and the others share.

A module is never swapped for another object: it becomes the other in place (its class and its state change), so that
every name, list, hook and closure that holds it holds the result. What a module was is a snapshot of its class and of
the tables in its `__dict__`, which is also how an operation is undone and how one that raises leaves no trace. For
that an operation registers new tensors and never writes into old ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .receipt import named_modules_once, shown

__all__ = ["all_or_nothing", "become", "copied", "names_of_parameters", "refuse_wrapped", "shared_copy"]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
_HOOKS = tuple(key for key in vars(nn.Module()) if "_hook" in key)
_TABLES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    *(key for key in _HOOKS if key.endswith(("hooks", "kwargs", "called"))),  # not the flag _is_full_backward_hook
)


def refuse_wrapped(model: nn.Module, operation: str) -> None:
    """Raise `TypeError` naming the first module that is wrapped (DDP), compiled or scripted."""
    for name, module in model.named_modules():
        if isinstance(module, _WRAPPERS) or "_orig_mod" in module._modules:
            raise TypeError(
                f"{operation} works on plain modules, and {shown(name)!r} is a {type(module).__name__}; give the model "
                "inside, then wrap, compile or script `receipt.model`."
            )


def copied(model: nn.Module, operation: str) -> nn.Module:
    """An independent deep copy, hooks included; parameters keep `requires_grad` and have no `grad`.

    Errors: `TypeError` for a wrapped, compiled or scripted model; `RuntimeError` where a module cannot be copied.
    """
    refuse_wrapped(model, operation)
    # a process group cannot be copied, and is the same for the copy
    groups = (group for module in model.modules() if (group := getattr(module, "process_group", None)) is not None)
    try:
        return copy.deepcopy(model, {id(group): group for group in groups})
    except Exception as error:
        raise RuntimeError(
            f"{operation} edits a copy, and copy.deepcopy of this {type(model).__name__} raised "
            f"{type(error).__name__}: {error}. Make the model copyable (tensors with a graph are kept with .detach())."
        ) from error


def shared_copy(model: nn.Module) -> nn.Module:
    """A deep copy that holds the same parameters, buffers and hooks, and the same tensors that are no leaves."""
    memo: dict[int, Any] = {}
    modules = set(model.modules())
    for module in modules:
        held = chain(module._parameters.values(), module._buffers.values(), vars(module).values())
        for value in held:
            if isinstance(value, Tensor):
                memo[id(value)] = value
        for kind, hooks in vars(module).items():
            if kind.endswith("_hooks") and isinstance(hooks, dict):
                for hook in hooks.values():
                    # a method of a module in the model is bound to that module's copy; a recorder stays the recorder
                    if not (isinstance(hook, MethodType) and hook.__self__ in modules):
                        memo[id(hook)] = hook
    return copy.deepcopy(model, memo)


def become(module: nn.Module, new: nn.Module) -> None:
    """Turn `module` into `new` in place: class and state of `new`, with the hooks, mode and marks of `module`.

    Carried over: forward, backward and state_dict hooks, `training`, and plain attributes whose name starts with
    `nw_` (marks such as `nw_frozen`). `new` must not be used afterwards: its tables are the module's now.

    Errors: `TypeError` for a module with parametrizations, or whose forward was replaced on the instance.
    """
    if "parametrizations" in module._modules or "forward" in vars(module):
        what = "is parametrized" if "parametrizations" in module._modules else "has its forward replaced"
        raise TypeError(f"A module becomes another by class and state, and this {type(module).__name__} {what}.")
    old = dict(vars(module))
    state = vars(new)
    # `train` is what freeze puts on the instance
    state |= {key: old[key] for key in (*_HOOKS, "training", "train") if key in old}
    state |= {key: value for key, value in old.items() if key.startswith("nw_")}
    vars(module).clear()
    vars(module).update(state)
    module.__class__ = type(new)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Give back every module's class and tables if the block raises; yields the same as a function, for `undo_with`.

    Tensors that were written into are not restored, only which tensors, modules, hooks and attributes there are.
    """
    # a scripted module keeps its state elsewhere, and no operation changes it
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(module, type(module), dict(vars(module)), _tables(module)) for module in modules]

    def restore() -> None:
        for module, cls, state, tables in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(state)
            for key, saved in tables.items():
                # the same dict and set objects: the handles that remove a hook hold them
                state[key].clear()
                state[key].update(saved)

    try:
        yield restore
    except BaseException:
        restore()
        raise


def _tables(module: nn.Module) -> dict[str, Any]:
    return {key: copy.copy(value) for key, value in vars(module).items() if key in _TABLES}


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """All qualified names of each parameter, by `id`: a tied parameter has several, a shared module counts once."""
    names: dict[int, list[str]] = {}
    for module_names, module in named_modules_once(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{module_names[0]}.{key}".removeprefix("."))
    return names
