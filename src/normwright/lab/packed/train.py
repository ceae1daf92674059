"""The packed engine: the step, the epoch, the evaluations, and what becomes of every run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...surgery import recalibrate
from ..engine import (
    EVALUATION_BATCH,
    RECALIBRATION_IMAGES,
    TICK,
    End,
    Epoch,
    Event,
    Job,
    Parts,
    Start,
    batches,
    by_batch,
    diverged,
    initial,
    make_optimizer,
    observations,
    order_generator,
    parts,
    running,
)
from .fastest import fastest
from .graph import Replayed
from .leaves import CannotPack
from .network import Packed, pack
from .optimizer import FlatOptimizer

__all__ = ["Step", "evaluate", "packed", "train_epoch"]


class Step:
    """One step of training on a batch; adds to the networks' losses and numbers of right answers.

    Nothing in it waits for the device. On CUDA the step of a full batch becomes a graph (see `Replayed`).

    `x`, `y`: all images (n, c, …) and labels (n), of which a step is told the numbers.
    """

    def __init__(self, pack: Packed, optimizer: FlatOptimizer, x: Tensor, y: Tensor, clip: float | None = None) -> None:
        self.pack, self.optimizer, self.x, self.y, self.clip = pack, optimizer, x, y, clip
        device = pack.flat.device
        self.losses = torch.zeros(pack.K, dtype=pack.flat.dtype, device=device)
        self.correct = torch.zeros(pack.K, dtype=torch.int64, device=device)
        # replays write to the buffers that there were when they were captured
        self.homes = [
            (module, name, buffer)
            for module in pack.network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.chosen: Tensor | None = None
        self.again: Replayed | None = None

    def __call__(self, chosen: Tensor) -> None:
        """`chosen`: numbers of the images, (b) the same for all networks, or (b, k)."""
        if self.chosen is None or self.again is None:
            static = self.chosen = chosen.clone()
            self.again = Replayed(
                lambda: self._run(static),
                chosen.device,
                lambda why: self.pack.notes.append(f"a step is no CUDA graph: {why}"),
            )
        if chosen.shape == self.chosen.shape:
            self.chosen.copy_(chosen)
            self.again()
        else:  # the last batch, which is ragged
            self._run(chosen)

    def _run(self, chosen: Tensor) -> None:
        pack, B = self.pack, len(chosen)
        images = self.x.index_select(0, chosen.reshape(-1))
        labels = self.y.index_select(0, chosen.reshape(-1)).view(B, -1).expand(-1, pack.K)
        if chosen.dim() == 2:
            images = images.view(B, -1, *self.x.shape[2:])
        logits = pack(images).view(B * pack.K, -1)
        losses = F.cross_entropy(logits, labels.reshape(-1), reduction="none").view(B, pack.K)
        pack.gradient.zero_()
        # the gradient of the sum of the networks' mean losses is each network's own
        (losses.sum() / B).backward()
        if self.clip is not None:
            self.optimizer.clip(self.clip)
        self.optimizer.step()
        with torch.no_grad():
            self.losses += losses.sum(0)
            self.correct += (logits.argmax(1).view(B, pack.K) == labels).sum(0)
            for module, name, home in self.homes:
                if (now := module._buffers[name]) is not home and now is not None:
                    home.copy_(now)
                    module._buffers[name] = home

    def epoch(
        self, orders: Tensor, batch_size: int, tick: Callable[[int], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One epoch; the mean losses and the accuracies (k) while training, as the weights moved.

        `orders`: (n) one order of the images for all networks, or (n, k), a column for each.
        """
        self.pack.train()
        self.losses.zero_()
        self.correct.zero_()
        reported, K, n = 0, self.pack.K, len(orders)
        for count, (start, stop) in enumerate(batches(n, batch_size), start=1):
            self(orders[start:stop])
            if tick is not None and count % TICK == 0:
                tick((stop - reported) * K)
                reported = stop
        if tick is not None:
            tick((n - reported) * K)
        return self.losses / n, self.correct.to(self.pack.flat.dtype) / n


