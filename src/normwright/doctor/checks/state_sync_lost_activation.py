"""NW510: a conversion to SyncBatchNorm that dropped the activations."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...surgery.receipt import tensors_in
from ..check import Check, Finding
from ..probe import CannotRun, Subject

# rounding of float32 through a deep affine network stays below; one rectifier is far above
_AFFINE = 1e-3


class SyncLostActivation(Check):
    """A network with SyncBatchNorm has no nonlinearity left.

    What it does
        At evaluation, sends the inputs x, −x, 2x and 0 through the network and looks at what reaches the last
        SyncBatchNorm: if it is an affine function of x although convolutions or linear layers lie before it, the
        activations are gone.

    Why is this bad
        `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes a plain SyncBatchNorm of every batch norm, also of those
        that apply an activation themselves (`nw.BatchNorm2d(act=…)`, timm's BatchNormAct2d). What is left between the
        layers is one affine map, whatever its depth.

    Example
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, bias=False), nw.BatchNorm2d(8, act="relu"),
            torch.nn.Conv2d(8, 8, 3, bias=False), nw.BatchNorm2d(8, act="relu"),
        )
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
        inputs = torch.randn(32, 3, 8, 8)

    Use instead
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, bias=False), nw.BatchNorm2d(8), torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, 3, bias=False), nw.BatchNorm2d(8), torch.nn.ReLU(),
        )
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
        inputs = torch.randn(32, 3, 8, 8)

    Fix safety
        By hand: convert the model again, from before the conversion.

    References
        torch.nn.SyncBatchNorm.convert_sync_batchnorm; timm.layers.convert_sync_batchnorm, which keeps activations.
    """

    code = "NW510"
    name = "sync-lost-activation"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        syncs = {name: module for name, module in subject.norms().items() if isinstance(module, nn.SyncBatchNorm)}
        maps = [module for module in subject.modules.values() if isinstance(module, (_ConvNd, nn.Linear))]
        if len(syncs) < 2 or len(maps) < 2:
            return
        # what comes before the last layer passes all the others
        reached = {factor: _last_input(subject, set(syncs.values()), factor) for factor in (0.0, 1.0, -1.0, 2.0)}
        zero, one, minus, two = (reached[factor] for factor in (0.0, 1.0, -1.0, 2.0))
        size = (one - zero).norm()
        off = max((minus - zero + (one - zero)).norm(), (two - zero - 2 * (one - zero)).norm()) / size
        if size > 0 and float(off) < _AFFINE:
            yield self.finding(
                syncs,
                f"{len(syncs)} SyncBatchNorm layers with {len(maps)} linear maps: what reaches the last is an affine "
                f"function of the input, to {float(off):.1e}; no activation lies between them.",
                help="Convert from the original model with a conversion that keeps activations: nw.convert, or timm's "
                "convert_sync_batchnorm; or put the activations back as modules.",
                falsify="The input of the last SyncBatchNorm at −x is not the mirror image of that at x.",
                numbers={"deviation from an affine map": float(off), "linear maps": len(maps)},
            )


def _last_input(subject: Subject, norms: set[nn.Module], factor: float) -> Tensor:
    """The input of the last of these layers where every input of the model is multiplied by `factor`."""
    met: list[Tensor] = []

    def entered(module: nn.Module, args: Any) -> None:
        met[:] = [args[0].detach().double()]

    batch = subject.batch()
    scaled = {id(t): t.detach() * factor if t.is_floating_point() else t.detach() for t in tensors_in(batch)}
    handles = [norm.register_forward_pre_hook(entered) for norm in norms]
    try:
        with subject.experiment() as model, torch.no_grad():
            for module in model.modules():
                module.training = False
            subject.run(copy.deepcopy(batch, scaled))
    except Exception as error:
        raise CannotRun(f"the model raised {type(error).__name__} on inputs times {factor:g}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not met:
        raise CannotRun("no SyncBatchNorm is reached by the inputs")
    return met[0]
