from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ... import surgery
from ..check import Check, Finding
from ..probe import Subject

__all__ = ["FrozenButTheNorm"]


class FrozenButTheNorm(Check):
    """Everything around a norm is frozen, and the norm learns.

    What it does
        Looks for norms with trainable weight or bias in a part of the model where all other parameters have
        requires_grad=False. The part is the module that holds the norm, or the nearest one around it that has
        parameters other than norms'.

    Why is this bad
        Where convolutions and linear layers were frozen by type, the norms were forgotten, and what was to be fixed
        features is rescaled in every channel. Where it is meant (training only the norms is a method), it is right.

    Example
        model = torch.nn.Sequential(
            torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
            torch.nn.Flatten(),
            torch.nn.Linear(288, 2),
        )
        model[0][0].requires_grad_(False)

    Use instead
        model = torch.nn.Sequential(
            torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
            torch.nn.Flatten(),
            torch.nn.Linear(288, 2),
        )
        model[0][0].requires_grad_(False)
        nw.freeze(model)

    Fix safety
        Unsafe: freezing ends a training of the norms alone that may be meant.

    References
        Frankle, Schwab & Morcos 2020, Training BatchNorm and Only BatchNorm, arXiv:2003.00152; Lu et al. 2021,
        Pretrained Transformers as Universal Computation Engines, arXiv:2103.05247.
    """

    code = "NW403"
    name = "frozen-but-the-norm"
    severity = "advice"
    evidence = "advice"

    def find(self, subject: Subject) -> Iterable[Finding]:
        norms = subject.norms()
        of_norms = {id(p) for norm in norms.values() for p in norm.parameters()}
        learning = [
            name
            for name, norm in norms.items()
            if any(p.requires_grad for p in norm.parameters(recurse=False)) and _alone(subject, name, of_norms)
        ]
        if not learning:
            return
        model, first = subject.model, norms[learning[0]]
        more = f" (and {len(learning) - 1} more)" if len(learning) > 1 else ""
        numbers = sum(p.numel() for name in learning for p in norms[name].parameters() if p.requires_grad)
        freezable = all(isinstance(norms[name], nn.modules.batchnorm._NormBase) for name in learning)
        yield self.finding(
            learning,
            f"{subject.name(first)}{more} learns ({numbers} parameters) where all around it is frozen.",
            help="If the part is to be fixed, nw.freeze(model) for batch norms, requires_grad_(False) for others; if "
            "training only the norms is meant, nw.intended('NW403', why).",
            falsify="A trainable parameter, not a norm's, in the same part of the model.",
            numbers={"layers": len(learning), "parameters": numbers},
            repair=(lambda: surgery.freeze(model, only=learning)) if freezable else None,
            safe=False,
        )


def _alone(subject: Subject, name: str, of_norms: set[int]) -> bool:
    """Whether the nearest part around the norm that has other parameters has them all frozen."""
    parts = name.split(".") if name else []
    for end in range(len(parts) - 1, -1, -1):
        part = subject.modules[".".join(parts[:end])]
        others = [p for p in part.parameters() if id(p) not in of_norms]
        if others:
            return not any(p.requires_grad for p in others)
    return False
