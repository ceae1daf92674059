"""NW509: a few norms with another eps than their likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..check import Check, Finding
from ..probe import Subject, spec_of

# of the layer's own output: less is no cause of anything
_EFFECT = 0.01
# so many of four layers agree on one eps before the others are exceptions
_MOST = 0.75


class EpsDiffers(Check):
    """A norm has another eps than the others of its kind, and its outputs show it.

    What it does
        Among norms of the same kind, finds those whose eps differs from that of at least three quarters, runs them with
        the common one on the inputs they met, and compares outputs: 1 % or more is said.

    Why is this bad
        Frameworks have other defaults (torch 1e-5; Keras and TensorFlow 1e-3; BERT 1e-12), and no state_dict holds eps.
        A layer that was swapped, converted or added later gets the default, and where variances are small outputs move.

    Example
        model = torch.nn.Sequential(
            *(torch.nn.BatchNorm1d(8, affine=False) for _ in range(4)),
            torch.nn.BatchNorm1d(8, affine=False, eps=0.1),
        )
        inputs = torch.randn(256, 8)

    Use instead
        model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(8, affine=False) for _ in range(5)))
        inputs = torch.randn(256, 8)

    Fix safety
        By hand: set `layer.eps` to what the checkpoint was trained with.

    References
        torch.nn.BatchNorm2d; keras.layers.BatchNormalization (epsilon=0.001).
    """

    code = "NW509"
    name = "eps-differs"
    severity = "advice"
    evidence = "advice"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        groups: dict[str, dict[str, Any]] = {}
        for name, norm in subject.norms().items():
            spec = spec_of(norm)
            if spec is not None and isinstance(getattr(norm, "eps", None), float):
                groups.setdefault(spec.pattern, {})[name] = norm
        for norms in groups.values():
            common, count = Counter(norm.eps for norm in norms.values()).most_common(1)[0]
            if len(norms) < 4 or not _MOST * len(norms) <= count < len(norms):
                continue
            for name, norm in norms.items():
                if norm.eps != common and (effect := _effect(subject, norm, common)) >= _EFFECT:
                    yield self.finding(
                        name,
                        f"{subject.name(norm)}: eps is {norm.eps:g} where {count} of {len(norms)} such layers have "
                        f"{common:g}; with that its outputs would move by {effect:.1%} of their deviation.",
                        help="If this is not meant, set eps to that of the other layers, or of the checkpoint's "
                        "source.",
                        falsify="The code that trained the checkpoint has this eps in this layer.",
                        numbers={"eps": norm.eps, "eps of the others": common, "output difference": effect},
                    )


def _effect(subject: Subject, norm: Any, eps: float) -> float:
    """How far outputs move with this eps, in deviations of the output, on the inputs of an evaluating forward."""
    calls = subject.forward(training=False).of(norm)
    found = 0.0
    with subject.experiment(), torch.no_grad():
        norm.training, norm.eps = False, eps
        for call in calls:
            y: Tensor = norm(call.x, **call.kwargs)
            spread = call.y.double().std().clamp_min(1e-12)
            found = max(found, float((y.double() - call.y.double()).square().mean().sqrt() / spread))
    return found
