from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ... import surgery
from ..check import Check, Finding
from ..probe import CannotRun, Subject

__all__ = ["BiasBeforeBatchNorm"]


class BiasBeforeBatchNorm(Check):
    """A trained bias that the batch norm behind it subtracts again.

    What it does
        Follows the data, not the order of the modules: by torch.fx where it traces the model, otherwise by runs on the
        inputs. A bias of a convolution or linear layer is found if a batch norm alone reads the layer's output, and
        the model's output stays the same with infinity in the bias's place for everyone else. A bias that is frozen,
        whose batch norm is in evaluation mode in a model that trains, whose layer's output is read elsewhere, or that
        stands before a layer, group or instance norm, is left alone.

    Why is this bad
        The batch's mean takes the bias with it. Its gradient is rounding error, which Adam scales up to steps of full
        size, and weight decay acts on a number that means nothing. It costs memory and a pass.

    Example
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        inputs = torch.randn(16, 3, 8, 8)

    Use instead
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        inputs = torch.randn(16, 3, 8, 8)

    Fix safety
        `nw.absorb_bias(model, inputs)` is exact at evaluation and in training, but the copy has other parameters than
        an optimizer or a checkpoint made before.

    References
        Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2: "the bias b can be ignored".
    """

    code = "NW701"
    name = "bias-before-batch-norm"
    severity = "advice"
    evidence = "advice"

    def find(self, subject: Subject) -> Iterable[Finding]:
        biased = [
            module
            for module in subject.modules.values()
            if isinstance(module, (_ConvNd, nn.Linear))
            and (bias := module._parameters.get("bias")) is not None
            and bias.requires_grad
        ]
        if not biased or not subject.batch_norms():
            return
        inputs = subject.batch() if subject.has("inputs") and subject._forward is None else None
        try:
            with subject.experiment() as model:
                receipt = surgery.absorb_bias(model, inputs)
        except Exception as error:
            raise CannotRun(f"absorb_bias raised {type(error).__name__}: {error!s:.150}") from error
        found = {}
        for name, edit in receipt.edits.items():
            norm = subject.modules.get(edit.what.rsplit(" ", 1)[-1])
            held = norm is not None and subject.model.training and not norm.training
            if subject.modules[name] in biased and not held:
                found[name] = edit
        if not found:
            return
        numbers = sum(subject.modules[name].bias.numel() for name in found)  # type: ignore[union-attr]
        first = next(iter(found))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        yield self.finding(
            list(found),
            f"The bias of {first}{more} is subtracted again by the batch norm behind it "
            f"({found[first].what.rsplit(' ', 1)[-1]}): {numbers} parameters are trained that change nothing.",
            help="Pass bias=False to these layers, or nw.absorb_bias(model, inputs).",
            falsify="An output, in training, that changes with the bias by more than rounding.",
            numbers={"layers": len(found), "parameters": numbers},
            repair=lambda: surgery.absorb_bias(subject.model, inputs),
            safe=False,
        )
