from __future__ import annotations

from collections.abc import Iterable

from ...layers.batch_renorm import BatchRenorm
from ..check import Check, Finding
from ..probe import Subject
from ..values import (
    ENOUGH,
    Meeting,
    by_mark,
    meetings,
    require_calls,
    trained,
    training_modes,
    uses_batch,
    world_size,
    worst_calls,
    written_by_hand,
)

__all__ = ["FewValuesPerStatistic"]


def over_all(meeting: Meeting) -> int | None:
    """Values for each statistic if all processes synchronized; that they do not is NW206's finding."""
    return None if meeting.count is None else meeting.count * world_size()


class FewValuesPerStatistic(Check):
    """Batch statistics are taken of few values.

    What it does
        Runs a step of training, on the loader's first batch where there is a loader, and counts the values of each
        statistic of the batch norms that normalize by the batch: N·H·W, over all processes. Fewer than 16 is few. Norms
        that are frozen, and models in evaluation mode whose loader is not that of training, are not looked at.

    Why is this bad
        The mean of n values is off by 1/√n of a deviation: a quarter for 16. That noise is in every training output,
        and is not there at evaluation, where the running average stands.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        inputs = torch.randn(4, 4)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        inputs = torch.randn(64, 4)

    Fix safety
        Unsafe: a group norm (`nw.convert(model, "group", inputs)`) is another model, to be trained further. Where the
        small batch is meant, say so: `nw.intended("NW202", "why")(model)`.

    References
        Wu & He 2018, Group Normalization, arXiv:1803.08494, figure 5: ImageNet error against the batch size;
        Ioffe 2017, Batch Renormalization, arXiv:1702.03275.
    """

    code = "NW202"
    name = "few-values-per-statistic"
    severity = "warning"
    evidence = "measured"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        if not trained(subject):
            return
        met, raised = meetings(subject)
        require_calls(met, raised)
        norms = subject.batch_norms().values()
        with training_modes(subject):
            used = {module for module in norms if uses_batch(module) and not isinstance(module, BatchRenorm)}
        known = [meeting for meeting in met if meeting.module in used]
        others = [meeting for meeting in written_by_hand(subject) if meeting.over_batch]
        few = [meeting for meeting in (*known, *others) if 1 < (over_all(meeting) or 1) < ENOUGH]
        for group in by_mark(subject, self.code, worst_calls(few, over_all)):
            first = group[0]
            count, shape = over_all(first) or 0, tuple(first.x.shape)
            more = f" (and {len(group) - 1} more, up to {over_all(group[-1])})" if len(group) > 1 else ""
            noise = 1 / count**0.5
            yield self.finding(
                [meeting.name for meeting in group],
                f"{subject.name(first.module)}{more} takes each statistic of {count} values in training (input of "
                f"shape {shape}): the batch's mean is off by {noise:.0%} of a deviation.",
                help="Train with larger batches, freeze the norms of a pretrained model (nw.freeze), or use a norm "
                "within each sample (nw.convert(model, 'group', inputs)) or BatchRenorm.",
                falsify=f"A training batch with {ENOUGH} values or more for each of the layer's statistics.",
                numbers={
                    "values_per_statistic": count,
                    "threshold": ENOUGH,
                    "error_of_mean_in_deviations": noise,
                    "shape": shape,
                },
            )
