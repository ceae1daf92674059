"""What `fold` gains: the folded network against the original, at inference and in fine-tuning with frozen statistics.

`python benchmarks/fold.py [--models resnet18,…] [--size 128] [--batch 8] [--turns 15] [--threads N] [--out fold.jsonl]`

timm's networks in evaluation mode, random weights, one process. Inference: the original, `fold`, and for comparison
`accelerate`, which keeps the norms on this package's kernels. A step: forward, sum and backward to all parameters, of
the original and of `fold(differentiable=True)`. In every turn each network runs once, in an order that rotates; ratios
compare times of the same turn, and the figure is their median with quartiles: above 1 the operation is faster. Before
anything is timed, the outputs are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from normwright.lab.journal import environment
from normwright.surgery import accelerate, fold

MODELS = "resnet18,resnet50,mobilenetv2_100,efficientnet_b0,regnety_004,densenet121,repvgg_a0"
COLUMNS = ("folded", "accelerated", "on the fly, a step")


def timm_model(name: str) -> nn.Module:
    """The network in evaluation mode, its statistics not those of a new one."""
    if not hasattr(torch.ops.torchvision, "nms"):
        # torchvision's import asks for two of its compiled operators, which are not there beside another torch build
        timm_model.library = library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[attr-defined]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    model = timm.create_model(name).eval()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def infer(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).sum().backward()


def interleaved(sides: list[Callable[[], None]], turns: int) -> list[list[float]]:
    """Seconds of each side in each turn; the first two turns warm up."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(turns + 2):
        for k in range(len(sides)):
            i = (turn + k) % len(sides)
            start = time.perf_counter()
            sides[i]()
            seconds[i].append(time.perf_counter() - start)
    return [times[2:] for times in seconds]


def ratios(before: list[float], after: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of how many times faster."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(before, after, strict=True)], n=4)
    return middle, low, high


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    model = timm_model(name)
    x = torch.randn(options.batch, 3, options.size, options.size)
    folded, fly = fold(model, x), fold(model, x, differentiable=True)
    fast = accelerate(model, x)
    with torch.inference_mode():
        scale = model(x).abs().max().item()
    for receipt in (folded, fly, fast):
        if not receipt.max_difference < 1e-3 * scale:
            raise RuntimeError(f"{name}: outputs of {scale:.3g} moved by {receipt.max_difference:.3g}, more than 0.1%.")
    models = [model, folded.model, fast.model]
    inference = interleaved([lambda m=m: infer(m, x) for m in models], options.turns)
    steps = interleaved([lambda m=m: step(m, x) for m in (model, fly.model)], options.turns)
    return {
        "model": name,
        "norms": len(folded.edits) + len(folded.skipped),
        "folded": len(folded.edits),
        "difference": folded.max_difference / scale if folded.max_difference is not None else None,
        "inference ms": statistics.median(inference[0]) * 1e3,
        "step ms": statistics.median(steps[0]) * 1e3,
        "faster": dict(zip(COLUMNS, (*(ratios(inference[0], s) for s in inference[1:]), ratios(*steps)), strict=True)),
    }


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    about = environment() | {"load": round(os.getloadavg()[0], 1), "batch": options.batch, "size": options.size}
    for name in options.models.split(","):
        yield {**about, "turns": options.turns, **measure(name, options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="timm's names, separated by commas")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side, default 128")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=15, help="timed turns of a network, default 15")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("fold.jsonl"), help="file for the JSON lines, appended to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table(title=f"fold: times faster than the original, median (quartiles) of {options.turns} turns")
    for column in ("model", "norms folded", "inference ms", *COLUMNS[:2], "step ms", COLUMNS[2]):
        table.add_column(column, justify="left" if column == "model" else "right")
    with options.out.open("a", encoding="utf-8") as file:
        for row in results(options):
            file.write(json.dumps(row) + "\n")
            file.flush()
            faster = ["{:.2f} ({:.2f}–{:.2f})".format(*row["faster"][column]) for column in COLUMNS]
            times = [f"{row[key]:.1f}" for key in ("inference ms", "step ms")]
            count = f"{row['folded']} of {row['norms']}"
            table.add_row(row["model"], count, times[0], *faster[:2], times[1], faster[2])
            table.caption = (
                f"{row['cpu']}, {row['threads']} of {row['cores']} cores, load {row['load']}; torch {row['torch']}, "
                f"commit {row['commit']}; batch {row['batch']}, {row['size']}×{row['size']}, float32"
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
