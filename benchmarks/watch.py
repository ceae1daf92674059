"""What `watch` costs: training steps of a watched model against the same steps unwatched, interleaved.

`python benchmarks/watch.py [--models mlp,…] [--turns 20] [--threads N] [--out watch.jsonl]`

Two equal models, the second watched, take the same steps one after the other in one process, the order changing at
every step. A turn is seventeen steps, of which one is a look; the figure is the median over turns of the ratio of the
two times, with quartiles. The first seventeen steps, with eight looks, are a figure of their own. The limit is 1.05.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import normwright as nw
from normwright.lab.journal import environment

LIMIT = 1.05


def mlp() -> tuple[nn.Module, Tensor]:
    """Three layers of 256 with batch norm, a batch of 128."""
    layers: list[nn.Module] = []
    for before in (784, 256, 256):
        layers += [nn.Linear(before, 256), nn.BatchNorm1d(256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10)), torch.randn(128, 784)


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def resnet() -> tuple[nn.Module, Tensor]:
    """Thirteen convolutions, 16 to 64 channels, CIFAR's size, a batch of 32."""
    blocks = [
        Block(16, 16, 1),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 32, 1),
        Block(32, 64, 2),
        Block(64, 64, 1),
    ]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.randn(
        32, 3, 32, 32
    )


def resnet_accelerated() -> tuple[nn.Module, Tensor]:
    """The same on this package's kernels, norms and activations fused."""
    model, x = resnet()
    return nw.accelerate(model).model, x


MODELS = (mlp, resnet, resnet_accelerated)


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], None]:
    targets = torch.arange(len(x)) % 10

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), targets).backward()
        optimizer.step()

    return step


def measure(make: Callable[[], tuple[nn.Module, Tensor]], turns: int) -> dict[str, Any]:
    """Seconds of each side by turn, and their ratios."""
    torch.manual_seed(0)
    model, x = make()
    watched = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (model, watched)]
    steps = [stepper(m, optimizer, x) for m, optimizer in zip((model, watched), optimizers, strict=True)]
    for step in steps * 5:
        step()
    seconds: list[tuple[float, float]] = []
    with nw.watch(watched, optimizers[1]):
        for _ in range(turns + 1):
            total = [0.0, 0.0]
            for i in range(17):
                for side in ((0, 1), (1, 0))[i % 2]:
                    start = time.perf_counter()
                    steps[side]()
                    total[side] += time.perf_counter() - start
            seconds.append((total[0], total[1]))
    ratios = [after / before for before, after in seconds]
    low, middle, high = statistics.quantiles(ratios[1:], n=4)
    step_ms = 1e3 * statistics.median(before for before, _ in seconds) / 17
    return {"step_ms": step_ms, "ratio": middle, "low": low, "high": high, "first": ratios[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20, help="turns of seventeen steps")
    parser.add_argument("--models", default=",".join(make.__name__ for make in MODELS))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = environment()
    table = Table(title="A watched step over an unwatched one")
    for column in ("model", "unwatched", "median (quartiles)", "first 17 steps", f"≤ {LIMIT}"):
        table.add_column(column)
    for make in (make for make in MODELS if make.__name__ in options.models.split(",")):
        row = measure(make, options.turns)
        figure = f"{row['ratio']:.3f} ({row['low']:.3f}–{row['high']:.3f})"
        within = "yes" if row["ratio"] <= LIMIT else "no"
        table.add_row(make.__name__, f"{row['step_ms']:.2f} ms", figure, f"{row['first']:.3f}", within)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({"model": make.__name__, **row, **about}) + "\n")
    Console().print(table)
    Console().print(", ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    main()
