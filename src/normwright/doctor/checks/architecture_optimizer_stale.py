from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from ...surgery.modules import names_of_parameters
from ..check import Check, Finding
from ..probe import Subject

__all__ = ["OptimizerHoldsOthers"]


class OptimizerHoldsOthers(Check):
    """The optimizer holds parameters that were replaced in the model.

    What it does
        Compares the parameters that require a gradient with those in the optimizer, by identity. Found are parameters
        that the optimizer does not hold, if it holds tensors that are not in the model in their place, one for each:
        of the same shapes, or, as where a layer was replaced by one of another size, with as many axes and between the
        same parameters of the model. An optimizer of a part of the model, or of this model and others, is silent.

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
        # a loss may have parameters of its own
        of_loss = {id(p) for p in subject.loss.parameters()} if isinstance(subject.loss, nn.Module) else set()
        others = [p for key, p in held.items() if key not in names and key not in of_loss]
        shapes = Counter(tuple(p.shape) for p in missing.values())
        same = not shapes - Counter(tuple(p.shape) for p in others)
        if not missing or not (same or self._in_their_place(subject, {id(p) for p in others})):
            return
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in missing))
        first = next(iter(missing))
        more = f" and {len(missing) - 1} more parameters" if len(missing) > 1 else ""
        yield self.finding(
            modules,
            f"The optimizer does not hold {first}{more} of the model, and holds {len(others)} tensors "
            f"{'of the same shapes' if same else 'in their place'} that are not in the model: these are stepped, and "
            "the model's are not.",
            help="Make the optimizer after converting, copying or moving the model.",
            falsify="A step of this optimizer that changes the named parameters.",
            numbers={"parameters_not_held": len(missing), "tensors_not_in_the_model": len(others)},
        )

    def _in_their_place(self, subject: Subject, others: set[int]) -> bool:
        """Whether each parameter that is missing has one of the others where it would stand in the optimizer.

        An optimizer keeps the order of `model.parameters()` in its groups. So a tensor that was replaced lies between
        the parameters that come before and after it in the model; those of another model, next to a part of this one,
        lie behind that part, where nothing is missing. A group of nothing but others says only what it comes behind.
        """
        assert subject.optimizer is not None
        trained: list[Tensor] = [p for p in subject.model.parameters() if p.requires_grad]
        order = {id(p): i for i, p in enumerate(trained)}
        held: set[int] = set()
        places: list[tuple[int, int, int]] = []  # axes, and the bounds in the model's order
        for group in subject.optimizer.param_groups:
            keys = [id(p) for p in group["params"]]
            alone = not any(key in order for key in keys)
            behind = max((order[key] for key in held), default=len(trained)) if alone else -1
            for at, p in enumerate(group["params"]):
                if id(p) in others:
                    before = [order[key] for key in keys[:at] if key in order]
                    after = [order[key] for key in keys[at:] if key in order]
                    places.append((p.dim(), max(before, default=behind), min(after, default=len(trained))))
            held.update(key for key in keys if key in order)
        for i, p in enumerate(trained):
            if id(p) not in held:
                # of the places that fit, the one that ends first, so that the others are left for later ones
                fits = [place for place in places if place[0] == p.dim() and place[1] < i < place[2]]
                if not fits:
                    return False
                places.remove(min(fits, key=lambda place: place[2]))
        return True
