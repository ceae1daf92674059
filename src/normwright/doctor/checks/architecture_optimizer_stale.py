from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ...surgery.modules import names_of_parameters
from ..check import Check, Finding
from ..probe import Subject

__all__ = ["OptimizerHoldsOthers"]


class OptimizerHoldsOthers(Check):
    """The optimizer holds parameters that were replaced in the model.

    What it does
        Compares the parameters that require a gradient with those in the optimizer, by identity. Found are parameters
        that the optimizer does not hold, if it holds tensors of the same shapes, one for each, that are not in the
        model. An optimizer of a part of the model, or of this model and others, is silent.

    Why is this bad
        Layers that were converted, copied or loaded into new parameters after the optimizer was made are never
        trained: the optimizer steps the old tensors, which nobody reads.

    Example
        body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(body.parameters(), lr=0.1)
        import copy
        model = copy.deepcopy(body)

    Use instead
        import copy
        body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
        model = copy.deepcopy(body)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    Fix safety
        No operation: make the optimizer after the model is converted, copied and on its device.

    References
        torch.optim: "construct the optimizer after moving a model"; its groups hold tensors, not names.
    """

    code = "NW709"
    name = "optimizer-holds-other-parameters"
    severity = "error"
    evidence = "measured"
    needs = ("optimizer",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        assert subject.optimizer is not None
        held = {id(p): p for group in subject.optimizer.param_groups for p in group["params"]}
        names = names_of_parameters(subject.model)
        missing = {
            names[id(p)][0]: p for p in subject.model.parameters() if p.requires_grad and id(p) not in held
        }  # fmt: skip
        others = [p for key, p in held.items() if key not in names]
        shapes = Counter(tuple(p.shape) for p in missing.values())
        if not missing or shapes - Counter(tuple(p.shape) for p in others):
            return
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in missing))
        first = next(iter(missing))
        more = f" and {len(missing) - 1} more parameters" if len(missing) > 1 else ""
        yield self.finding(
            modules,
            f"The optimizer does not hold {first}{more} of the model, and holds {len(others)} tensors of the same "
            "shapes that are not in the model: these are stepped, and the model's are not.",
            help="Make the optimizer after converting, copying or moving the model.",
            falsify="A step of this optimizer that changes the named parameters.",
            numbers={"parameters_not_held": len(missing), "tensors_not_in_the_model": len(others)},
        )
