"""NW112: the averaged copy of a network follows its weights and not its statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..check import Check, Finding
from ..moments import Moments, counter, names_below, off, repair, traces, trial, unset
from ..probe import Subject

# Weight matrices of networks that were drawn independently have a cosine near 0, of an average and its network near 1.
LEAST_COSINE = 0.5
LEAST_OFF = 0.25  # deviations


class StaleTarget(Check):
    """A target network follows the weights of another and keeps statistics that are not theirs.

    What it does
        Looks for two modules of one class and equal shapes that share nothing, where one learns by gradients and the
        other does not, and whose weight matrices point the same way (cosine over 0.5): a moving average, a teacher, a
        target. Where the copy is run in evaluation mode, its statistics are compared with its own input, and so are
        the other's: they have to fit at least twice as well. A copy that evaluation never runs is left alone.

    Why is this bad
        `for p, q in zip(target.parameters(), online.parameters())` leaves out the buffers. The target's weights
        become those of a trained network and its statistics stay those of the day it was copied, so its outputs,
        which others learn from, are of another scale.

    Example
        import copy

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.online = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16))
                self.target = copy.deepcopy(self.online).requires_grad_(False)

            def forward(self, x):
                return self.online(x) if self.training else self.target(x)

        model, inputs = Net(), 2 + 3 * torch.randn(256, 8)
        for _ in range(50):
            model(inputs)
            for p, q in zip(model.target.parameters(), model.online.parameters()):
                p.data.lerp_(q.data, 0.01)

    Use instead
        import copy

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.online = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16))
                self.target = copy.deepcopy(self.online).requires_grad_(False)

            def forward(self, x):
                return self.online(x) if self.training else self.target(x)

        model, inputs = Net(), 2 + 3 * torch.randn(256, 8)
        for _ in range(50):
            model(inputs)
            for p, q in zip(model.target.parameters(), model.online.parameters()):
                p.data.lerp_(q.data, 0.01)
            for p, q in zip(model.target.buffers(), model.online.buffers()):
                p.copy_(q)

    Fix safety
        `nw.recalibrate` sets the target's running statistics to those of its own input, once; the loop that averages
        has to copy buffers too, or the fault comes back.

    References
        Tarvainen & Valpola 2017, Mean teachers, arXiv:1703.01780; Cai et al. 2021, Exponential Moving Average
        Normalization, arXiv:2101.08482.
    """

    code = "NW112"
    name = "target-with-stale-buffers"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        pairs = list(_pairs(subject))
        if not pairs:
            return
        with trial(subject) as model:
            model.train()
            kept = {module for module in subject.tracked().values() if not module.training}
        evaluated = traces(subject, training=False)
        trained = traces(subject, training=True)
        for online, target in pairs:
            inner = zip(_tracked(online), _tracked(target), strict=True)
            own, others = [], []
            for a, b in inner:
                calls = evaluated.get(b) or (trained.get(b) if b in kept else None)
                moments = Moments.of(trained.get(b) or calls) if calls else None
                if moments is not None:
                    own.append(off(b, moments))
                    others.append(off(a, moments))
            if not own or max(own) < LEAST_OFF or max(others) > max(own) / 2:
                continue
            names = [subject.names[module][0] for module in _tracked(target)]
            counts = [max((counter(m) or 0 for m in _tracked(net)), default=0) for net in (target, online)]
            follows = subject.model.training and not target.training
            yield self.finding(
                names,
                f"{subject.name(target)} has weights like {subject.name(online)} and is evaluated with statistics "
                f"{max(own):.2g} deviations from its input's, after {counts[0]} batches; those of "
                f"{subject.name(online)}, after {counts[1]}, are {max(others):.2g} away.",
                help="Copy the buffers where the weights are averaged (for p, q in zip(target.buffers(), "
                "online.buffers()): p.copy_(q)), or run nw.recalibrate on the target.",
                falsify="the target is never evaluated, or its statistics fit its own input.",
                numbers={"off by, sd": max(own), "off by with the other's, sd": max(others), "batches": counts[0]},
                repair=None if follows else repair(subject, names),
                safe=False,
            )


def _tracked(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if m._buffers.get("running_mean") is not None and not unset(m)]


def _pairs(subject: Subject) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Online and target networks, the outermost modules that are such."""
    averages = names_below(subject, AveragedModel)  # a check of its own
    groups: dict[object, list[nn.Module]] = {}
    for module in subject.modules.values():
        if module._modules and module not in averages and _tracked(module):
            shapes = tuple((name, p.shape) for name, p in module.named_parameters())
            groups.setdefault((type(module), shapes, len(_tracked(module))), []).append(module)
    held = set()
    if subject.optimizer is not None:
        held = {id(p) for group in subject.optimizer.param_groups for p in group["params"]}
    done: set[nn.Module] = set()
    for group in groups.values():
        for online in group:
            for target in group:
                if target in done or online is target or set(online.modules()) & set(target.modules()):
                    continue
                if _learns(online, held) and not _learns(target, held) and _cosine(online, target) > LEAST_COSINE:
                    done |= set(target.modules())
                    yield online, target


def _learns(net: nn.Module, held: set[int]) -> bool:
    """Whether gradients train this network, as far as can be seen."""
    mine = list(net.parameters())
    if held:
        return any(id(p) in held for p in mine)
    return any(p.requires_grad for p in mine)


def _cosine(a: nn.Module, b: nn.Module) -> float:
    """Of the two networks' weight matrices; vectors such as γ start at one value everywhere."""
    pairs = [(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True) if p.dim() > 1]
    if not pairs or any(p is q for p, q in zip(a.parameters(), b.parameters(), strict=True)):
        return 0.0
    left, right = (torch.cat([pair[i].double().flatten() for pair in pairs]) for i in range(2))
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))
