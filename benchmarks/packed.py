"""LeNet with batch norm, many networks as one: images × models a second, against training them one after the other.

Four ways of the same training, SGD on batches of 256, in one process and so with one allocator, tuned for all: packed
(K networks, with one order of images for all and with each its own), this package's sequential engine, an in-memory
loop written by hand in torch, and a loop over a `DataLoader` with a transform for every image, as people write it.
Turns of a few batches go round among them; a figure is the median over rounds of (seconds by hand for an image and
model) / (seconds of the way): above 1 is faster than by hand. Data are loaded before the clock starts, except where the
loop itself transforms them. On a GPU the clock starts and stops when it has nothing left to do.

With `--subsets` the study itself instead: LeNet with batch norm at so many subsets of its four places, `--seeds` of
each, by the packed engine and by the sequential one, whole runs with all their evaluations; the packed engine's time
holds the packing, the measuring of ways and the capture of graphs. What is compared is seconds a run, in all and in
training alone, and the accuracies, run by run: training in another order of sums leaves them equal in the mean only.

    python benchmarks/packed.py [PATH TO FASHION-MNIST] [--device cuda] [--rounds 15] [--width 4 8 12 16] [--norm bn]
    python benchmarks/packed.py [PATH TO FASHION-MNIST] [--device cuda] --subsets 16 --seeds 20 [--alone 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from lenet_loop import by_hand, network, quartiles
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from normwright import tune_allocator
from normwright.lab import engine
from normwright.lab.data import Dataset as Data
from normwright.lab.data import load
from normwright.lab.engine import End, Engine, Job, Start, initial, make_optimizer, mixed
from normwright.lab.journal import environment
from normwright.lab.packed import FlatOptimizer, Step, fastest, pack, width
from normwright.lab.packed import packed as packed_engine
from normwright.lab.study import plan
from normwright.studies.lenet import STUDY, SUBSETS

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


def with_loader(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, device: torch.device) -> None:
    model.train()
    loss_function, total, correct = nn.CrossEntropyLoss(), 0.0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        logits = model(images)
        loss = loss_function(logits, labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def finished(engine: Engine, job: Job, starts: Sequence[Start]) -> tuple[float, dict[tuple[str, int], dict]]:
    """Seconds, and the last metrics of every run; `train_seconds` over all its epochs."""
    found: dict[tuple[str, int], dict] = {}
    training = {start.run: 0.0 for start in starts}
    by_run = {start.run: start for start in starts}
    began = now(job.device)
    for events in engine(job, starts, lambda images: None):
        for event in events:
            if isinstance(event, End):
                key = by_run[event.run].arm, by_run[event.run].seed
                found[key] = {**event.metrics, "train_seconds": training[event.run], "status": event.status}
            else:
                training[event.run] += event.metrics["train_seconds"]
    return now(job.device) - began, found


def whole_study(data: Data, options: argparse.Namespace, device: torch.device) -> None:
    """Runs of LeNet's subsets packed and one by one."""
    arms = ["bn", "none", *(f"bn-{places}" for places in SUBSETS)][: options.subsets]
    data = mixed(data.limited(options.images)).to(device)
    settings = {arm: {**values, "epochs": options.epochs} for arm, values in plan(STUDY, data.name, {}).arms.items()}
    job = Job(STUDY, data, settings, device)
    warm = replace(job, data=data.limited(4 * BATCH), settings={a: {**v, "epochs": 1} for a, v in settings.items()})
    seconds = {"packed": 0.0, "sequential": 0.0}
    found: dict[str, dict] = {"packed": {}, "sequential": {}}
    for number, arm in enumerate(arms):
        starts = [Start(1_000 * number + seed, arm, seed, settings[arm]) for seed in range(options.seeds)]
        most = width(job, arm, settings[arm])
        finished(engine.sequential, warm, [replace(starts[0], settings=warm.settings[arm])])  # compiles kernels
        for name, trainer, groups in (
            ("sequential", engine.sequential, [[start] for start in starts[: options.alone]]),
            ("packed", packed_engine, [starts[i : i + most] for i in range(0, len(starts), most)]),
        ):
            for group in groups:
                took, ended = finished(trainer, job, group)
                seconds[name] += took
                found[name] |= ended
        print(f"{arm}: done, packs of {min(most, len(starts))}", flush=True)
    each = {name: seconds[name] / len(found[name]) for name in seconds}
    steps = {name: statistics.fmean(run["train_seconds"] for run in found[name].values()) for name in seconds}
    for name in seconds:
        statuses = [run["status"] for run in found[name].values()]
        print(
            f"{name:>10}: {len(statuses)} runs, {statuses.count('diverged')} diverged, {seconds[name]:.1f} s; a run "
            f"{each[name]:.3g} s, of which {steps[name]:.3g} s training"
        )
    print(
        f"packed is {each['sequential'] / each['packed']:.2f} times as fast, "
        f"{steps['sequential'] / steps['packed']:.2f} times in training alone"
    )
    for metric in ("test_acc", "test_acc_recalibrated", "train_loss"):
        both = [
            (found["packed"][key][metric], other[metric])
            for key, other in found["sequential"].items()
            if metric in other and metric in found["packed"][key]
        ]
        if len(both) > 1:
            means = [statistics.fmean(values) for values in zip(*both, strict=True)]
            differences = [ours - theirs for ours, theirs in both]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            print(
                f"{metric}: packed {means[0]:.4f}, sequential {means[1]:.4f} over {len(both)} pairs; difference "
                f"{statistics.fmean(differences):+.4f} ± {1.96 * error:.4f}, largest {max(map(abs, differences)):.4f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="../shared/data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way, default 15")
    parser.add_argument("--width", type=int, nargs="+", default=[4, 8, 12, 16], help="networks in a pack")
    parser.add_argument("--norm", default="bn", help="norm of the engines: bn (ours, default), nn (torch's) or none")
    parser.add_argument("--profile", action="store_true", help="show where a packed turn's time goes, and stop")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train, default cpu")
    parser.add_argument("--subsets", type=int, help="compare whole runs of so many of LeNet's 16 subsets instead")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each subset, default 20")
    parser.add_argument("--alone", type=int, help="seeds that the sequential engine trains too, default all")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of these runs, default 10")
    parser.add_argument("--images", type=int, help="images to train and to test these runs with, default all")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none here; use --device cpu")
    device = torch.device(options.device)
    allocator = tune_allocator()
    data = load(options.data)
    settings = {**plan(STUDY, "fashion-mnist", {}).arms["bn"], "norm": options.norm}
    job = Job(STUDY, data, {"bn": settings}, device)
    x, y = data.x_train[: 4 * TURN].to(device), data.y_train[: 4 * TURN].to(device)
    shape = (data.channels, *data.size)
    about = environment()
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    what = f"{options.rounds} rounds of {TURN} images"
    if options.subsets:
        images = f"{options.images or len(data.x_train)} images"
        what = f"{options.subsets} subsets × {options.seeds} seeds, {options.epochs} epochs of {images}"
    print(
        f"{gpu}{about['cpu']}, {about['cores']} cores, {about['threads']} threads; torch {about['torch']}, normwright "
        f"{about['normwright']} at {about['commit']}; allocator: {allocator}; {what}"
    )
    if options.subsets:
        whole_study(data, options, device)
        return

    def start(seed: int) -> Start:
        return Start(seed, "bn", seed, settings)

    def order(turn: int, columns: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(turn)
        drawn = [torch.randperm(len(x), generator=generator)[:TURN] for _ in range(columns or 1)]
        return (torch.stack(drawn, 1) if columns else drawn[0]).to(device)

    ways: dict[str, tuple[int, Callable[[int], object]]] = {}
    hand = network(options.norm != "none").to(device)
    optimizer = torch.optim.SGD(hand.parameters(), lr=settings["lr"])
    ways["by hand, in memory"] = (
        1,
        lambda turn: by_hand(hand, optimizer, nn.CrossEntropyLoss(), x, y, order(turn), BATCH),
    )
    ours = initial(job, start(0)).to(device)
    our_optimizer = make_optimizer(ours, settings)
    ways["sequential engine"] = 1, lambda turn: engine.train_epoch(ours, our_optimizer, x, y, order(turn), BATCH)
    loaded = network(options.norm != "none").to(device)
    loaded_optimizer = torch.optim.SGD(loaded.parameters(), lr=settings["lr"])
    loader = DataLoader(Images(x[:TURN].cpu(), y[:TURN].cpu()), BATCH, shuffle=True)
    ways["DataLoader and ToTensor"] = 1, lambda turn: with_loader(loaded, loaded_optimizer, loader, device)
    for K in options.width:
        for shared in (True, False):
            models = [initial(job, start(seed)).to(device) for seed in range(K)]
            packed = pack(models, shape)
            flat = FlatOptimizer(packed, [make_optimizer(model, settings) for model in models])
            began = time.perf_counter()
            fastest(packed, (BATCH, *shape), shared)
            name = f"packed, K = {K}, {'one order' if shared else 'own orders'}"
            print(
                f"{name}: measured in {time.perf_counter() - began:.1f} s\n  " + packed.explain().replace("\n", "\n  ")
            )
            step = Step(packed, flat, x, y)
            ways[name] = (
                K,
                lambda turn, step=step, K=None if shared else K: step.epoch(order(turn, K), BATCH),
            )
    if options.profile:
        for name, (_, run) in ways.items():
            run(0)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as found:
                run(1)
                now(device)
            by = f"self_{device.type}_time_total"
            print(name, found.key_averages().table(sort_by=by, row_limit=16), sep="\n")
        return
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name in list(ways) if turn % 2 else reversed(list(ways)):
            models, run = ways[name]
            began = now(device)
            run(turn)
            if turn > 0:  # the first warms up
                seconds[name].append((now(device) - began) / models)
    for name in ways:
        ratios = [a / b for a, b in zip(seconds["by hand, in memory"], seconds[name], strict=True)]
        rate = TURN / statistics.median(seconds[name])
        print(f"{name:>32}: {rate:>7,.0f} images × models a second; {quartiles(ratios)}")


if __name__ == "__main__":
    main()
