"""An epoch of LeNet with batch norm: this laboratory's engine against an in-memory loop written by hand in torch.

Both train the same network from the same weights on the same batches, in one process and so with one allocator, turn by
turn; the figure is the median over turns of (time by hand) / (time of the engine): 1 is equal, above 1 the engine is
faster. After the first epoch the losses of both are compared, so that two different things are not timed.

    python benchmarks/lenet_loop.py [PATH TO FASHION-MNIST] [--turns 5] [--images 60000]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from normwright.lab.data import load
from normwright.lab.engine import Job, initial, make_optimizer, train_epoch
from normwright.lab.journal import environment
from normwright.lab.study import plan
from normwright.studies.lenet import STUDY


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
    total = torch.zeros(())
    correct = torch.zeros((), dtype=torch.int64)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="../shared/data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--turns", type=int, default=5, help="timed epochs of each side, default 5")
    parser.add_argument("--images", type=int, default=60_000, help="training images in an epoch, default all 60,000")
    options = parser.parse_args()
    data = load(options.data)
    _, settings = plan(STUDY, "fashion-mnist", {})
    job = Job(STUDY, data, settings, torch.device("cpu"))
    x, y = data.x_train[: options.images], data.y_train[: options.images]
    about = environment()
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; torch {about['torch']}, "
        f"normwright {about['normwright']} at {about['commit']}; {len(x)} images, {options.turns} turns"
    )
    for arm in ("bn", "none"):
        lr, size = settings[arm]["lr"], settings[arm]["batch_size"]
        ours = initial(job, arm, 0)
        theirs = network(arm == "bn")
        theirs_parameters = list(theirs.parameters())
        with torch.no_grad():
            for parameter, start in zip(theirs_parameters, ours.parameters(), strict=True):
                parameter.copy_(start)
        our_optimizer = make_optimizer(ours, "sgd", lr)
        their_optimizer = torch.optim.SGD(theirs_parameters, lr=lr)
        loss_function = nn.CrossEntropyLoss()
        generator = torch.Generator().manual_seed(0)
        ratios, our_times, their_times = [], [], []
        for turn in range(options.turns + 1):
            order = torch.randperm(len(x), generator=generator)
            results, times = {}, {}
            # Who goes first alternates: the second finds warmer caches and another clock.
            for side in ("engine", "hand") if turn % 2 else ("hand", "engine"):
                began = time.perf_counter()
                if side == "engine":
                    results[side] = train_epoch(ours, our_optimizer, x, y, order, size)
                else:
                    results[side] = by_hand(theirs, their_optimizer, loss_function, x, y, order, size)
                times[side] = time.perf_counter() - began
            if turn == 0:  # warm-up
                difference = abs(results["engine"][0] - results["hand"][0])
                assert difference < 1e-2, f"the two sides train differently: losses {results}"
                continue
            ratios.append(times["hand"] / times["engine"])
            our_times.append(times["engine"])
            their_times.append(times["hand"])
        print(
            f"{arm:>4}: engine {statistics.median(our_times):.2f} s an epoch, by hand {statistics.median(their_times):.2f}"
            f" s, ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
