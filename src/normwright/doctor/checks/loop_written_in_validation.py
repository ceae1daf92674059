from __future__ import annotations

from collections.abc import Iterable

from ..check import Check, Finding
from ..watch import Log

__all__ = ["StatisticsWrittenInValidation"]


class StatisticsWrittenInValidation(Check):
    """Running statistics are written by forwards without gradients.

    What it does
        Counts the forwards of the whole model in training mode with gradients off, and compares the running means
        before and after each: those that moved were written. Not counted: norms within a model that itself runs with
        gradients (a momentum encoder, the first pass of checkpointing), and norms whose momentum was changed since the
        watch began, which is how statistics are re-estimated.

    Why is this bad
        Mostly this is a validation without `model.eval()`. It normalizes by the validation batch, keeps dropout on, so
        that its numbers are not those of the model that will be used; and the statistics of the validation data
        enter the model.

    Example
        body = [torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for epoch in range(3):
                for _ in range(4):
                    optimizer.zero_grad()
                    model(torch.randn(32, 4)).square().mean().backward()
                    optimizer.step()
                with torch.no_grad():
                    for _ in range(2):
                        model(torch.randn(32, 4))
        report = watch.report

    Use instead
        body = [torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for epoch in range(3):
                model.train()
                for _ in range(4):
                    optimizer.zero_grad()
                    model(torch.randn(32, 4)).square().mean().backward()
                    optimizer.step()
                model.eval()
                with torch.no_grad():
                    for _ in range(2):
                        model(torch.randn(32, 4))
        report = watch.report

    Fix safety
        No operation: `model.eval()` belongs before the validation and `model.train()` after it. Where a generator or a
        policy is sampled from in training mode on purpose, say so: `nw.intended("NW802", "why")(model)`.

    References
        torch.no_grad, "this is not the same as model.eval()" in torch's notes on autograd.
    """

    code = "NW802"
    name = "statistics-written-without-gradients"
    severity = "warning"
    evidence = "measured"

    def watched(self, log: Log) -> Iterable[Finding]:
        log.need_steps()
        between = [*log.steps, log.now]
        # before the first step a forward may be a look at shapes
        written = [step for step in between if step.unrecorded and step.index]
        moved = {
            name: layer.moved_by_unrecorded
            for name, layer in log.layers.items()
            if layer.moved_by_unrecorded and getattr(layer.module, "momentum", None) == layer.momentum
        }
        if not written or not moved:
            return
        # in every step: a generator that is sampled from for its discriminator's step, or a policy at play
        always = len(written) > max(0.5 * len(between), 1)
        forwards = sum(step.unrecorded for step in written)
        where = max(moved, key=lambda name: moved[name])
        more = f" and {len(moved) - 1} more layers" if len(moved) > 1 else ""
        yield self.finding(
            sorted(moved),
            f"{forwards} forwards without gradients ran in training mode, after {len(written)} of {log.count} steps, "
            f"and moved the running mean of {log.layers[where].name}{more}.",
            help="Call model.eval() before validation and model.train() after it; torch.no_grad() does not change the "
            "mode.",
            falsify="The running statistics bit for bit the same before and after the forwards without gradients.",
            numbers={"forwards": forwards, "after_steps": len(written), "steps": log.count, "layers": len(moved)},
            severity="advice" if always else None,
            evidence="advice" if always else None,
        )
