from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from ..axes import FEATURES, PLACES, SEQUENCE, NormAxes, axes_at_norms
from ..check import Check, Finding
from ..probe import Subject
from ..values import by_mark

__all__ = ["SequenceAsChannels", "at_the_place"]

# A norm of the features takes a factor on one of them away; rounding and eps leave less than a hundredth.
_LEFT = 0.1


class SequenceAsChannels(Check):
    """A batch norm gets (N, L, C), and normalizes the positions instead of the features.

    What it does
        Follows in one run which axis holds the features: linear maps, embeddings, recurrent layers and attention say
        so. Found are batch norms on three axes whose features are the last, where axis 1, which they normalize, is a
        sequence: it comes from one, is read as one after the norm, or is averaged. As proof one feature is multiplied
        by 10 at the norm's input, which a norm of the features would take away. Where nothing but linear maps of the
        last axis before and after shows it, it is advice. A norm that raises, and would run on the transposed input,
        is found too.

    Why is this bad
        `BatchNorm1d(L)` takes a mean, a variance, a weight and a bias for each position. Features keep their different
        scales, the same token is treated otherwise at another position, and no other length can be run.

    Example
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(50, 16)
                self.norm = torch.nn.BatchNorm1d(12)
                self.rnn = torch.nn.GRU(16, 16, batch_first=True)

            def forward(self, x):
                return self.rnn(self.norm(self.embed(x)))[0]

        model = Model()
        inputs = torch.randint(0, 50, (32, 12))

    Use instead
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(50, 16)
                self.norm = torch.nn.BatchNorm1d(16)
                self.rnn = torch.nn.GRU(16, 16, batch_first=True)

            def forward(self, x):
                return self.rnn(self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2))[0]

        model = Model()
        inputs = torch.randint(0, 50, (32, 12))

    Fix safety
        By hand: transpose before and after the norm and give it the number of features, or take LayerNorm.

    References
        torch.nn.BatchNorm1d: input (N, C) or (N, C, L).
    """

    code: ClassVar[str] = "NW301"
    name: ClassVar[str] = "sequence-as-channels"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)
    dims: ClassVar[tuple[int, ...]] = (3,)

    def find(self, subject: Subject) -> Iterable[Finding]:
        calls, raised = axes_at_norms(subject)
        norms = set(subject.batch_norms().values())
        calls = [call for call in calls if call.module in norms and call.x.dim() in self.dims]
        if raised is not None:
            yield from self._refused(subject, calls)
        seen: dict[Any, NormAxes] = {}
        for call in calls:
            if call.finished and call.roles[-1] == FEATURES != call.roles[1]:
                seen.setdefault(call.module, call)
        tried = {call.name: _left(subject, call) for call in seen.values() if _positions(call)}
        sure = {name: left for name, left in tried.items() if left > _LEFT}
        for group in by_mark(subject, self.code, [call for call in seen.values() if call.name in sure]):
            yield self._found(subject, group, left=sure[group[0].name])
        if self.dims == (3,):
            unsure = [call for call in seen.values() if call.name not in sure and _between_linear_maps(call)]
            for group in by_mark(subject, self.code, unsure):
                yield self._found(subject, group, left=None)

    def _found(self, subject: Subject, group: list[NormAxes], left: float | None) -> Finding:
        call = group[0]
        shape = tuple(call.x.shape)
        last = len(shape) - 1
        more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
        proof = "" if left is None else f"; a factor of 10 on one feature is still in its output ({left:.0%} off)"
        return self.finding(
            [one.name for one in group],
            f"{subject.name(call.module)}{more} normalizes axis 1 of an input of shape {shape}, {shape[1]} places, and "
            f"the features are axis {last}{proof}.",
            help=f"Move the features to axis 1 for the norm, {self._moves(last)}, with num_features={shape[-1]}; or "
            "use LayerNorm.",
            falsify="A factor on one of the features that the norm takes away, or axis 1 made by a linear map as well.",
            numbers={"shape": shape, "features_axis": last, "change_by_factor_on_a_feature": left},
            severity=None if left is not None else "advice",
            evidence=None if left is not None else "advice",
        )

    def _refused(self, subject: Subject, calls: list[NormAxes]) -> Iterable[Finding]:
        """The norm at which the run ended, where features on axis 1 are all that is wrong."""
        for call in calls:
            module: Any = call.module
            channels, shape = getattr(module, "num_features", None), tuple(call.x.shape)
            if (
                not call.finished
                and channels == shape[-1] != shape[1]
                and _runs(subject, module, call.x.movedim(-1, 1))
            ):
                last = len(shape) - 1
                yield self.finding(
                    call.name,
                    f"{subject.name(module)} has {channels} channels and raises on an input of shape {shape}, whose "
                    f"axis {last} they are; with that axis as axis 1 it runs.",
                    help=f"Move the features to axis 1 for the norm, {self._moves(last)}; or use LayerNorm.",
                    falsify="The layer running on this input.",
                    numbers={"shape": shape, "channels": channels, "features_axis": last},
                    severity="error",
                )

    def _moves(self, last: int) -> str:
        return "norm(x.transpose(1, 2)).transpose(1, 2)" if last == 2 else "norm(x.movedim(-1, 1)).movedim(1, -1)"


def _positions(call: NormAxes) -> bool:
    """Whether axis 1 is known as positions, and is read as such; what is flattened or convolved after may mean it."""
    if ("channels", 1) in call.reads:
        return False
    reads = {("sequence", 1), ("pooled", 1)} & call.reads
    return bool(reads) or (call.roles[1] in (PLACES, SEQUENCE) and ("linear", call.x.dim() - 1) in call.reads)


def _between_linear_maps(call: NormAxes) -> bool:
    return ("linear", call.x.dim() - 1) in call.reads and not {("channels", 1), ("linear", 1)} & call.reads


def at_the_place(subject: Subject, module: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The layer alone on other inputs, in the modes as they are, each from the same statistics; as float64."""
    outputs = []
    for x in inputs:
        with subject.experiment(), torch.no_grad():
            module.training = True if hasattr(module, "running_mean") else module.training
            outputs.append(module.forward(x.clone()).double())
    return outputs


def _left(subject: Subject, call: NormAxes) -> float:
    """How far a factor of 10 on one feature moves that feature in the norm's output, relative to its size."""
    other = call.x.clone()
    other[..., 0] *= 10
    try:
        before, after = at_the_place(subject, call.module, call.x, other)
    except (RuntimeError, ValueError):
        return 0.0  # one value per statistic, which is another check's
    size = float(before[..., 0].square().mean().sqrt())
    return float((after - before)[..., 0].square().mean().sqrt()) / max(size, 1e-12)


def _runs(subject: Subject, module: Any, x: torch.Tensor) -> bool:
    try:
        at_the_place(subject, module, x)
    except (RuntimeError, ValueError):
        return False
    return True
