from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from ...surgery.receipt import tensors_in
from ..check import Check, Finding
from ..probe import CannotRun, Subject
from ..values import trained, training_modes, uses_batch

__all__ = ["CorrelatedBatches"]

_BATCHES = 16
_SHUFFLES = 200
# The variance of batch means against what sampling from all the data gives. At 2 the batches bring as much variation
# of their own as chance does, as if they had half as many samples.
_RATIO = 2.0


class CorrelatedBatches(Check):
    """The batches are not random samples of the data, so that batch statistics describe the batch and not the data.

    What it does
        Takes the input of the first batch norm over the loader's first 16 batches, one mean for each sample and
        channel, and compares the variance between batches with the one within (the F ratio of an analysis of
        variance, 1 for random batches). It must be above 2, and above that of each of 200 random reassignments of the
        same samples to batches. Batch samplers of your own are taken to be meant.

    Why is this bad
        In data sorted by class or by source, each batch is normalized by its own mean: what tells the classes apart is
        subtracted in training, and is there at evaluation. The running average follows the last batches.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        labels = torch.arange(512) // 64
        data = torch.utils.data.TensorDataset(torch.randn(512, 4) + 2 * torch.randn(8, 4)[labels], labels)
        loader = torch.utils.data.DataLoader(data, batch_size=32)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        labels = torch.arange(512) // 64
        data = torch.utils.data.TensorDataset(torch.randn(512, 4) + 2 * torch.randn(8, 4)[labels], labels)
        loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)

    Fix safety
        By hand: the loader is not the model's.

    References
        Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 6: batches that are not
        independent samples; Fisher 1925, the analysis of variance.
    """

    code = "NW205"
    name = "correlated-batches"
    severity = "warning"
    evidence = "measured"
    needs = ("loader",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        if not trained(subject) or not subject.batch_norms():
            return
        loader: Any = subject.loader
        if isinstance(loader, DataLoader) and type(loader.batch_sampler) not in (BatchSampler, type(None)):
            return
        batches = subject.batches(_BATCHES)
        if len(batches) < 4:
            raise CannotRun(f"it compares at least 4 batches of the loader, and there are {len(batches)}")
        name, means = _first_inputs(subject, batches)
        if len(means) < 4:
            raise CannotRun("no batch norm gets the samples of the loader's batches on its first axis")
        ratio = _ratio(means)
        if not ratio > _RATIO:
            return
        pooled, sizes = torch.cat(means), [len(m) for m in means]
        generator = torch.Generator().manual_seed(0)
        chance = max(
            _ratio(list(pooled[torch.randperm(len(pooled), generator=generator)].split(sizes)))
            for _ in range(_SHUFFLES)
        )
        if ratio <= chance:
            return
        numbers = {"F_ratio": ratio, "threshold": _RATIO, "largest_F_of_shuffles": chance, "batches": len(means)}
        labels = _labels(batches)
        says = ""
        if labels:
            each = sum(len(set(of)) for of in labels) / len(labels)
            numbers |= {"labels_per_batch": each, "labels": len(set().union(*labels))}
            says = f"; a batch has {each:.1f} of {numbers['labels']} labels"
        yield self.finding(
            name,
            f"At {name} the means of {len(means)} batches differ {ratio:.1f} times as much, in variance, as those of "
            f"random batches (at most {chance:.1f} in {_SHUFFLES} shuffles){says}.",
            help="Shuffle: DataLoader(..., shuffle=True), or a larger shuffle buffer for a stream.",
            falsify="An F ratio near 1 over batches in training's order.",
            numbers=numbers,
        )


class _Reached(Exception):
    """Ends a run at the first batch norm: what comes after is not needed."""


def _first_inputs(subject: Subject, batches: list[Any]) -> tuple[str, list[Tensor]]:
    """The batch norm that is reached first, and for each batch its input's mean by sample and channel."""
    seen: list[tuple[str, Tensor]] = []

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        seen.append((names[module], x.detach().clone()))
        raise _Reached

    with training_modes(subject) as model, torch.no_grad():
        names = {module: name for name, module in subject.batch_norms().items() if uses_batch(module)}
        for module in names:
            module.register_forward_pre_hook(entered, with_kwargs=True)
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.training = False  # noise that is not the data's
        for batch in batches:
            try:
                subject.run(batch)
            except _Reached:
                pass  # where the run was to end
            except Exception as error:
                text = " ".join(str(error).split())
                raise CannotRun(f"the model raised {type(error).__name__} on a batch: {text:.200}") from error
    means: list[Tensor] = []
    sizes = [next((t.size(0) for t in tensors_in(batch) if t.dim()), None) for batch in batches]
    if len(seen) == len(batches):
        for (name, x), size in zip(seen, sizes, strict=True):
            # every batch at the same layer, with its samples on axis 0
            if name == seen[0][0] and x.dim() > 1 and 1 < x.size(0) == size and x.isfinite().all():
                means.append(x.double().flatten(2).mean(2) if x.dim() > 2 else x.double())
    return seen[0][0] if seen else "", means


def _ratio(groups: list[Tensor]) -> float:
    """Mean square between groups over mean square within, summed over the channels in units of their deviations."""
    pooled = torch.cat(groups)
    scale = pooled.std(0)
    alive = scale > 1e-6 * scale.max()
    if not alive.any():
        return 0.0
    centre = pooled.mean(0)
    between = sum(len(g) * ((g.mean(0) - centre) / scale)[alive].square().sum() for g in groups) / (len(groups) - 1)
    within = sum((((g - g.mean(0)) / scale)[:, alive]).square().sum() for g in groups) / (len(pooled) - len(groups))
    # groups without any spread of their own: as different as can be
    return float(between / within) if within > 0 else float("inf")


def _labels(batches: list[Any]) -> list[list[int]]:
    """The labels of each batch, where a batch is (inputs, integer vector)."""
    found = []
    for batch in batches:
        y = batch[1] if isinstance(batch, (list, tuple)) and len(batch) > 1 else None
        if not isinstance(y, Tensor) or y.is_floating_point() or y.dim() != 1:
            return []
        found.append(y.tolist())
    return found
