from __future__ import annotations

from collections.abc import Iterable

from ..check import Check, Finding
from ..watch import Log

__all__ = ["GradientsNotZeroed"]


class GradientsNotZeroed(Check):
    """Gradients are not zeroed between optimizer steps.

    What it does
        Keeps the gradient of up to three small parameters after a step (in the steps looked at), and compares it with
        what is there when the next gradient arrives: if it is the same bit for bit, not zero, and nothing is zeroed
        before the next step either, then that step used it a second time. Accumulation over micro-batches zeroes after
        its step and is silent; so is a discriminator to which the generator's loss adds before `zero_grad`.

    Why is this bad
        Each step then uses the sum of all gradients so far: a heavy momentum of weight 1, with which the loss
        oscillates or diverges, or merely trains worse.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        with nw.watch(model, optimizer) as watch:
            for _ in range(6):
                model(torch.randn(32, 4)).square().mean().backward()
                optimizer.step()
        report = watch.report

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        with nw.watch(model, optimizer) as watch:
            for _ in range(6):
                optimizer.zero_grad()
                model(torch.randn(32, 4)).square().mean().backward()
                optimizer.step()
        report = watch.report

    Fix safety
        No operation: `optimizer.zero_grad()` belongs before each backward pass, or after each step.

    References
        torch.optim.Optimizer.zero_grad; torch.Tensor.backward, "accumulates gradients in the leaves".
    """

    code = "NW806"
    name = "gradients-not-zeroed"
    severity = "error"
    evidence = "measured"

    def watched(self, log: Log) -> Iterable[Finding]:
        log.need_steps(3)
        seen = [step for step in log.looks if step.carried is not None]
        carried = [step for step in seen if step.carried]
        # zeroing once in an epoch, or at every fourth step, is the same fault
        if len(carried) < 2 or len(carried) < 0.25 * len(seen):
            return
        yield self.finding(
            "",
            f"In {len(carried)} of {len(seen)} steps looked at, the optimizer used the gradient of the step before a "
            "second time: the new one was added to it, and nothing was zeroed in between.",
            help="Call optimizer.zero_grad() before each backward pass; for accumulation, after each optimizer step.",
            falsify="A gradient that is None or zero when the first backward pass after a step reaches it.",
            numbers={"steps_with_carried_gradient": len(carried), "steps_looked_at": len(seen)},
        )
