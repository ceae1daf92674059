from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..check import Check, Finding
from ..probe import CannotRun, Subject

__all__ = ["DropoutBeforeBatchNorm"]

_DRAWS = 8  # of dropout, so that the average is that of training
_SHIFT = 0.1  # of the variance: below it the norm's output is off by less than 5%
_WORSE = 0.1  # of the loss


class DropoutBeforeBatchNorm(Check):
    """Dropout shifts the variance that a batch norm has learned.

    What it does
        Measures the variance that enters each batch norm in training mode, twice: with dropout, as in training, and
        with everything but the norms in evaluation mode. Where one differs from the other by more than 10%, the loss
        at evaluation is computed with the statistics of each. The layers are found if it is more than 10% higher with
        those of training. Models whose statistics were never updated are not looked at: nothing has been learned that
        the shift could spoil.

    Why is this bad
        Dropout at rate p keeps the mean and adds p / (1 − p) · E[x²] to the variance. The running average learns the
        larger variance; at evaluation, without dropout, the smaller one arrives, and the norm's output is too small by
        the root of their ratio, layer after layer.

    Example
        torch.manual_seed(0)
        means = 2 * torch.randn(4, 64)
        def batch():
            y = torch.randint(4, (256,))
            return means[y] + torch.randn(256, 64) + 3, y
        layers = [torch.nn.Dropout(0.8), torch.nn.Linear(64, 32, bias=False), torch.nn.BatchNorm1d(32)]
        layers += [torch.nn.ReLU(), torch.nn.Dropout(0.8), torch.nn.Linear(32, 32, bias=False)]
        layers += [torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 4)]
        model = torch.nn.Sequential(*layers)
        loss = torch.nn.functional.cross_entropy
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(150):
            x, y = batch()
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        inputs, targets = batch()

    Use instead
        torch.manual_seed(0)
        means = 2 * torch.randn(4, 64)
        def batch():
            y = torch.randint(4, (256,))
            return means[y] + torch.randn(256, 64) + 3, y
        layers = [torch.nn.Linear(64, 32, bias=False), torch.nn.BatchNorm1d(32)]
        layers += [torch.nn.ReLU(), torch.nn.Linear(32, 32, bias=False)]
        layers += [torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(0.8), torch.nn.Linear(32, 4)]
        model = torch.nn.Sequential(*layers)
        loss = torch.nn.functional.cross_entropy
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(150):
            x, y = batch()
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        nw.recalibrate(model, [batch()[0] for _ in range(20)])
        inputs, targets = batch()

    Fix safety
        No operation on the layers: move dropout behind the last batch norm. Statistics without dropout are what
        `nw.recalibrate` does not make, since it runs the model as in training; put dropout into evaluation mode first.

    References
        Li et al. 2018, Understanding the Disharmony between Dropout and Batch Normalization, arXiv:1801.05134.
    """

    code = "NW705"
    name = "dropout-before-batch-norm"
    severity = "warning"
    evidence = "measured"
    needs = ("inputs", "loss")

    def find(self, subject: Subject) -> Iterable[Finding]:
        norms: dict[str, nn.Module] = {
            name: module
            for name, module in subject.tracked().items()
            if isinstance(module, _BatchNorm)
            and isinstance(module.num_batches_tracked, Tensor)
            and module.num_batches_tracked > 0
        }
        # dropout as a function shows only in a run, as randomness; by modules, or code that asks for the mode
        if not norms or not any(_random(module) for module in subject.modules.values()):
            return
        try:
            dropped, whole = _statistics(subject, norms, True), _statistics(subject, norms, False)
        except CannotRun:
            raise
        except Exception as error:
            raise CannotRun(f"the model raised {type(error).__name__} in training mode: {error!s:.150}") from error
        ratios = {
            name: float((dropped[name][1] / whole[name][1].clamp_min(1e-12)).median())
            for name in norms
            if name in dropped and name in whole
        }
        shifted = {name: ratio for name, ratio in ratios.items() if ratio > 1 + _SHIFT}
        if not shifted:
            return
        with_dropout, without = _loss(subject, norms, dropped), _loss(subject, norms, whole)
        if not with_dropout > (1 + _WORSE) * without:
            return
        worst = max(shifted, key=lambda name: shifted[name])
        more = f" (and {len(shifted) - 1} more)" if len(shifted) > 1 else ""
        yield self.finding(
            sorted(shifted, key=lambda name: -shifted[name]),
            f"Dropout raises the variance that enters {worst}{more} to {shifted[worst]:.2f} times that at evaluation; "
            f"with the statistics of training the loss at evaluation is {with_dropout:.3g}, without dropout's share "
            f"{without:.3g}.",
            help="Move dropout behind the last batch norm.",
            falsify=f"A loss at evaluation that is no more than {_WORSE:.0%} higher with the statistics of training.",
            numbers={
                "variance_ratio": shifted[worst],
                "loss_with_statistics_of_training": with_dropout,
                "loss_without_dropouts_share": without,
                "layers": len(shifted),
            },
        )


def _random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    code = getattr(type(module).forward, "__code__", None)
    own = not type(module).__module__.startswith("torch.nn.")
    return own and code is not None and "training" in code.co_names


def _statistics(subject: Subject, norms: dict[str, nn.Module], dropout: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance by channel of what enters each norm, the norms in training mode, over several draws."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}
    with subject.experiment() as model, torch.no_grad():
        for module in model.modules():
            module.training = dropout
        for name, module in norms.items():
            module.training = True

            def enters(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                x = args[0].detach().double()
                variance, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
                seen[name].append((mean, variance))

            module.register_forward_pre_hook(enters)
        for _ in range(_DRAWS if dropout else 1):
            subject.run()
    return {
        name: (torch.stack([m for m, _ in drawn]).mean(0), torch.stack([v for _, v in drawn]).mean(0))
        for name, drawn in seen.items()
        if drawn
    }


def _loss(subject: Subject, norms: dict[str, nn.Module], statistics: dict[str, tuple[Tensor, Tensor]]) -> float:
    """The loss at evaluation with these running statistics."""
    with subject.experiment() as model, torch.no_grad():
        for module in model.modules():
            module.training = False
        for name, (mean, variance) in statistics.items():
            buffers = norms[name]._buffers
            for key, value in (("running_mean", mean), ("running_var", variance)):
                buffers[key] = value.to(buffers[key].dtype)  # type: ignore[union-attr]
        return float(subject.loss_value(subject.run()))
