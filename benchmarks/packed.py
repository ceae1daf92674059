"""LeNet with batch norm, many networks as one: images × models a second, against training them one after the other.

Four ways of the same training, SGD on batches of 256, in one process and so with one allocator, tuned for all: packed
(K networks, with one order of images for all and with each its own), this package's sequential engine, an in-memory
loop written by hand in torch, and a loop over a `DataLoader` with a transform for every image, as people write it.
Turns of a few batches go round among them; a figure is the median over rounds of (seconds by hand for an image and
model) / (seconds of the way): above 1 is faster than by hand. Data are loaded before the clock starts, except where the
loop itself transforms them.

    python benchmarks/packed.py [PATH TO FASHION-MNIST] [--rounds 15] [--width 4 8 12 16] [--norm bn] [--profile]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from lenet_loop import by_hand, network, quartiles
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from normwright import tune_allocator
from normwright.lab import engine
from normwright.lab.data import load
from normwright.lab.engine import Job, Start, initial, make_optimizer
from normwright.lab.journal import environment
from normwright.lab.packed import FlatOptimizer, fastest, pack, train_epoch
from normwright.lab.study import plan
from normwright.studies.lenet import STUDY

TURN = 1_280  # images
BATCH = 256


class Images(Dataset):
    """Images as bytes, each made a PIL image and then a tensor when it is asked for.

    As torchvision's FashionMNIST with ToTensor does, written out: torchvision does not load beside every torch.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x = ((x - x.min()) / (x.max() - x.min()) * 255).to(torch.uint8).squeeze(1)
        self.y = y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.x[i].numpy())
        pixels = torch.from_numpy(np.array(image, copy=True)).view(*image.size[::-1], 1)
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255), int(self.y[i])


def with_loader(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    model.train()
    loss_function, total, correct = nn.CrossEntropyLoss(), 0.0, 0
    for images, labels in loader:
        optimizer.zero_grad()
        logits = model(images)
        loss = loss_function(logits, labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="../shared/data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way, default 15")
    parser.add_argument("--width", type=int, nargs="+", default=[4, 8, 12, 16], help="networks in a pack")
    parser.add_argument("--norm", default="bn", help="norm of the engines: bn (ours, default), nn (torch's) or none")
    parser.add_argument("--profile", action="store_true", help="show where a packed turn's time goes, and stop")
    options = parser.parse_args()
    allocator = tune_allocator()
    data = load(options.data)
    settings = {**plan(STUDY, "fashion-mnist", {}).arms["bn"], "norm": options.norm}
    job = Job(STUDY, data, {"bn": settings}, torch.device("cpu"))
    x, y = data.x_train[: 4 * TURN], data.y_train[: 4 * TURN]
    shape = (data.channels, *data.size)
    about = environment()
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; torch {about['torch']}, normwright "
        f"{about['normwright']} at {about['commit']}; allocator: {allocator}; {options.rounds} rounds of {TURN} images"
    )

    def start(seed: int) -> Start:
        return Start(seed, "bn", seed, settings)

    def order(turn: int, columns: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(turn)
        if columns is None:
            return torch.randperm(len(x), generator=generator)[:TURN]
        return torch.stack([torch.randperm(len(x), generator=generator)[:TURN] for _ in range(columns)], 1)

    ways: dict[str, tuple[int, Callable[[int], object]]] = {}
    hand = network(options.norm != "none")
    optimizer = torch.optim.SGD(hand.parameters(), lr=settings["lr"])
    ways["by hand, in memory"] = (
        1,
        lambda turn: by_hand(hand, optimizer, nn.CrossEntropyLoss(), x, y, order(turn), BATCH),
    )
    ours = initial(job, start(0))
    our_optimizer = make_optimizer(ours, settings)
    ways["sequential engine"] = 1, lambda turn: engine.train_epoch(ours, our_optimizer, x, y, order(turn), BATCH)
    loaded = network(options.norm != "none")
    loaded_optimizer = torch.optim.SGD(loaded.parameters(), lr=settings["lr"])
    loader = DataLoader(Images(x[:TURN], y[:TURN]), BATCH, shuffle=True)
    ways["DataLoader and ToTensor"] = 1, lambda turn: with_loader(loaded, loaded_optimizer, loader)
    for K in options.width:
        for shared in (True, False):
            models = [initial(job, start(seed)) for seed in range(K)]
            packed = pack(models, shape)
            flat = FlatOptimizer(packed, [make_optimizer(model, settings) for model in models])
            began = time.perf_counter()
            fastest(packed, (BATCH, *shape), shared)
            name = f"packed, K = {K}, {'one order' if shared else 'own orders'}"
            print(
                f"{name}: measured in {time.perf_counter() - began:.1f} s\n  " + packed.explain().replace("\n", "\n  ")
            )
            ways[name] = (
                K,
                lambda turn, packed=packed, flat=flat, K=None if shared else K: train_epoch(
                    packed, flat, x, y, order(turn, K), BATCH
                ),
            )
    if options.profile:
        for name, (_, run) in ways.items():
            run(0)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
                run(1)
            print(name, found.key_averages().table(sort_by="self_cpu_time_total", row_limit=16), sep="\n")
        return
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name in list(ways) if turn % 2 else reversed(list(ways)):
            models, run = ways[name]
            began = time.perf_counter()
            run(turn)
            if turn > 0:  # the first warms up
                seconds[name].append((time.perf_counter() - began) / models)
    for name in ways:
        ratios = [a / b for a, b in zip(seconds["by hand, in memory"], seconds[name], strict=True)]
        rate = TURN / statistics.median(seconds[name])
        print(f"{name:>32}: {rate:>7,.0f} images × models a second; {quartiles(ratios)}")


if __name__ == "__main__":
    main()
