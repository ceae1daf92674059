from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from ...surgery.receipt import rng_kept, tensors_in
from ..check import Check, Finding
from ..probe import CannotRun, Subject
from ..values import meetings, total_count, trained, training_modes, uses_batch

__all__ = ["LastBatchOfOne"]


class LastBatchOfOne(Check):
    """The last batch of an epoch is a single sample, and a batch norm needs more.

    What it does
        Reads from the loader's samplers how many samples are left for the last batch (of a list of batches, takes the
        last). If it is one, trains one step on a single sample and looks for batch norms with one value a statistic.

    Why is this bad
        torch raises at the end of the first epoch; a norm that does not raise puts out its bias, and writes the single
        sample into its running mean.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        data = torch.utils.data.TensorDataset(torch.randn(129, 4))
        loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        data = torch.utils.data.TensorDataset(torch.randn(129, 4))
        loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, drop_last=True)

    Fix safety
        By hand: the loader is not the model's. With shuffling, `drop_last=True` leaves out another sample each epoch.

    References
        torch.utils.data.DataLoader, drop_last; torch.nn.functional.batch_norm, "Expected more than 1 value per channel
        when training".
    """

    code = "NW203"
    name = "last-batch-of-one"
    severity = "error"
    evidence = "proved"
    needs = ("loader",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        if not trained(subject):
            return  # a loader for evaluation, as far as one can see
        last = _last(subject)
        if last is None:
            return
        batch, samples, size = last
        met, raised = meetings(subject, batch)
        norms = set(subject.batch_norms().values())
        with training_modes(subject):
            single = [m for m in met if m.module in norms and uses_batch(m.module) and total_count(m) == 1]
        if not single or (raised is not None and met[-1].finished):
            return
        name = subject.name(single[0].module)
        shows = "puts out its bias alone" if raised is None else f"raises {type(raised).__name__}"
        yield self.finding(
            list(dict.fromkeys(meeting.name for meeting in single)),
            f"{samples} samples in batches of {size} leave one for the last, and on it {name} has 1 value for each "
            f"statistic and {shows}.",
            help="Make the loader with drop_last=True, or with a batch size that leaves more than one sample.",
            falsify="A last batch with more than one sample, or a step on a single sample that normalizes.",
            numbers={"samples": samples, "batch_size": size, "last_batch": 1, "values_per_statistic": 1},
        )


def _last(subject: Subject) -> tuple[Any, int, int] | None:
    """A batch such as the last one, the number of samples and the batch size; None if it is not of one sample."""
    loader: Any = subject.loader
    if isinstance(loader, DataLoader):
        batches = loader.batch_sampler
        # the subclasses of BatchSampler make batches as they like
        if type(batches) is not BatchSampler or batches.drop_last:
            return None
        try:
            samples = len(batches.sampler)  # type: ignore[arg-type]
        except TypeError:
            return None
        size = batches.batch_size
        if samples % size != 1 or size == 1:
            return None
        generators = [g for owner in (loader, batches.sampler) if (g := getattr(owner, "generator", None)) is not None]
        with rng_kept(subject.model, generators):
            try:
                return loader.collate_fn([loader.dataset[next(iter(batches.sampler))]]), samples, size
            except Exception as error:
                raise CannotRun(f"one sample of the loader's data set could not be read: {error}") from error
    if isinstance(loader, Sequence) and len(loader) > 1:
        sizes = [next((t.size(0) for t in tensors_in(batch) if t.dim()), 0) for batch in loader]
        if sizes[-1] == 1 and set(sizes[:-1]) != {1}:
            return loader[-1], sum(sizes), max(sizes)
    return None
