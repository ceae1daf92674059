"""NW109: evaluation normalizes by the batch, so that a sample's output depends on the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..check import Check, Finding
from ..moments import trial
from ..probe import CannotRun, NormCall, Subject

# Of the layer's own deviation. Rounding in float32 moves outputs by 1e-6 of it, in half precision by 1e-2.
LEAST = {torch.float16: 0.1, torch.bfloat16: 0.1}


class BatchAtEvaluation(Check):
    """At evaluation the layer uses the statistics of the batch: a sample's output depends on the other samples.

    What it does
        Puts the model into evaluation mode by `model.eval()`, and gives every layer that normalizes over the batch its
        own recorded input twice: as it is, and with the other samples doubled and shifted. If the first sample's
        output changes, the layer uses the batch.

    Why is this bad
        A prediction changes with what else is in the batch, a batch of one fails or becomes constant, and the
        measured accuracy is that of batches composed like the test's. It comes from `track_running_stats=False`, from
        buffers set to None, or from a `train()` that keeps the norms in training mode.

    Example
        norm = torch.nn.BatchNorm1d(8, track_running_stats=False)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), norm)
        inputs = torch.randn(64, 4)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
        inputs = torch.randn(64, 4)

    Fix safety
        There is no operation: give the layer buffers (`track_running_stats=True`) and then `nw.recalibrate`. Where the
        batch is meant, as in sampling from a GAN or in transductive meta-learning, say so with `nw.intended`.

    References
        PyTorch documentation, torch.nn.BatchNorm2d: track_running_stats; Wu & Johnson 2021, arXiv:2105.07576.
    """

    code = "NW109"
    name = "batch-statistics-at-evaluation"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        with trial(subject) as model:
            model.eval()
            suspects = {m for m in subject.batch_norms().values() if m.training or not _tracks(m)}
        if not suspects:
            return
        for call in subject.forward().calls:
            if call.module not in suspects or call.x.size(0) < 2 or call.kwargs.get("mask") is not None:
                continue
            moved = _first_moves(subject, call)
            if moved <= LEAST.get(call.x.dtype, 1e-3):
                continue
            suspects.discard(call.module)
            why = "keeps no running statistics" if not _tracks(call.module) else "stays in training mode after eval()"
            yield self.finding(
                call.name,
                f"{subject.name(call.module)} {why}: with the other {call.x.size(0) - 1} samples of the batch changed, "
                f"the first one's output at evaluation moves by {moved:.2g} of its deviation.",
                help="Build it with track_running_stats=True, let eval() reach it, and run nw.recalibrate(model, "
                f'loader). If the batch is meant: nw.intended("{self.code}", "why")(layer).',
                falsify="the output for one sample is the same alone and in any batch.",
                numbers={"first sample moved, sd": moved, "samples": call.x.size(0)},
            )


def _tracks(module: nn.Module) -> bool:
    found = [b for key, b in module._buffers.items() if key in ("running_mean", "running_var")]
    return any(b is not None for b in found)


def _first_moves(subject: Subject, call: NormCall) -> float:
    """How far the first sample's output moves when the others change, in deviations of the output."""
    x = call.x.clone()
    x[1:] = 2 * x[1:] + x.float().std().to(x.dtype)
    with trial(subject) as model, torch.no_grad():
        model.eval()
        first, second = (_tensor(call.module(given, **call.kwargs)) for given in (call.x, x))
    spread = float(first.double().std())
    return float((first[0].double() - second[0].double()).abs().max()) / max(spread, 1e-12)


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CannotRun(f"a batch norm returned a {type(value).__name__}")
    return value
