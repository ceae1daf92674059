"""NW604: channels that reach a batch norm without variance."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..check import Check, Finding
from ..probe import Subject

# of eps: the output then has a tenth of its deviation and less
_PART = 0.01
# batches from which on "always" is said; with fewer, units that are dead by chance are not worth a word
_ALWAYS = 3
_SHARE = 0.5
_BATCHES = 8


class ConstantChannels(Check):
    """Channels enter a batch norm as constants.

    What it does
        Takes the variance of each channel at each batch norm over up to 8 batches of the loader, or one of inputs, and
        the movement of its mean between them. A channel whose variance is below a hundredth of eps leaves the layer as
        its bias. All channels of a layer, in 3 batches or more, is a warning; some of them, or half in fewer batches,
        is advice.

    Why is this bad
        The channel carries nothing. Its running variance goes to 0, so that the first sample at evaluation in which it
        does move is multiplied by up to 1 / sqrt(eps), 316 at 1e-5.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.BatchNorm1d(8))
        torch.nn.init.constant_(model[0].weight, -1.0)
        loader = [torch.rand(64, 4) for _ in range(4)]

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.BatchNorm1d(8))
        loader = [torch.randn(64, 4) for _ in range(4)]

    Fix safety
        By hand: what makes them constant (dead units before the norm, empty input features, a scale far below eps) is
        upstream.

    References
        Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1: eps is there for such channels.
    """

    code = "NW604"
    name = "constant-channels"
    severity = "warning"
    evidence = "measured"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        layers = subject.batch_norms()
        batches = subject.batches(_BATCHES)
        seen: dict[nn.Module, list[Tensor]] = {}
        for batch in batches:
            for call in subject.forward(batch, training=True).calls:
                if call.name in layers and call.x.dim() > 1 and call.x.numel() > call.x.shape[1]:
                    values = call.x.double().transpose(0, 1).flatten(1)
                    moments = torch.stack([values.mean(1), values.var(1, correction=0)])
                    seen.setdefault(call.module, []).append(moments)
        for name, norm in layers.items():
            if norm not in seen or len({m.shape for m in seen[norm]}) > 1:
                continue
            means, variances = torch.stack(seen[norm]).unbind(1)
            eps = float(getattr(norm, "eps", 1e-5))
            whole = variances.mean(0) + means.var(0, correction=0)
            constant = whole < _PART * eps
            count, total = int(constant.sum()), constant.numel()
            if not count or (len(batches) < _ALWAYS and count < _SHARE * total):
                continue
            always = count == total and len(batches) >= _ALWAYS
            yield self.finding(
                name,
                f"{count} of {total} channels reach {subject.name(norm)} with a variance below {_PART * eps:.1g} "
                "(eps is "
                f"{eps:g}) in {'the one batch' if len(batches) == 1 else f'all of {len(batches)} batches'}: they "
                "leave as their bias.",
                severity="warning" if always else "advice",
                evidence="measured" if always else "advice",
                help="Look at what is before: dead units, constant input features, or activations scaled far below 1.",
                falsify="Over more batches these channels have a variance near their running variance, and above eps.",
                numbers={"constant channels": count, "channels": total, "batches": len(batches)},
            )
