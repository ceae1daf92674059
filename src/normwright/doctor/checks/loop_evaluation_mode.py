from __future__ import annotations

from collections.abc import Iterable

from ..check import Check, Finding
from ..watch import Log

__all__ = ["EvaluationModeInTraining"]


class EvaluationModeInTraining(Check):
    """The whole model trains in evaluation mode.

    What it does
        At every backward pass that leads to an optimizer step, reads the mode of the model and of all layers that
        compute something else in training: dropout, norms with running statistics, and modules that read
        `self.training`. Steps in which the model and every such layer are in evaluation mode are counted. A model in
        training mode of which only the norms are in evaluation mode is fine-tuned with frozen statistics, and is fine;
        so is a model of which nothing depends on the mode.

    Why is this bad
        Most often `model.train()` is missing after a validation that called `model.eval()`. Nothing fails: dropout
        is gone, running statistics stand still while the weights below them move, and batch norm no longer normalizes.

    Example
        body = [torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for epoch in range(4):
                for _ in range(4):
                    optimizer.zero_grad()
                    model(torch.randn(32, 4)).square().mean().backward()
                    optimizer.step()
                model.eval()
                with torch.no_grad():
                    model(torch.randn(32, 4))
        report = watch.report

    Use instead
        body = [torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for epoch in range(4):
                model.train()
                for _ in range(4):
                    optimizer.zero_grad()
                    model(torch.randn(32, 4)).square().mean().backward()
                    optimizer.step()
                model.eval()
                with torch.no_grad():
                    model(torch.randn(32, 4))
        report = watch.report

    Fix safety
        No operation: the call of `model.train()` belongs at the start of each epoch. Where all of a model is fine-tuned
        in evaluation mode on purpose, say so: `nw.intended("NW801", "why")(model)`.

    References
        torch.nn.Module.train and eval.
    """

    code = "NW801"
    name = "evaluation-mode-in-training"
    severity = "warning"
    evidence = "measured"

    def watched(self, log: Log) -> Iterable[Finding]:
        log.need_steps(3)
        seen = [step for step in log.steps if step.training is not None]
        still = [step for step in seen if not step.training and step.switching and not step.active]
        # one or two such steps may be a warm-up or a test of the loop
        if len(still) < 3 or len(still) < 0.1 * len(seen):
            return
        first, layers = still[0], still[0].switching
        before = f"after {first.index} in training mode, " if first.index else ""
        yield self.finding(
            "",
            f"{before}{len(still)} of {len(seen)} steps were made with the whole model in evaluation mode, the "
            f"{layers} layers that depend on the mode included; the first is step {first.index}.",
            help="Call model.train() at the start of each epoch, after every evaluation.",
            falsify="A backward pass in each step at which model.training is True.",
            numbers={"steps_in_evaluation_mode": len(still), "steps": len(seen), "layers_that_depend_on_mode": layers},
        )
