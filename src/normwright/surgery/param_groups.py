"""Which parameters are decayed: `param_groups(model, weight_decay)`, by the type of the module that owns them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from ..layers.norm import ChannelNorm, FilterResponseNorm, Norm
from ..layers.outside import ChannelLayer
from .receipt import named_modules_once, shown, unwrap

__all__ = ["is_norm", "param_groups"]

_NORMS = (
    _NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    ChannelLayer,
    ChannelNorm,
    FilterResponseNorm,
    Norm,
)
# by the file that defines them, because timm is not imported here; these files define normalizations only
_TIMM_NORMS = frozenset(
    f"timm.layers.{name}"
    for name in ("evo_norm", "filter_response_norm", "grn", "inplace_abn", "norm", "norm_act", "split_batchnorm")
)
_LINEAR_MAPS = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_WEIGHT = re.compile(r"weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?|(in|q|k|v)_proj_weight")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Selector = type[nn.Module] | str


def is_norm(module: nn.Module, norms: Iterable[type[nn.Module]] = ()) -> bool:
    """Whether a module is a normalization layer: torch's, this package's, timm's, or of the types in `norms`."""
    if isinstance(module, (*_NORMS, *norms)):
        return True
    return any(base.__module__ in _TIMM_NORMS for base in type(module).__mro__)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float | None = None,
    no_decay: Iterable[Selector] | Selector = (),
    decay: Iterable[Selector] | Selector = (),
    norms: Iterable[type[nn.Module]] = (),
    frozen: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's parameters for an optimizer into those with weight decay and those without.

    Decided by the type of the module that owns the parameter:

    - Decayed: the weights of convolutions, linear and bilinear layers, recurrent layers and attention.
    - Not decayed: every parameter of a normalization layer (torch's, this package's, timm's, and `norms`), all biases,
      and embeddings: a row has a gradient only when its token occurs, and decay shrinks it every step.
    - Of any other module (a class token, a position table, a layer's scale, a custom linear layer): decayed if it has
      two dimensions longer than 1, as a matrix has; `(C,)`, `(1, 1, C)` and `(C, 1, 1)` are not. What a module of
      the model lists in its method `no_weight_decay()`, timm's convention, is not decayed.
    - A parametrized weight is decayed through its parts, except parts that are a gain per output (the magnitude in
      weight norm; `ScaledStdConv2d`'s gain is one as well).

    A tied parameter stands once, under its first name, and is not decayed if any of its owners says so.

    Arguments:
        model: any module; wrappers (`torch.compile`, DDP) are looked through.
        weight_decay: of the decayed group, as the optimizer takes it; the other has 0.
        lr: learning rate of both groups; None leaves it to the optimizer.
        no_decay, decay: types of modules (with their subclasses), or qualified names of parameters or modules, that
            change the above. A name goes before a type, a longer name before a shorter one, and a type in `no_decay`
            before one in `decay`.
        norms: more types that are normalization layers.
        frozen: include parameters with `requires_grad=False`.

    Returns: one dict per group that is not empty, "decay" and then "no_decay" by its key `"name"`, with parameters in
    the order of `model.named_modules()`: the same for the same model, so that an optimizer's state loads.

    Errors: `ValueError` for a negative number, a name that does not exist or is in both arguments, a lazy parameter,
    and where no parameter is left.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101 (decoupled decay); He et al. 2019, arXiv:1812.01187 (no bias
    decay: neither biases nor batch norm's weight and bias).

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
        >>> groups = nw.param_groups(model, 0.05)
        >>> [(group["name"], group["weight_decay"], len(group["params"])) for group in groups]
        [('decay', 0.05, 2), ('no_decay', 0.0, 4)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    for name, value in (("weight_decay", weight_decay), ("lr", lr)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} is a number from 0 on; got {value!r}.")
    root = unwrap(model)
    modules = named_modules_once(root)
    rules = _rules(modules, no_decay, decay)
    norms = tuple(norms)
    parametrized = {
        id(parts): (module, key)
        for _, module in modules
        if isinstance(lists := module._modules.get("parametrizations"), nn.ModuleDict)
        for key, parts in lists.items()
    }
    owners: dict[int, tuple[Tensor, list[tuple[str, nn.Module, str]]]] = {}
    for module_names, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is None or not (frozen or parameter.requires_grad):
                continue
            if is_lazy(parameter):
                raise ValueError(
                    f"Groups go by shapes, and {shown(module_names[0])!r} does not know its own before an input; run "
                    "the model once first."
                )
            owners.setdefault(id(parameter), (parameter, []))[1].append((module_names[0], module, key))
    unwanted = _listed_by_the_model(modules)
    split: dict[bool, list[Tensor]] = {True: [], False: []}
    for identity, (parameter, held) in owners.items():
        chosen = rules.choice(held)
        if chosen is None and identity in unwanted:
            chosen = False
        if chosen is None:
            chosen = all(_decayed(module, key, parameter, norms, parametrized) for _, module, key in held)
        split[chosen].append(parameter)
    if not owners:
        raise ValueError(
            "An optimizer needs parameters, and none of this model's requires a gradient; unfreeze some, or pass "
            "frozen=True."
        )
    extra = {} if lr is None else {"lr": lr}
    return [
        {"params": split[decayed], "weight_decay": value, "name": name, **extra}
        for decayed, name, value in ((True, "decay", float(weight_decay)), (False, "no_decay", 0.0))
        if split[decayed]
    ]


def _decayed(
    module: nn.Module,
    key: str,
    parameter: Tensor,
    norms: tuple[type[nn.Module], ...],
    parametrized: dict[int, tuple[nn.Module, str]],
) -> bool:
    """Whether a module's parameter is decayed, by the module's type."""
    matrix = sum(size > 1 for size in parameter.shape) > 1
    if isinstance(module, ParametrizationList):
        owner, tensor = parametrized[id(module)]
        whole = key == "original" or matrix
        return whole and _decayed(owner, tensor, parameter, norms, parametrized)
    if is_norm(module, norms) or isinstance(module, _EMBEDDINGS):
        return False
    # a linear layer with one output has a weight, although its shape is that of a vector
    return matrix or (isinstance(module, _LINEAR_MAPS) and _WEIGHT.fullmatch(key) is not None)


class _Rules:
    """What the arguments say: decay or not, by name and by type."""

    def __init__(self, names: dict[str, bool], types: list[tuple[type[nn.Module], bool]]) -> None:
        self.names, self.types = names, types

    def choice(self, held: list[tuple[str, nn.Module, str]]) -> bool | None:
        """The decision for a parameter with these owners, if the arguments make one."""
        full = [f"{name}.{key}".removeprefix(".") for name, _, key in held]
        listed = [(len(n), n) for n in self.names for f in full if not n or f == n or f.startswith(f"{n}.")]
        if listed:
            return self.names[max(listed)[1]]
        return next((way for kind, way in self.types for _, module, _ in held if isinstance(module, kind)), None)


def _rules(
    modules: list[tuple[tuple[str, ...], nn.Module]],
    no_decay: Iterable[Selector] | Selector,
    decay: Iterable[Selector] | Selector,
) -> _Rules:
    known = {name: names[0] for names, _ in modules for name in names}
    for names, module in modules:
        for key in module._parameters:
            known |= {f"{name}.{key}".removeprefix("."): f"{names[0]}.{key}".removeprefix(".") for name in names}
    by_name: dict[str, bool] = {}
    types: list[tuple[type[nn.Module], bool]] = []
    for what, items, way in (("no_decay", no_decay, False), ("decay", decay, True)):
        for item in (items,) if isinstance(items, (str, type)) else items:
            if isinstance(item, type) and issubclass(item, nn.Module):
                types.append((item, way))
            elif not isinstance(item, str):
                raise TypeError(f"{what}= holds types of modules and qualified names; got {item!r}.")
            elif item not in known:
                raise ValueError(
                    f"{what}= names parameters and modules of the model, and it has none called {item!r}; the names "
                    "are those of model.named_parameters() and model.named_modules()."
                )
            elif by_name.setdefault(known[item], way) is not way:
                raise ValueError(f"A name is decayed or not; {item!r} is in decay= and in no_decay=. Leave out one.")
    return _Rules(by_name, types)


def _listed_by_the_model(modules: list[tuple[tuple[str, ...], nn.Module]]) -> set[int]:
    """The parameters that modules list in `no_weight_decay()`, by `id`; names of others are passed over, as in timm."""
    found: set[int] = set()
    for _, module in modules:
        method: Any = getattr(module, "no_weight_decay", None)
        if callable(method):
            listed: Any = method()
            own = dict(module.named_parameters(remove_duplicate=False))
            found |= {id(own[name]) for name in listed if name in own}
    return found
