"""NW909."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from ..models import keyword, layers
from ..rule import Found, Rule
from ..source import Source

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
        Finds `AveragedModel` of a network with batch norm where the file neither averages the buffers
        (`use_buffers=True`) nor computes the statistics afterwards (`update_bn`, `nw.recalibrate`).

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
    words = ("AveragedModel",)

    def find(self, source: Source) -> Iterable[Found]:
        if any(word in line for line in source.lines for word in MENDS):
            return
        for call in source.calls:
            if source.qual(call.func) not in AVERAGED or keyword(call, "model", 0) is None:
                continue
            evaluated = any(
                isinstance(other.func, ast.Attribute) and other.func.attr == "update_parameters"
                for other in source.calls
            )
            if evaluated and layers(source, keyword(call, "model", 0)).batch_norm:
                message = (
                    "weights are averaged, the batch norm statistics are not: they stay those of the copied network"
                )
                yield Found(call, message, "torch.optim.swa_utils.update_bn(loader, averaged) before evaluation")
