"""An epoch of LeNet with batch norm: this laboratory's engine against an in-memory loop written by hand in torch.

Both train the same network from the same weights on the same batches, in one process and so with one allocator, in
turns of 5,120 images (20 steps); the figure is the median over turns of (time by hand) / (time of the engine): 1 is
equal, above 1 the engine is faster. The first epoch warms up, and its losses are compared, so that two different things
are not timed. Short turns and the median keep the figure steady on a machine that does other things too.

    python benchmarks/lenet_loop.py [PATH TO FASHION-MNIST] [--epochs 2] [--images 60000] [--norm bn|nn]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from normwright.lab.data import load
from normwright.lab.engine import Job, Start, initial, make_optimizer, train_epoch
from normwright.lab.journal import environment
from normwright.lab.study import plan
from normwright.studies.lenet import STUDY

TURN = 5_120  # images


def network(norm: bool) -> nn.Sequential:
    """LeNet as one writes it, batch norm and activation apart."""

    def after(layer: type[nn.Module], features: int) -> list[nn.Module]:
        return [layer(features), nn.Sigmoid()] if norm else [nn.Sigmoid()]

    return nn.Sequential(
        nn.Conv2d(1, 6, 5), *after(nn.BatchNorm2d, 6), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), *after(nn.BatchNorm2d, 16), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(256, 120), *after(nn.BatchNorm1d, 120),
        nn.Linear(120, 84), *after(nn.BatchNorm1d, 84), nn.Linear(84, 10),
    )  # fmt: skip


def by_hand(model, optimizer, loss_function, x, y, order, batch_size):
    model.train()
    total = torch.zeros((), device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    for chosen in order.split(batch_size):
        images, labels = x[chosen], y[chosen]
        optimizer.zero_grad()
        logits = model(images)
        loss = loss_function(logits, labels)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
    return total.item() / len(order), correct.item() / len(order)


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} (quartiles {low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="../shared/data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs of each side, default 2")
    parser.add_argument("--images", type=int, default=60_000, help="training images in an epoch, default all 60,000")
    parser.add_argument("--norm", default="bn", help="batch norm of the engine: bn (ours, default) or nn (torch)")
    options = parser.parse_args()
    data = load(options.data)
    settings = {arm: dict(each) for arm, each in plan(STUDY, "fashion-mnist", {}).arms.items()}
    settings["bn"]["norm"] = options.norm
    job = Job(STUDY, data, settings, torch.device("cpu"))
    x, y = data.x_train[: options.images], data.y_train[: options.images]
    about = environment()
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; torch {about['torch']}, normwright "
        f"{about['normwright']} at {about['commit']}; {len(x)} images, {options.epochs} epochs, turns of {TURN} images"
    )
    for arm in ("bn", "none"):
        lr, size = settings[arm]["lr"], settings[arm]["batch_size"]
        ours, theirs = initial(job, Start(0, arm, 0, settings[arm])), network(arm == "bn")
        with torch.no_grad():
            for parameter, start in zip(theirs.parameters(), ours.parameters(), strict=True):
                parameter.copy_(start)
        our_optimizer = make_optimizer(ours, settings[arm])
        their_optimizer = torch.optim.SGD(theirs.parameters(), lr=lr)
        loss_function = nn.CrossEntropyLoss()
        generator = torch.Generator().manual_seed(0)
        times: dict[str, list[float]] = {"engine": [], "hand": []}
        for epoch in range(options.epochs + 1):
            losses = {"engine": 0.0, "hand": 0.0}
            for turn, order in enumerate(torch.randperm(len(x), generator=generator).split(TURN)):
                # Who goes first alternates: the second finds warmer caches and another clock.
                for side in ("engine", "hand") if turn % 2 else ("hand", "engine"):
                    began = time.perf_counter()
                    if side == "engine":
                        loss, _ = train_epoch(ours, our_optimizer, x, y, order, size)
                    else:
                        loss, _ = by_hand(theirs, their_optimizer, loss_function, x, y, order, size)
                    if epoch > 0 and len(order) == TURN:
                        times[side].append(time.perf_counter() - began)
                    losses[side] += loss * len(order) / len(x)
            if epoch == 0 and abs(losses["engine"] - losses["hand"]) > 1e-2:
                raise SystemExit(f"The two sides train differently, so their times say nothing: losses {losses}.")
        ratios = [hand / engine for hand, engine in zip(times["hand"], times["engine"], strict=True)]
        seconds = {side: statistics.median(values) * len(x) / TURN for side, values in times.items()}
        print(
            f"{arm:>4}: engine {seconds['engine']:.2f} s an epoch, by hand {seconds['hand']:.2f} s; "
            f"by hand / engine {quartiles(ratios)}, {len(ratios)} turns"
        )


if __name__ == "__main__":
    main()
