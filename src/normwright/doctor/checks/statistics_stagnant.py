"""NW105: statistics in low precision that an update cannot move."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..check import Check, Finding
from ..moments import Moments, counter, distance, frozen, momentum, trial, unset
from ..probe import NormCall, Subject

# Deviations between where the statistics stop and where they should be. bfloat16 alone leaves about 2% of a deviation
# (an update below 2⁻⁹ of the value is lost, so at momentum 0.1 the last 2⁻⁹ / 0.1 of it stays), which harms nobody.
LEAST = 0.25
LENGTHS = 20  # 1 / momentum each: nothing that moves still moves then
MOST_STEPS = 3000  # on so much of the input, some 50 ms a layer
SAMPLES, PLACES = 32, 4
KEYS = ("running_mean", "running_var")


class StagnantStatistics(Check):
    """Running statistics in half precision stop far from the truth, because the update is below their resolution.

    What it does
        Trains each layer whose running statistics are float16 or bfloat16 on its own recorded input, a copy of it with
        float32 statistics beside it, until the former stop, and compares where both are. A model
        in evaluation mode, of which no training is known, is reported only if its statistics are wrong now.

    Why is this bad
        An update adds `new_weight · (x − mean)`. Below half a unit in the last place of the mean it is rounded away:
        bfloat16 keeps 8 bits, so at mean 100 a statistic does not move by less than 0.25, and at momentum 0.1 stays up
        to 2.5 away for ever. Small momenta stop earlier: at 0.001 the variance stops at a fraction of itself.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.001), torch.nn.ReLU())
        model = model.bfloat16()
        inputs = torch.randn(64, 4).bfloat16() * 10

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        inputs = torch.randn(64, 4) * 10  # and torch.autocast around the forward, which keeps statistics in float32

    Fix safety
        There is no operation: the buffers' type is part of the model. `layer.float()` on the norms alone keeps input
        and output in half precision, as torch's batch norm takes them mixed. Recalibrate afterwards.

    References
        Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740, section 3.1 (updates lost in half).
    """

    code = "NW105"
    name = "stagnant-running-statistics"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        low = {
            module
            for module in subject.tracked().values()
            if (buffer := module._buffers.get("running_var")) is not None
            and buffer.dtype in (torch.float16, torch.bfloat16)
            and momentum(module)  # 0 and the cumulative average are other questions
        }
        low -= frozen(subject) if low else set()
        if not low:
            return
        trains = subject.model.training or subject.optimizer is not None
        stopped = []
        calls = subject.forward(training=True).calls
        with trial(subject), torch.no_grad():  # one for all: each keeps and gives back the whole model
            for call in calls:
                module = call.module
                if module not in low or unset(module) or (moments := Moments.of([call])) is None:
                    continue
                low.discard(module)  # its first call is enough
                if not trains and (not counter(module) or _rms(distance(module, moments.mean, moments.var)) < LEAST):
                    continue
                left, steps, moved = _trained(call)
                if not moved and left >= (LEAST if float(momentum(module)) < _USUAL else _APART):  # type: ignore[arg-type]
                    stopped.append((call, left, steps, 2 * moments.mean.numel()))
        for call, left, steps, numbers in stopped:
            kind = str(call.module.running_var.dtype).removeprefix("torch.")
            yield self.finding(
                call.name,
                f"after {steps} updates on one batch the {kind} statistics of "
                f"{subject.name(call.module)} are {left:.2g} deviations from those that float32 reaches, and the last "
                f"update moves none of {numbers}.",
                help="Keep the norms in float32 (for m in model.modules(): if it is a batch norm, m.float()), or train "
                "under torch.autocast instead of model.half(); then nw.recalibrate(model, loader).",
                falsify="the same updates bring half-precision and float32 statistics to the same values.",
                numbers={"apart, sd": left, "updates": steps, "moved by the last": 0},
            )


# from this momentum on a statistic stops within 20 roundings of the input itself, which is much only beside a tiny
# variance: behind a global pooling of noise, healthy networks reach 0.48 deviations
_USUAL = 0.05
_APART = 0.6


def _trained(call: NormCall) -> tuple[float, int, int]:
    """How far half-precision statistics stop from those in float32, after how many updates, how many still move.

    The layer is left trained.
    """
    module, weight = call.module, float(momentum(call.module))  # type: ignore[arg-type]
    x = call.x[:SAMPLES]
    for dim in range(2, x.dim()):
        x = x[(slice(None),) * dim + (slice(None, None, max(x.size(dim) // PLACES, 1)),)]
    module.training = True
    # started from zero in float32, one update says what the layer takes for the batch's statistics
    start = {key: module._buffers[key].clone() for key in KEYS}  # type: ignore[union-attr]
    own = list(module.parameters(recurse=False))
    kept = [p.data for p in own]
    module._buffers |= {key: torch.zeros_like(value, dtype=torch.float32) for key, value in start.items()}
    for p in own:
        p.data = p.data.float()
    module(x, **call.kwargs)
    batch = {key: module._buffers[key] / weight for key in KEYS}  # type: ignore[operator]
    for p, value in zip(own, kept, strict=True):
        p.data = value
    module._buffers |= start
    steps, moved = 0, 1
    while moved and steps < min(LENGTHS / weight, MOST_STEPS):
        before = {key: module._buffers[key].clone() for key in KEYS}  # type: ignore[union-attr]
        module(x, **call.kwargs)
        steps += 1
        moved = sum(int((module._buffers[key] != value).sum()) for key, value in before.items())  # type: ignore[union-attr]
    # an average in float32 would be there but for this share of the way
    rest = (1 - weight) ** steps
    wide = {key: batch[key] + rest * (value.float() - batch[key]) for key, value in start.items()}
    return _rms(distance(module, wide["running_mean"].double(), wide["running_var"].double())), steps, moved


def _rms(channels: Tensor) -> float:
    return float(channels.nan_to_num(1.0).clamp(max=1.0).square().mean().sqrt())
