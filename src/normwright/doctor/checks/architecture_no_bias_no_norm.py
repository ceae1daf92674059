from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...surgery.receipt import shown
from ..check import Check, Finding
from ..probe import CannotRun, Subject
from ..units import ACTIVATIONS, Functions

__all__ = ["NoBiasAndNoNorm"]


class NoBiasAndNoNorm(Check):
    """A layer without bias whose norm is missing.

    What it does
        Runs the model at evaluation and follows the output of each convolution and linear layer with `bias=False`. If
        an activation is the first to read it, nothing shifts it before the kink. That is reported only where a norm
        evidently stood there: an `nn.Identity` lies between, or most of the layers without bias in the model are read
        by a norm. Layers that are meant so are left alone: projections of attention, heads, and gates behind a
        pooling, which have one value a channel in a network of images.

    Why is this bad
        `bias=False` belongs to a norm, whose β is the bias. Where the norm was removed, or forgotten in one block, all
        units have their kink at zero, and the layer computes a function that is homogeneous in its input.

    Example
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.Identity(), torch.nn.ReLU())
        inputs = torch.randn(16, 3, 8, 8)

    Use instead
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        inputs = torch.randn(16, 3, 8, 8)

    Fix safety
        No operation: give the layer a bias, or its norm back, and train on.

    References
        Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2: the bias is left out because β takes its place.
    """

    code = "NW702"
    name = "no-bias-and-no-norm"
    severity = "advice"
    evidence = "advice"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        bare: dict[nn.Module, str] = {
            module: name
            for name, module in subject.modules.items()
            if isinstance(module, (_ConvNd, nn.Linear)) and module._parameters.get("bias") is None
        }
        if not bare:
            return
        made: dict[int, tuple[str, Tensor]] = {}
        readers: dict[str, set[str]] = {}
        removed: set[str] = set()
        norms = set(subject.norms().values())

        def makes(module: nn.Module, args: Any, y: Any) -> None:
            if isinstance(y, Tensor):
                made[id(y)] = (bare[module], y)

        def enters(module: nn.Module, args: Any) -> None:
            if args and id(args[0]) in made:
                name = made[id(args[0])][0]
                if isinstance(module, nn.Identity):
                    removed.add(name)
                elif module in norms:
                    readers.setdefault(name, set()).add("norm")

        def reads(function: Any, args: Any, kwargs: Any, result: Any) -> None:
            for x in args[:1]:
                if isinstance(x, Tensor) and isinstance(result, Tensor) and id(x) in made:
                    name, y = made[id(x)]
                    pooled = images and (y.dim() == 2 or (y.dim() == 4 and y.shape[2:].numel() == 1))
                    kind = "activation" if function in ACTIVATIONS and not pooled else "other"
                    readers.setdefault(name, set()).add(kind)

        images = any(isinstance(module, nn.Conv2d) for module in subject.modules.values())
        try:
            with subject.experiment() as model, torch.no_grad():
                for module in model.modules():
                    module.training = False
                    if module in bare:
                        module.register_forward_hook(makes)
                    elif module in norms or isinstance(module, nn.Identity):
                        module.register_forward_pre_hook(enters)
                with Functions(reads):
                    subject.run()
        except CannotRun:
            raise
        except Exception as error:
            raise CannotRun(f"the model raised {type(error).__name__} in evaluation mode: {error!s:.150}") from error
        normed = sum("norm" in kinds for kinds in readers.values())
        usual = normed > 0.5 * len(bare)
        found = [name for name, kinds in readers.items() if kinds == {"activation"} and (usual or name in removed)]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            yield self.finding(
                found,
                f"{shown(found[0])}{more} has no bias, and an activation reads its output with no norm between; "
                f"{normed} of {len(bare)} layers without bias are read by a norm.",
                help="Give the layer a bias, or put the norm back between it and the activation.",
                falsify="A norm or an addition of a learned shift between the layer and the activation.",
                numbers={"layers": len(found), "layers_without_bias": len(bare), "read_by_a_norm": normed},
            )
