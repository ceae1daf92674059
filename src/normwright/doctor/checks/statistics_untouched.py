"""NW102: a layer whose parameters were trained and whose running statistics were never updated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ...lab.errors import UserError
from ...surgery.checkpoint import read
from ..check import Check, Finding
from ..moments import Moments, counter, gain, momentum, names_below, off, repair, traces, untouched
from ..probe import CannotRun, Subject

HARMLESS = 0.1  # deviations: an input that has mean 0 and variance 1 anyway loses nothing


class UntouchedStatistics(Check):
    """The layer was trained, and its running statistics are still those of a new layer.

    What it does
        Looks for running means that are exactly 0 and variances that are exactly 1 in a layer with proof of training:
        it has counted batches, the optimizer has a state for its weight or bias, these hold a gradient, its bias has
        become different from channel to channel, or the checkpoint has statistics for it (or its weight without them).
        With inputs, the layer has to be called in evaluation and its input has to be something else than 0 and 1.
        A new model, a new head on a trained network and copies that evaluation does not call have no such proof.

    Why is this bad
        Evaluation normalizes by 0 and 1, that is not at all. Weights that were trained with batch statistics meet
        inputs of another scale; if the layer stood in evaluation mode while training, it has never normalized.

    Example
        net = [torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
        model = torch.nn.Sequential(*net)
        inputs, y = 3 + 4 * torch.randn(256, 8), torch.randint(4, (256,))
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for _ in range(100):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), y).backward()
            optimizer.step()
        model[1].reset_running_stats()  # as a checkpoint of parameters alone would leave them
        model.eval()

    Use instead
        net = [torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
        model = torch.nn.Sequential(*net)
        inputs, y = 3 + 4 * torch.randn(256, 8), torch.randint(4, (256,))
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for _ in range(100):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), y).backward()
            optimizer.step()
        model.eval()

    Fix safety
        `nw.recalibrate` is right if the layer was trained with batch statistics. If it stood in evaluation mode all
        along, the weights after it are used to its input as it was, and training has to be repeated; so `fix()` does
        it unasked only where a loss shows that it helps.

    References
        PyTorch documentation, torch.nn.BatchNorm2d: `track_running_stats`, and Module.state_dict: buffers.
    """

    code = "NW102"
    name = "untouched-running-statistics"
    severity = "error"
    evidence = "measured"

    def find(self, subject: Subject) -> Iterable[Finding]:
        left = names_below(subject, AveragedModel)
        found: dict[str, str] = {}
        for name, module in subject.tracked().items():
            if not untouched(module) or momentum(module) == 0 or module in left:
                continue
            if proof := trained(subject, name, module):
                found[name] = proof
        found = {name: proof for name, proof in found.items() if not getattr(subject.modules[name], "nw_frozen", False)}
        if not subject.has("inputs"):
            # which of several copies evaluation calls is not known: an average of weights may be none of its business
            if found and all(untouched(module) for module in subject.tracked().values()):
                yield self._finding(subject, found, {}, None)
            return
        if not found:
            return
        calls = traces(subject, training=False)
        far = {}
        for name in found:
            if subject.modules[name] in calls:
                moments = Moments.of(calls[subject.modules[name]])
                if moments is not None and (value := off(subject.modules[name], moments)) > HARMLESS:
                    far[name] = value
        if far:
            try:
                change = gain(subject, tuple(far))
            except CannotRun:
                change = None
            yield self._finding(subject, {name: found[name] for name in far}, far, change)

    def _finding(self, subject: Subject, found: Mapping[str, str], far: Mapping[str, float], change: Any) -> Finding:
        names = list(found)
        first = subject.name(subject.modules[names[0]])
        also = f" (so are those of {len(names) - 1} more layers)" if len(names) > 1 else ""
        measured = f"; its input is {far[names[0]]:.2g} deviations away" if far else ""
        shown = f"; {change}" if change is not None else ""
        helps = change is not None and change.share > 0.05 and change.sure > 3
        return self.finding(
            names,
            f"the running statistics of {first} are exactly 0 and 1{also}, and {found[names[0]]}{measured}{shown}.",
            help="Save and load the whole state_dict, buffers included; train in training mode, model.train(); if the "
            "weights are right and only the statistics are missing, nw.recalibrate(model, loader).",
            falsify="the layer was never part of a training step, or its input has mean 0 and variance 1.",
            numbers={
                "batches counted": counter(subject.modules[names[0]]) or 0,
                **({"off by, sd": far[names[0]]} if far else {}),
                **(change.numbers if change else {}),
            },
            repair=repair(subject, names),
            safe=helps,
            evidence="proved" if change is not None else None,
        )


def trained(subject: Subject, name: str, module: nn.Module) -> str:
    """The proof that a training step changed the layer; empty if there is none."""
    if count := counter(module):
        return f"training forwards, of which it counted {count}, would have moved them"
    own = [(key, p) for key, p in module.named_parameters(recurse=False) if not nn.parameter.is_lazy(p)]
    if subject.optimizer is not None:
        for key, parameter in own:
            if stepped(subject.optimizer.state.get(parameter)):
                return f"the optimizer has stepped on its {key}"
    bias = dict(own).get("bias")
    # initial biases are one constant, or all drawn alike; a weight may be drawn before training (DCGAN): no proof
    if bias is not None and bias.numel() > 1 and _spread(bias) > 0 and not drawn_alike(subject):
        return f"its bias has come to differ between channels, by up to {float(bias.detach().abs().max()):.2g}"
    for key, parameter in own:
        if parameter.grad is not None and bool(parameter.grad.abs().sum() > 0):
            return f"its {key} holds a gradient"
    return in_checkpoint(subject, name)


def drawn_alike(subject: Subject) -> bool:
    """Whether the biases of untouched norms, three or more, spread alike as far as chance allows, as if just drawn.

    The logarithm of the deviation of n normal values has itself a deviation of 1 / sqrt(2(n − 1)); training moves
    layers by different amounts.
    """
    # norms whose statistics were written were trained, and say nothing of an initialization
    biases = [getattr(module, "bias", None) for module in subject.tracked().values() if untouched(module)]
    biases = [bias for bias in biases if isinstance(bias, Tensor) and bias.numel() > 2]
    spreads = [(math.log(value), 2 * (b.numel() - 1)) for b in biases if (value := _spread(b)) > 0]
    if len(spreads) < 3:
        return False
    mean = sum(value * weight for value, weight in spreads) / sum(weight for _, weight in spreads)
    return sum((value - mean) ** 2 * weight for value, weight in spreads) / (len(spreads) - 1) < 2


def _spread(bias: Tensor) -> float:
    return float(bias.detach().double().std())


def stepped(state: Any) -> bool:
    """Whether an optimizer's state of one parameter is that of a parameter that was updated."""
    if not isinstance(state, Mapping):
        return False
    return any(bool(torch.as_tensor(v).abs().sum() > 0) for v in state.values() if isinstance(v, (Tensor, int, float)))


def in_checkpoint(subject: Subject, name: str) -> str:
    """What the checkpoint says of the layer's statistics that the model does not have."""
    if subject.checkpoint is None:
        return ""
    checkpoint = subject.checkpoint
    if isinstance(checkpoint, (str, os.PathLike)):
        try:
            checkpoint = read(os.fspath(checkpoint)).state
        except UserError as error:
            raise CannotRun(f"the checkpoint cannot be read: {error}") from error
    if not isinstance(checkpoint, Mapping):
        return ""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    state = {key.removeprefix("module.").replace("_orig_mod.", ""): value for key, value in checkpoint.items()}
    prefix = f"{name}." if name else ""
    var = state.get(f"{prefix}running_var")
    weight = state.get(f"{prefix}weight")
    if isinstance(var, Tensor) and bool((var != 1).any()):
        return "the checkpoint has running statistics for it that are not loaded"
    if var is None and isinstance(weight, Tensor) and float(weight.double().std()) > 0:
        return "the checkpoint has its weight and lacks its running statistics"
    return ""
