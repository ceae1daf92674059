from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..check import Check, Finding
from ..probe import CannotRun, Subject
from ..watch import Log, watch

__all__ = ["BatchNormUnderGradientPenalty"]

_COUPLED = 1e-4  # of the gradient's norm; a norm within each sample has exactly 0


class BatchNormUnderGradientPenalty(Check):
    """A gradient penalty is computed through a batch norm.

    What it does
        While the model trains under `watch`, or while the given loss is computed, notes the batch norms in training
        mode through which a gradient with respect to the model's inputs is taken with `create_graph`: a gradient
        penalty, or a differential equation's residual. For each, with the input that it had, the gradient of one
        sample's output is taken, and the share that falls on the other samples is shown. Gradients of second order
        with respect to weights (MAML) do not count.

    Why is this bad
        The penalty is on the norm of the critic's gradient at each sample by itself. Behind batch norm a sample's
        output depends on all samples, so that the gradient that is computed for one contains those of the others.

    Example
        critic = torch.nn.Sequential(torch.nn.Linear(4, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU())
        critic.append(torch.nn.Linear(16, 1))
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
        with nw.watch(critic, optimizer) as watch:
            for _ in range(4):
                x = torch.randn(32, 4, requires_grad=True)
                score = critic(x)
                (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
                optimizer.zero_grad()
                (score.mean() + 10 * (slope.norm(dim=1) - 1).square().mean()).backward()
                optimizer.step()
        report = watch.report

    Use instead
        critic = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.LayerNorm(16), torch.nn.ReLU())
        critic.append(torch.nn.Linear(16, 1))
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
        with nw.watch(critic, optimizer) as watch:
            for _ in range(4):
                x = torch.randn(32, 4, requires_grad=True)
                score = critic(x)
                (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
                optimizer.zero_grad()
                (score.mean() + 10 * (slope.norm(dim=1) - 1).square().mean()).backward()
                optimizer.step()
        report = watch.report

    Fix safety
        Unsafe: `nw.convert(model, "layer", inputs)` is another model, to be trained further.

    References
        Gulrajani et al. 2017, arXiv:1704.00028, section 4, "No critic batch normalization".
    """

    code = "NW706"
    name = "batch-norm-under-gradient-penalty"
    severity = "warning"
    evidence = "proved"

    def find(self, subject: Subject) -> Iterable[Finding]:
        if subject.loss is None or not subject.has("inputs") or not subject.batch_norms():
            return
        with subject.experiment() as model:
            for module in model.modules():
                module.training = True
            try:
                with watch(model) as watched:
                    subject.loss_value(subject.run())
            except CannotRun:
                raise
            except Exception as error:
                raise CannotRun(f"the model raised {type(error).__name__} in training: {error!s:.150}") from error
        yield from self.watched(watched.log)

    def watched(self, log: Log) -> Iterable[Finding]:
        coupled = {
            name: share
            for name, layer in log.layers.items()
            if layer.penalized is not None and (share := _share(layer.module, layer.penalized)) > _COUPLED
        }
        if not coupled:
            return
        first = next(iter(coupled))
        more = f" (and {len(coupled) - 1} more)" if len(coupled) > 1 else ""
        yield self.finding(
            list(coupled),
            f"A gradient penalty is taken through {log.layers[first].name}{more}, where {coupled[first]:.2%} of the "
            "gradient of one sample's output falls on other samples.",
            help="Use a norm within each sample in a penalized critic: nw.convert(model, 'layer', inputs).",
            falsify="A gradient of one sample's output that is zero at all other samples.",
            numbers={"share_on_other_samples": coupled[first], "threshold": _COUPLED, "layers": len(coupled)},
        )


def _share(norm: nn.Module, x: Tensor) -> float:
    """Of the gradient of the first sample's output, the part that lies on other samples, by norm."""
    if x.shape[0] < 2:
        return 0.0
    alone = copy.deepcopy(norm)
    for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(alone, key, OrderedDict())
    alone.training = True
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = alone(x)[0]
        direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        (gradient,) = torch.autograd.grad((y * direction).sum(), x)
    others, all_of_it = torch.linalg.vector_norm(gradient[1:]), torch.linalg.vector_norm(gradient)
    return float(others / all_of_it) if all_of_it > 0 else 0.0
