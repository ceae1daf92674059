"""NW909."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..models import keyword, layers
from ..rule import Found, Rule
from ..source import Source, dotted
from ..training import is_eval

AVERAGED = {"torch.optim.swa_utils.AveragedModel"}
MENDS = (
    "update_bn",
    "recalibrate",
    "bn_update",
    "precise_bn",
    "update_precise_bn",
    "reset_running_stats",
    "use_buffers",
)


class AveragedWithoutStatistics(Rule):
    """Averaged weights keep batch norm statistics of other weights.

    What it does
        Finds `AveragedModel` of a network with batch norm, or a loop over `zip(average.parameters(),
        model.parameters())` that averages one into the other and evaluates it, where the file neither averages nor
        copies the buffers (`use_buffers=True`, `buffers()`, `state_dict()`) nor computes the statistics afterwards
        (`update_bn`, `nw.recalibrate`).

    Why is this bad
        The average of the weights has activations of its own. Its running statistics are those of the network as it
        was copied, before most of training, and at evaluation they normalize by a mean and variance that the averaged
        network never has.

    Example
        import torch
        from torch import nn
        from torch.optim.swa_utils import AveragedModel

        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        averaged = AveragedModel(model)
        for epoch in range(10):
            averaged.update_parameters(model)
        averaged.eval()
        print(averaged(torch.randn(8, 3, 32, 32)).mean())

    Use instead
        import torch
        from torch import nn
        from torch.optim.swa_utils import AveragedModel, update_bn

        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        averaged = AveragedModel(model)
        for epoch in range(10):
            averaged.update_parameters(model)
        update_bn([torch.randn(8, 3, 32, 32) for _ in range(10)], averaged)
        averaged.eval()
        print(averaged(torch.randn(8, 3, 32, 32)).mean())

    Fix safety
        `update_bn` resets the statistics of the averaged network only, and takes one pass over the data.

    References
        Izmailov et al. 2018, arXiv:1803.05407, section 3.2; https://docs.pytorch.org/docs/stable/optim.html#weight-averaging-swa-and-ema
    """

    code = "NW909"
    name = "averaged-without-statistics"
    severity = "error"
    words = ("AveragedModel", "parameters")

    def find(self, source: Source) -> Iterable[Found]:
        if any(word in line for line in source.lines for word in MENDS):
            return
        message = "weights are averaged, the batch norm statistics are not: they stay those of the copied network"
        help = "torch.optim.swa_utils.update_bn(loader, averaged) before evaluation"
        averages = any(dotted(call.func).endswith(".update_parameters") for call in source.calls)
        for call in source.calls:
            model = keyword(call, "model", 0)
            if averages and source.qual(call.func) in AVERAGED and layers(source, model).batch_norm:
                yield Found(call, message, help)
        if any(word in line for line in source.lines for word in ("buffers", "state_dict", "running_mean")):
            return
        for loop in source.loops:
            average = _averaged_by_hand(loop)
            evaluated = average is not None and any(
                is_eval(call) and dotted(call.func) == f"{dotted(average)}.eval" for call in source.calls
            )
            if evaluated and layers(source, average).batch_norm:
                yield Found(loop.iter, message, help)


def _averaged_by_hand(loop: Any) -> ast.expr | None:
    """The network whose parameters a loop averages: `for a, p in zip(average.parameters(), …): a.mul_(d).add_(…)`."""
    pairs = loop.iter if isinstance(loop, ast.For) else None
    if not isinstance(pairs, ast.Call) or dotted(pairs.func) != "zip" or len(pairs.args) != 2:
        return None
    sources = [a.func for a in pairs.args if isinstance(a, ast.Call) and isinstance(a.func, ast.Attribute)]
    targets = [dotted(t) for t in getattr(loop.target, "elts", ())]
    if [s.attr for s in sources] != ["parameters", "parameters"] or len(targets) != 2 or not all(targets):
        return None
    for node in ast.walk(loop):
        changed = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        in_place = changed is not None and node.func.attr in ("add_", "lerp_", "copy_")  # type: ignore[union-attr]
        if isinstance(node, ast.Assign):
            changed, in_place = node.targets[0], isinstance(node.targets[0], ast.Attribute)
        if in_place and changed is not None:
            named = {n.id for n in ast.walk(changed) if isinstance(n, ast.Name)}
            for i, target in enumerate(targets):
                if target in named:
                    return sources[i].value
    return None
