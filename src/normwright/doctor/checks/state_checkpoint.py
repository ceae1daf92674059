"""NW511: a checkpoint whose running statistics do not arrive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery.receipt import shown
from ..check import Check, Finding
from ..probe import CannotRun, Subject


class CheckpointStatistics(Check):
    """The running statistics of the checkpoint are not those of the model.

    What it does
        Compares the checkpoint's keys and values with the model's. A batch norm whose weights are in the checkpoint
        and whose running statistics are not; a model that has the checkpoint's weights and still mean 0 and variance 1;
        a checkpoint none of whose keys the model has.

    Why is this bad
        `load_state_dict(…, strict=False)` says nothing. The weights are loaded, training mode works, and at evaluation
        each batch norm normalizes by mean 0 and variance 1.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
        checkpoint = {key: value for key, value in model.state_dict().items() if "running" not in key}

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
        checkpoint = model.state_dict()

    Fix safety
        With a loader, the repair recalibrates the model in place; nothing but running statistics changes, but they are
        this data's, so it is not done unasked.

    References
        torch.nn.Module.load_state_dict (strict); torch.optim.swa_utils.update_bn.
    """

    code = "NW511"
    name = "checkpoint-without-statistics"
    severity = "error"
    evidence = "measured"
    needs = ("checkpoint",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        state, own = _state(subject.checkpoint), subject.model.state_dict()
        if not state.keys() & own.keys():
            yield self.finding(
                (),
                f"none of the checkpoint's {len(state)} keys is one of the model's {len(own)} ({min(state)!r} is "
                f"not like {min(own)!r}): with strict=False nothing is loaded.",
                help="Give the keys the model's names, usually by removing or adding a prefix, and load with "
                "strict=True.",
                falsify="model.load_state_dict(checkpoint) does not raise.",
                numbers={"keys in common": 0},
            )
            return
        missing = []
        unloaded = []
        same = all(
            key in state and _equal(state[key], value)
            for key, value in subject.model.named_parameters()
            if key in state
        )
        for name, norm in subject.tracked().items():
            keys = [f"{name}.{key}".removeprefix(".") for key in ("running_mean", "running_var")]
            weight = f"{name}.weight".removeprefix(".")
            fresh = _fresh(norm)
            if weight in state and not any(key in state for key in keys) and (fresh or not same):
                missing.append(name)
            elif same and fresh and any(key in state and not _equal(state[key], own[key]) for key in keys):
                unloaded.append(name)
        for names, what in (
            (missing, "has weights in the checkpoint and no running statistics"),
            (unloaded, "has the checkpoint's weights, but mean 0 and variance 1 where the checkpoint has statistics"),
        ):
            if names:
                others = f", as {len(names) - 1} more" if len(names) > 1 else ""
                yield self.finding(
                    names,
                    f"{shown(names[0])} {what}{others}: evaluation is of another network than was trained.",
                    help="Load a whole state_dict with strict=True; where the statistics are lost, "
                    "nw.recalibrate(model, loader) measures them anew.",
                    falsify="Right after loading, every running_mean equals the one in the training run.",
                    numbers={"layers": len(names)},
                    repair=_recalibration(subject),
                    safe=False,
                )


def _recalibration(subject: Subject) -> Any:
    from ...surgery import recalibrate

    if subject.loader is None:
        return None
    return lambda: recalibrate(subject.model, subject.loader)  # type: ignore[arg-type]


def _state(checkpoint: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the plain model."""
    from ...surgery.checkpoint import _NESTS, _PREFIXES, read

    if isinstance(checkpoint, (str, Path)):
        checkpoint = read(checkpoint).state
    for nest in _NESTS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(nest), Mapping):
            checkpoint = checkpoint[nest]
            break
    if not isinstance(checkpoint, Mapping):
        raise CannotRun(f"checkpoint= is a state dict or a path to one; it is a {type(checkpoint).__name__}")
    state = {str(key): value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if not state:
        raise CannotRun("the checkpoint holds no tensors")
    return state


def _fresh(norm: nn.Module) -> bool:
    """Whether the running statistics are those of a new layer."""
    mean, variance = (norm._buffers.get(key) for key in ("running_mean", "running_var"))
    return (mean is None or not bool(mean.any())) and (variance is None or bool((variance == 1).all()))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().cpu().to(b.dtype), b.detach().cpu())
