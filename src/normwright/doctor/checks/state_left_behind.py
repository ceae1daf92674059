"""NW502: moving statistics that `.to()` leaves behind."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..check import Check, Finding
from ..handwritten import HandWritten, by_class, handwritten, held, mending
from ..probe import Subject


class StatisticsLeftBehind(Check):
    """Moving statistics stay behind when the model is moved.

    What it does
        Moves a copy of the layer to float64 and another to the meta device, and looks where the statistics are; then
        calls the one on the meta device.

    Why is this bad
        Parameters and buffers follow `.to()`, plain tensors do not. On another device the forward raises, or an `if` in
        it moves them at the first call: then `.half()`, `state_dict`, distributed wrappers and copies still miss them.

    Example
        class BatchNorm(torch.nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.moving_mean = torch.zeros(channels)

            def forward(self, x):
                if self.moving_mean.device != x.device:
                    self.moving_mean = self.moving_mean.to(x.device)
                if not self.training:
                    return x - self.moving_mean
                mean = x.mean(0)
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
                return x - mean

        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), BatchNorm(8))
        inputs = torch.randn(64, 4)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), nw.BatchNorm1d(8))
        inputs = torch.randn(64, 4)

    Fix safety
        As for NW501: a copy, with new keys in the state_dict; not done unasked.

    References
        torch.nn.Module.to; Zhang et al., Dive into Deep Learning, section 8.5.
    """

    code = "NW502"
    name = "statistics-left-behind"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, left) for one in handwritten(subject) if (left := _left(one))]
        for group in by_class(faulty):
            one, (labels, raises) = group[0]
            then = "and the forward raises there" if raises else "and only a forward there would move them"
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: after .to() of dtype and of device, {' and '.join(labels)} are still "
                f"{held(one.module)[labels[0]].value.dtype} on {one.x.device}, {then}.",
                severity="error" if raises else "warning",
                falsify="They have the new dtype and device right after model.to(…).",
                numbers={"tensors left behind": len(labels), "forward raises on another device": raises},
                **mending(
                    subject,
                    one,
                    f"Register them: self.register_buffer({labels[0]!r}, torch.zeros(…)); buffers follow .to() "
                    "and need no device test in forward.",
                ),
            )


def _left(one: HandWritten) -> tuple[tuple[str, ...], bool] | None:
    """The statistics that stay at their dtype and device, and whether a forward on the other device raises."""
    wide = torch.float32 if one.x.dtype == torch.float64 else torch.float64
    dtype, device = held(one.copy().to(wide)), held(one.copy().to("meta"))
    labels = tuple(
        label
        for label in one.statistics
        if dtype[label].kind == "plain"
        and dtype[label].value.dtype != wide
        and device[label].value.device.type != "meta"
    )
    if not labels:
        return None
    moved = one.copy().to("meta")
    try:
        one.play(moved, one.x.to("meta"), training=False)
    except Exception:
        return labels, True
    return labels, False
