"""Batch norms with statistics for each of several domains: `split_domains(model, n)`, and back for one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import twins
from ..layers.split_batch_norm import SplitBatchNorm
from .modules import all_or_nothing, become, copied, names_of_parameters
from .receipt import Edit, Receipt, evaluating, named_modules_once, output_difference, rng_kept, run_on, shown

__all__ = ["in_domain", "join_domains", "split_domains"]

_BATCH_NORMS: tuple[type[nn.Module], ...] = tuple(
    getattr(place, f"BatchNorm{d}d") for place in (nn, twins) for d in (1, 2, 3)
)

# the class that a split layer came from, as an attribute of it
_JOINED = "joined_class"


def split_domains(model: nn.Module, n: int, *, shared_affine: bool = True, inputs: Any = None) -> Receipt:
    """Copy a model with every batch norm split over `n` domains, each starting from the statistics there were.

    Formula: in training, part i of n equal parts of the batch is normalized by its own mean and variance, which move
    running statistics i; at evaluation all samples take those of the domain that `layer.split` names, 0 at first (see
    `SplitBatchNorm`). As all domains start alike, the evaluated outputs are those of the model, whatever the domain.

    Compose training batches as `torch.cat([clean, adversarial])`, of equal sizes and in the order of the domains;
    `recalibrate(model, domains=[…])` gives each its exact statistics.

    Arguments:
        model: any module; changed in nothing.
        n: the number of domains.
        shared_affine: one weight and bias for all domains, the same parameters as before; False for one each, (n, C),
            copies of them.
        inputs: one batch on which the output difference, in evaluation mode, is measured.

    Returns: a `Receipt`, the copy in `.model`; `undo()` gives that copy its batch norms back. BatchNorm1d, 2d and 3d
        and their twins are split; left alone, with the reason in `receipt.skipped`: subclasses, SyncBatchNorm, other
        batch norms, parametrized and frozen ones, those without running statistics, and with
        `shared_affine=False` those whose weight or bias another module shares.

    Errors: `ValueError` for `n` that is no positive number; `TypeError` for a wrapped, compiled or scripted model;
        `RuntimeError` for one that cannot be copied, as with lazy layers.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> two = nw.split_domains(model, 2).model
        >>> two[1].running_mean.shape
        torch.Size([2, 8])
        >>> receipt = nw.recalibrate(two, domains=[torch.randn(32, 4), torch.randn(32, 4) + 1])
        >>> type(nw.join_domains(two, 1).model[1]).__name__
        'BatchNorm1d'

    Source: Xie et al. 2020, arXiv:1911.09665.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n is the number of domains, a positive integer; got {n!r}.")
    work = copied(model, "split_domains")
    holders = names_of_parameters(work)

    def split(module: Any) -> nn.Module | str:
        if reason := _why_not(module):
            return reason
        own = list(module.parameters(recurse=False))
        if not shared_affine and any(len(holders[id(parameter)]) > 1 for parameter in own):
            return "another module shares its weight or bias, which cannot be one for each domain there"
        if not shared_affine and len(own) == 1:
            return "has a weight without a bias, which SplitBatchNorm does not split"
        new = SplitBatchNorm(
            module.num_features,
            n,
            module.eps,
            module.momentum,
            affine=False,
            act=getattr(module, "act", None),
            shared_affine=shared_affine,
        )
        _fill(new, module, lambda t: t.detach().expand(n, *t.shape).clone(), shared_affine)
        vars(new)[_JOINED] = type(module)
        return new

    receipt = _replace(work, "split_domains", _BatchNorm, split, f"{n} domains")
    return _measured(receipt, model, None, inputs)


