from __future__ import annotations

from collections.abc import Iterable

from ...layers.batch_renorm import BatchRenorm
from ..check import Check, Finding
from ..probe import Subject
from ..values import (
    ENOUGH,
    by_mark,
    meetings,
    require_calls,
    synchronized,
    trained,
    training_modes,
    uses_batch,
    world_size,
    worst_calls,
)

__all__ = ["UnsynchronizedBatchNorm"]


class UnsynchronizedBatchNorm(Check):
    """Each process normalizes by its own small batch.

    What it does
        Where `torch.distributed` runs with several processes, counts the values of each statistic of the batch norms in
        this process: fewer than 16, in a layer that does not synchronize, is found.

    Why is this bad
        The batch of the optimizer is that of all processes together, the batch of the statistics is one process's. With
        few samples a process the statistics are noise, and the running averages differ between processes; only the
        first one's are saved.

    Example
        from torch.testing._internal.distributed.fake_pg import FakeStore
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        inputs = torch.randn(8, 4)
        torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
        report = nw.diagnose(model, inputs)
        torch.distributed.destroy_process_group()

    Use instead
        from torch.testing._internal.distributed.fake_pg import FakeStore
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        inputs = torch.randn(64, 4)
        torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
        report = nw.diagnose(model, inputs)
        torch.distributed.destroy_process_group()

    Fix safety
        By hand, before the model is wrapped: `nw.convert(model, "sync").model`, or torch's
        `SyncBatchNorm.convert_sync_batchnorm`. All processes must then run every step.

    References
        torch.nn.SyncBatchNorm; Peng et al. 2018, MegDet, arXiv:1711.07240.
    """

    code = "NW206"
    name = "unsynchronized-batch-norm"
    severity = "warning"
    evidence = "measured"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        world = world_size()
        norms = {m for m in subject.batch_norms().values() if not synchronized(m) and not isinstance(m, BatchRenorm)}
        # a model that synchronizes anything must be run by all processes at once, which nothing here says is the case
        if world == 1 or not trained(subject) or not norms:
            return
        met, raised = meetings(subject)
        require_calls(met, raised)
        with training_modes(subject):
            used = {module for module in norms if uses_batch(module)}
        few = [m for m in met if m.module in used and (m.count or ENOUGH) < ENOUGH]
        for group in by_mark(subject, self.code, worst_calls(few, lambda m: m.count)):
            first = group[0]
            count = first.count or 0
            more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
            yield self.finding(
                [meeting.name for meeting in group],
                f"{subject.name(first.module)}{more} takes each statistic of {count} values, of {count * world} in "
                f"{world} processes, and does not synchronize them.",
                help="Before wrapping the model: model = nw.convert(model, 'sync').model, or "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).",
                falsify=f"{ENOUGH} values or more for each statistic in every process.",
                numbers={"values_per_statistic": count, "processes": world, "threshold": ENOUGH},
            )