def train_epoch(
    pack: Packed,
    optimizer: FlatOptimizer,
    x: Tensor,
    y: Tensor,
    orders: Tensor,
    batch_size: int,
    tick: Callable[[int], None] | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One epoch by itself; see `Step.epoch`, whose graph serves any number of epochs."""
    return Step(pack, optimizer, x, y, clip).epoch(orders, batch_size, tick)


def evaluate(pack: Packed, x: Tensor, y: Tensor, batch_size: int = EVALUATION_BATCH) -> tuple[list[float], list[float]]:
    """Each network's mean loss and accuracy in the mode the pack is in."""
    K = pack.K
    losses = torch.zeros(K, dtype=pack.flat.dtype, device=x.device)
    correct = torch.zeros(K, device=x.device, dtype=torch.int64)
    with torch.inference_mode():
        for start, stop in batches(len(x), batch_size):
            logits = pack(x[start:stop]).view((stop - start) * K, -1)
            labels = y[start:stop, None].expand(-1, K)
            found = F.cross_entropy(logits, labels.reshape(-1), reduction="none")
            losses += found.view(-1, K).sum(0)
            correct += (logits.argmax(1).view(-1, K) == labels).sum(0)
    return [loss / len(x) for loss in losses.tolist()], [right / len(x) for right in correct.tolist()]


def _three_ways(
    pack: Packed, part: Parts, settings: Mapping[str, Any], last: bool, drop: Callable[[int], None]
) -> list[dict[str, float]]:
    """What `engine.three_ways` finds, for each network; `drop(k)` is called for one whose test loss is not finite."""
    pack.eval()
    losses, accuracies = evaluate(pack, part.x_test, part.y_test)
    metrics = [{"test_loss": loss, "test_acc": right} for loss, right in zip(losses, accuracies, strict=True)]
    for k, loss in enumerate(losses):
        if not math.isfinite(loss):
            drop(k)

    def add(key: str, x: Tensor | None, y: Tensor | None, batch_size: int = EVALUATION_BATCH) -> None:
        if x is not None and y is not None:
            for found, right in zip(metrics, evaluate(pack, x, y, batch_size)[1], strict=True):
                found[key] = right

    modules = running(pack)
    if not modules:
        add("val_acc", part.x_validation, part.y_validation)
        return metrics
    wanted = settings.get("recalibrate") if last else RECALIBRATION_IMAGES
    images = part.x if wanted is None else part.x[:wanted]
    pieces = [images[start:stop] for start, stop in batches(len(images), EVALUATION_BATCH)]
    receipt = recalibrate(pack.network, pieces, method="layerwise" if last else "one_pass")
    if receipt.edits:  # none: running statistics that are no mean and variance, as whitening's, stay as they are
        add("test_acc_recalibrated", part.x_test, part.y_test)
    add("val_acc", part.x_validation, part.y_validation)
    if receipt.edits:
        receipt.undo()
    with by_batch(modules):
        add("test_acc_batch", part.x_test, part.y_test, settings["batch_size"])
    return metrics


def packed(job: Job, starts: Sequence[Start], tick: Callable[[int], None]) -> Iterator[Sequence[Event]]:
    """Train runs as one network; they differ in seed, learning rate, weight decay and starting values alone.

    A run that diverges ends there; its network stays in the pack, as it was drawn and unmoved, so that the others'
    numbers do not depend on it, bit for bit. Once half of the networks have ended the rest are packed anew. The images
    come in each run's own order, or in one for all with `order="shared"`, which is faster.

    Errors: `CannotPack` where they cannot.
    """
    left = list(starts)
    while left:
        left = yield from _together(job, left, tick)


def _together(
    job: Job, starts: Sequence[Start], tick: Callable[[int], None]
) -> Generator[Sequence[Event], None, list[Start]]:
    """Train until all have ended or half have diverged; returns the runs that are left."""
    data, settings, K, done = job.data, starts[0].settings, len(starts), starts[0].epochs
    if any(start.epochs != done for start in starts):
        raise CannotPack(f"the runs have done different numbers of epochs: {[start.epochs for start in starts]}")
    classes, epochs, shape = len(data.classes), settings["epochs"], (data.channels, *data.size)
    part = parts(data, settings)
    models = [initial(job, start).to(job.device) for start in starts]
    spare = pack(models, shape)
    fresh = [spare.unpack(k) for k in range(K)]
    optimizers = [make_optimizer(model, start.settings) for model, start in zip(models, starts, strict=True)]
    generators = [order_generator(start) for start in starts]
    torch.manual_seed(starts[0].seed)
    for start, model, optimizer, generator in zip(starts, models, optimizers, generators, strict=True):
        if start.state is not None:
            model.load_state_dict(start.state["model"])
            optimizer.load_state_dict(start.state["optimizer"])
            generator.set_state(start.state["order"])
    if starts[0].state is not None:
        torch.set_rng_state(starts[0].state["rng"])
        if job.device.type == "cuda" and "device_rng" in starts[0].state:
            torch.cuda.set_rng_state(starts[0].state["device_rng"], job.device)
    network = pack(models, shape) if done else spare
    optimizer = FlatOptimizer(network, optimizers)
    shared = settings.get("order", "seed") == "shared"
    fastest(network, (settings["batch_size"], *shape), shared)
    step = Step(network, optimizer, part.x, part.y, settings.get("clip"))
    observer = copy.deepcopy(models[0])
    metrics: list[Mapping[str, Any]] = [start.metrics for start in starts]
    alive = [k for k in range(K) if not (metrics[k] and diverged(metrics[k], classes))]

    def ends(ended: Iterable[int], states: Mapping[int, dict[str, Any]]) -> list[Event]:
        found: list[Event] = []
        for k in ended:
            why = diverged(metrics[k], classes)
            trained = {"model": states[k], "shape": list(shape), "classes": classes}
            found.append(End(starts[k].run, "finished" if why is None else "diverged", why, metrics[k], trained))
        return found

    def drop(k: int) -> None:
        network.load(k, fresh[k])
        optimizer.freeze(k)

    def observed(k: int, epoch: int) -> Mapping[str, Any]:
        if job.study.observe is None:
            return {}
        observer.load_state_dict(network.unpack(k))
        return observations(job, starts[k], observer, epoch)

    if gone := [k for k in range(K) if k not in alive]:
        yield ends(gone, {k: network.unpack(k) for k in gone})
        for k in gone:
            drop(k)
    before = {k: observed(k, -1) for k in alive} if done == 0 else {}
    for epoch in range(done, epochs):
        if not alive:
            break
        began = time.perf_counter()
        drawn = [torch.randperm(len(part.x), generator=generator) for generator in generators[: 1 if shared else K]]
        if shared:
            for generator in generators[1:]:
                generator.set_state(generators[0].get_state())
        orders = (drawn[0] if shared else torch.stack(drawn, 1)).to(job.device)
        losses, accuracies = step.epoch(orders, settings["batch_size"], tick)
        found = [
            {"train_loss": loss, "train_acc": accuracy, **before.get(k, {})}
            for k, (loss, accuracy) in enumerate(zip(losses.tolist(), accuracies.tolist(), strict=True))
        ]
        before = {}
        trained = time.perf_counter()
        states = {k: network.unpack(k) for k in alive}
        checkpoints = {
            k: {
                "model": states[k],
                "shape": list(shape),
                "classes": classes,
                "optimizer": optimizer.state_dict(k),
                "order": generators[k].get_state(),
                "rng": torch.get_rng_state(),
                **({"device_rng": torch.cuda.get_rng_state(job.device)} if job.device.type == "cuda" else {}),
            }
            for k in alive
        }
        bad = {k for k in alive if diverged(found[k], classes)}
        for k in bad:
            drop(k)
        if len(bad) < len(alive):
            tested = _three_ways(network, part, settings, epoch == epochs - 1, drop)
            for k in alive:
                if k not in bad:
                    found[k] |= tested[k]
                    if diverged(found[k], classes) is None:
                        found[k] |= observed(k, epoch)
        now = time.perf_counter()
        for k in alive:
            found[k] |= {
                "train_seconds": (trained - began) / len(alive),
                "evaluation_seconds": (now - trained) / len(alive),
            }
            metrics[k] = found[k]
        over = [k for k in alive if diverged(metrics[k], classes) or epoch == epochs - 1]
        events: list[Event] = [Epoch(starts[k].run, epoch, metrics[k], checkpoints[k]) for k in alive]
        yield [*events, *ends(over, states)]
        alive = [k for k in alive if k not in over]
        if alive and 2 * len(alive) <= K:
            return [replace(starts[k], epochs=epoch + 1, metrics=metrics[k], state=checkpoints[k]) for k in alive]
    return []