def join_domains(model: nn.Module, domain: int, *, to: type[nn.Module] | None = None, inputs: Any = None) -> Receipt:
    """Copy a model with every `SplitBatchNorm` an ordinary batch norm again, with the statistics of one domain.

    Formula: that of the split layers at evaluation with `split = domain`.

    Arguments:
        model: any module; changed in nothing.
        domain: whose statistics, and weight and bias where each domain has its own, remain.
        to: the class, such as `torch.nn.BatchNorm2d`; None for the one that `split_domains` found. Where the split
            layer has an activation, this package's class of that name.
        inputs: one batch on which the output difference to the model in that domain, at evaluation, is measured.

    Returns: a `Receipt`, the copy in `.model`; `undo()` gives that copy its split layers back. A layer of unknown
        class, made by hand and without `to`, and subclasses of SplitBatchNorm are left alone, with the reason in
        `receipt.skipped`.

    Errors: `ValueError` for a domain that a layer does not have or a class that is no batch norm; `TypeError` for a
        wrapped, compiled or scripted model.
    """
    if to is not None and to not in _BATCH_NORMS:
        raise ValueError(f"to is BatchNorm1d, 2d or 3d of torch.nn or of this package; got {to!r}.")
    work = copied(model, "join_domains")
    for names, module in named_modules_once(work):
        if isinstance(module, SplitBatchNorm) and domain not in range(module.num_splits):
            raise ValueError(f"{shown(names[0])!r} has domains 0 to {module.num_splits - 1}; got {domain!r}.")

    def join(module: Any) -> nn.Module | str:
        cls = to or vars(module).get(_JOINED)
        if type(module) is not SplitBatchNorm:
            return f"{type(module).__name__} is a subclass, whose forward is not known"
        if cls is None:
            return "not made by split_domains; say which class it becomes with to="
        if module.act is not None:
            cls = getattr(twins, cls.__name__)
        options = {} if module.act is None else {"act": module.act}
        new = cls(module.num_features, module.eps, module.momentum, affine=False, **options)
        _fill(new, module, lambda t: t.detach()[domain].clone(), module.shared_affine)
        return new

    receipt = _replace(work, "join_domains", SplitBatchNorm, join, f"domain {domain}")
    return _measured(receipt, model, domain, inputs)


@contextmanager
def in_domain(model: nn.Module, domain: int | None) -> Iterator[None]:
    """All split layers of the model switched to a domain; None leaves each at its own."""
    before = [(module, module.split) for module in model.modules() if isinstance(module, SplitBatchNorm)]
    try:
        for module, split in before:
            module.split = split if domain is None else domain
        yield
    finally:
        for module, split in before:
            module.split = split


def _why_not(module: nn.Module) -> str | None:
    """Why this batch norm is not split."""
    if "parametrizations" in module._modules:
        return "its parameters are parametrized"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if type(module) not in _BATCH_NORMS:
        return (
            f"{type(module).__name__} is neither BatchNorm1d, 2d nor 3d, and a split layer would compute another thing"
        )
    if getattr(module, "running_var", None) is None or not module.track_running_stats:
        return "keeps no running statistics"
    return "frozen: unfreeze it first" if getattr(module, "nw_frozen", False) else None


def _fill(new: Any, old: Any, each: Callable[[torch.Tensor], torch.Tensor], shared_affine: bool) -> None:
    """Give the new layer the old one's parameters, the same or by `each`, and its buffers."""
    new.affine = old.affine
    for key in ("weight", "bias"):
        parameter = getattr(old, key)
        if parameter is not None and not shared_affine:
            parameter = nn.Parameter(each(parameter), parameter.requires_grad)
        setattr(new, key, parameter)
    for key in ("running_mean", "running_var"):
        setattr(new, key, each(getattr(old, key)))
    new.num_batches_tracked = old.num_batches_tracked.clone()


def _replace(
    work: nn.Module, operation: str, kind: type[nn.Module], make: Callable[[Any], nn.Module | str], what: str
) -> Receipt:
    """Turn each layer of this kind into what `make` gives for it, or note why it gives none."""
    receipt = Receipt(work, operation)
    with all_or_nothing(work) as undo:
        for names, module in named_modules_once(work):
            if isinstance(module, kind):
                new = make(module)
                if isinstance(new, str):
                    receipt.skipped[names[0]] = new
                else:
                    change = f"{type(module).__name__} → {type(new).__name__}, {what}"
                    receipt.edits[names[0]] = Edit(change, also=names[1:])
                    become(module, new)
    receipt.undo_with = undo
    return receipt


def _measured(receipt: Receipt, model: nn.Module, domain: int | None, inputs: Any) -> Receipt:
    if inputs is not None:
        outputs = []
        for side in (model, receipt.model):
            with evaluating(side), rng_kept(side), in_domain(side, domain):
                outputs.append(run_on(side, inputs))
        receipt.max_difference, receipt.rms_difference = output_difference(*outputs)
    return receipt
