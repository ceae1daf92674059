from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ...surgery.receipt import shown
from ..check import Check, Finding
from ..probe import Subject

__all__ = ["WeightDecayOnNorms"]


class WeightDecayOnNorms(Check):
    """Weight decay acts on the scale and shift of normalization layers.

    What it does
        Looks for γ and β of normalization layers in the optimizer's groups with a weight decay above 0.

    Why is this bad
        Decay keeps weights small so that the function is simple; γ and β are scales and shifts, one a channel, and
        pulling γ to 0 turns channels off rather than smoothing anything. Published recipes leave both out, for gains
        of some tenths of a per cent on ImageNet: advice, not a fault.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        optimizer = torch.optim.AdamW(nw.param_groups(model, 0.05))

    Fix safety
        No operation on a running optimizer; build it from `nw.param_groups(model, weight_decay)`.

    References
        He et al. 2019, Bag of Tricks, arXiv:1812.01187, section 3.1; Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    code = "NW703"
    name = "weight-decay-on-norms"
    severity = "advice"
    evidence = "advice"
    needs = ("optimizer",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        assert subject.optimizer is not None
        decayed = {
            id(parameter): float(group["weight_decay"])
            for group in subject.optimizer.param_groups
            if float(group.get("weight_decay") or 0.0) > 0
            for parameter in group["params"]
        }
        found: dict[str, list[Tensor]] = {}
        for name, module in subject.norms().items():
            own: list[Tensor] = [p for p in module.parameters(recurse=False) if id(p) in decayed and p.requires_grad]
            if own:
                found[name] = own
        if not found:
            return
        parameters = [p for own in found.values() for p in own]
        decay = max(decayed[id(p)] for p in parameters)
        more = f" (and of {len(found) - 1} more norms)" if len(found) > 1 else ""
        yield self.finding(
            list(found),
            f"The optimizer decays γ and β of {shown(next(iter(found)))}{more} with a weight decay of {decay:g}.",
            help="Build the optimizer from nw.param_groups(model, weight_decay): γ, β and biases without decay.",
            falsify="Groups of the optimizer in which these parameters have weight_decay 0.",
            numbers={"weight_decay": decay, "norms": len(found), "parameters": sum(p.numel() for p in parameters)},
        )
