"""A training step of ResNet-18 on 32×32 images: as it is, with `accelerate`, with `tune_allocator`, with both.

`python benchmarks/resnet18.py [--batch 128] [--steps 15] [--rounds 3] [--bf16] [--channels-last] [--json FILE]`

A step is forward, cross entropy, backward and SGD with momentum. One child process has the allocator as it is, another
has it tuned (a process cannot take that back); within each, the original and the accelerated model take steps in turn
and swap who is first, so that a ratio compares neighbours in time. `rounds` repeats both processes, in turn. Peak
memory is measured in processes that hold one model only. Ratios are medians over pairs with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwright.allocator import tune_allocator
from normwright.kernels.dispatch import BACKENDS
from normwright.surgery.accelerate import accelerate


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet18(width: int) -> nn.Sequential:
    """ResNet-18 with the stem for small images: a 3×3 convolution, no pooling."""
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    blocks = []
    for i in range(4):
        blocks += [
            BasicBlock(widths[i], widths[i + 1], 1 if i == 0 else 2),
            BasicBlock(widths[i + 1], widths[i + 1], 1),
        ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))
    return nn.Sequential(stem, *blocks, head)


class Trainer:
    """One model, one optimizer and the same batch again and again."""

    def __init__(self, options: argparse.Namespace, fast: bool) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        model = resnet18(options.width).to(dtype=dtype, memory_format=layout)
        if fast:
            receipt = accelerate(model)
            counts = [receipt.facts[key] for key in ("norms", "activations fused", "residuals fused")]
            if counts != [20, 17, 8]:
                raise RuntimeError(f"ResNet-18 has 20 norms, 17 activations and 8 additions to fuse; got {counts}.")
            model = receipt.model
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.x = torch.randn(options.batch, 3, 32, 32).to(dtype=dtype, memory_format=layout)
        self.y = torch.randint(0, 10, (options.batch,))

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(self.x).float(), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        seconds = time.perf_counter() - start
        self.loss = loss.item()
        return seconds


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def child(options: argparse.Namespace) -> dict[str, Any]:
    """What one process measures: `pairs` of seconds, or the `peak` of one model."""
    torch.set_num_threads(options.threads)
    tuning = tune_allocator() if options.tuned else None
    if tuning is not None and not tuning.applied:
        raise SystemExit(tuning.reason)
    if options.job == "peak":
        base = peak_bytes()
        trainer = Trainer(options, options.fast)
        for _ in range(3):
            trainer.step()
        return {"peak": peak_bytes(), "base": base}
    sides = [Trainer(options, fast) for fast in (False, True)]
    for _ in range(options.warmup):
        for side in sides:
            side.step()
    if abs(sides[0].loss - sides[1].loss) > (0.1 if options.bf16 else 0.02):
        raise RuntimeError(f"Both models train the same and their losses differ: {sides[0].loss}, {sides[1].loss}.")
    pairs = []
    for i in range(options.steps):
        times = {}
        for k in (0, 1) if i % 2 == 0 else (1, 0):
            times[k] = sides[k].step()
        pairs.append((times[0], times[1]))
    return {"pairs": pairs}


def spawn(options: argparse.Namespace, **job: Any) -> dict[str, Any]:
    arguments = [sys.executable, __file__, "--child", json.dumps({**vars(options), **job})]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--steps", type=int, default=15, help="timed pairs of steps in each process")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="append the result as one line")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(argparse.Namespace(**json.loads(options.child)))))
        return
    seconds: dict[bool, list[list[float]]] = {False: [], True: []}
    for _ in range(options.rounds):
        for tuned in (False, True):
            seconds[tuned] += spawn(options, job="pairs", tuned=tuned)["pairs"]
    peaks = {
        (fast, tuned): spawn(options, job="peak", tuned=tuned, fast=fast)
        for fast in (False, True)
        for tuned in (False, True)
    }
    result = report(options, seconds, peaks)
    if options.json:
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def report(
    options: argparse.Namespace, seconds: dict[bool, list[list[float]]], peaks: dict[Any, Any]
) -> dict[str, Any]:
    """Print the table; the same numbers as a dictionary."""
    facts = {
        "machine": f"{processor()}, {options.threads} threads of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}, {' '.join(platform.libc_ver())}",
        "kernels": ", ".join([*BACKENDS, "native"]),
        "setting": f"batch {options.batch}, width {options.width}, {'bf16' if options.bf16 else 'fp32'}, "
        f"{'NHWC' if options.channels_last else 'NCHW'}, {len(seconds[False])} pairs in {options.rounds} processes",
    }
    for key, value in facts.items():
        print(f"{key:>9}: {value}")
    before = [pair[0] for pair in seconds[False]]
    rows = {
        "as it is": (before, None, (False, False)),
        "accelerate": ([b for _, b in seconds[False]], [a / b for a, b in seconds[False]], (True, False)),
        "tune_allocator": ([a for a, _ in seconds[True]], None, (False, True)),
        "accelerate, allocator tuned": ([b for _, b in seconds[True]], [a / b for a, b in seconds[True]], (True, True)),
    }
    result: dict[str, Any] = {**facts, "rows": {}}
    heads = f"{'ms a step':>10} {'quartiles':>17} {'faster ×':>9} {'paired × (quartiles)':>24}"
    heads += f" {'peak MB':>8} {'step MB':>8}"
    print(f"\n{'':28}{heads}")
    for name, (times, ratios, key) in rows.items():
        middle, low, high = quartiles(times)
        faster = statistics.median(before) / middle
        paired = ""
        if ratios:
            paired = "{:.2f} ({:.2f}–{:.2f})".format(*quartiles(ratios))
        peak, step = peaks[key]["peak"] / 1e6, (peaks[key]["peak"] - peaks[key]["base"]) / 1e6
        print(
            f"{name:28}{middle * 1e3:10.1f} {f'{low * 1e3:.1f}–{high * 1e3:.1f}':>17} {faster:9.2f} {paired:>24} "
            f"{peak:8.0f} {step:8.0f}"
        )
        result["rows"][name] = {"ms": middle * 1e3, "quartiles": [low * 1e3, high * 1e3], "faster": faster}
        result["rows"][name] |= {"paired": quartiles(ratios) if ratios else None, "peak_mb": peak, "step_mb": step}
    print(
        "\nfaster ×: over 'as it is', of medians, across processes. paired ×: within a process, of neighbouring steps."
    )
    return result


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
