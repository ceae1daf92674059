"""Training by the plain loop: one network after another, the data in memory. The oracle for every faster engine.

Arms are paired by seed: a seed fixes the order of the images and the starting values of all parameters that an arm
shares, by name and shape, with the study's first arm. Nothing in a step waits for the device; losses are looked at
once an epoch.

An engine is a generator: it is given runs to train and yields lists of what became of them, each list to be recorded
as one transaction. It knows no journal, so that it can run in another process or on another machine.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..surgery import recalibrate
from .data import Dataset
from .errors import UserError
from .journal import End, Epoch, Metrics
from .study import Experiment, Moment, Study

__all__ = [
    "End",
    "Engine",
    "Epoch",
    "Event",
    "Job",
    "Parts",
    "Start",
    "batches",
    "by_batch",
    "diverged",
    "evaluate",
    "initial",
    "make_optimizer",
    "mixed",
    "observations",
    "order_generator",
    "parts",
    "running",
    "sequential",
    "three_ways",
    "train_epoch",
    "trained_network",
]

# A run has diverged when a loss is not finite, or its mean over an epoch exceeds so many times that of guessing:
# saturated units keep a network's loss finite at any learning rate, and it never comes back from there.
DIVERGED = 100.0
EVALUATION_BATCH = 256  # images; 1,000 at a time were half as fast on two cores: 256 stay in cache
# On the way running statistics are recalibrated in one pass over so many images, which with batch statistics takes an
# eighth of LeNet's epoch; after the last epoch layer by layer, exactly, over the whole training set.
RECALIBRATION_IMAGES = 5_120
TICK = 16  # steps between two reports of progress


@dataclass(frozen=True)
class Job:
    """What an engine trains: a study, its data (mixed, see `mixed`), and the settings of every arm by name."""

    study: Study
    data: Dataset
    settings: Mapping[str, Mapping[str, Any]]
    device: torch.device


@dataclass(frozen=True)
class Start:
    """A run to train: `epochs` are recorded already, the last with `metrics`, and `state` is what it left."""

    run: int
    arm: str
    seed: int
    settings: Mapping[str, Any]
    epochs: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None


Event: TypeAlias = "Epoch | End"
Engine: TypeAlias = "Callable[[Job, Sequence[Start], Callable[[int], None]], Iterator[Sequence[Event]]]"


@dataclass(frozen=True)
class Parts:
    """The images of a run: to train, held out from training (None if none are), and to test."""

    x: Tensor
    y: Tensor
    x_validation: Tensor | None
    y_validation: Tensor | None
    x_test: Tensor
    y_test: Tensor


def mixed(data: Dataset) -> Dataset:
    """The data with both halves in one fixed random order.

    Folders of classes come sorted, and batch statistics of a batch of one class are not those of the data.
    """
    generator = torch.Generator().manual_seed(0)
    train = torch.randperm(len(data.x_train), generator=generator)
    test = torch.randperm(len(data.x_test), generator=generator)
    return replace(
        data,
        x_train=data.x_train[train],
        y_train=data.y_train[train],
        x_test=data.x_test[test],
        y_test=data.y_test[test],
    )


def batches(n: int, size: int) -> list[tuple[int, int]]:
    """Bounds of the batches of n images; the last one is ragged, and joins the one before if it is a single image.

    One value has no variance, so a batch norm refuses a batch of one.
    """
    starts = list(range(0, n, size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], n], strict=True))


def parts(data: Dataset, settings: Mapping[str, Any]) -> Parts:
    """The images that a run with these settings trains on, holds out and is tested with."""
    held, wanted = settings.get("validation", 0), settings.get("train_images")
    left = len(data.x_train) - held
    if left < 2:
        raise UserError(
            f"validation={held} leaves {max(left, 0)} of {len(data.x_train)} images to train on; hold out fewer."
        )
    n = left if wanted is None else min(left, wanted)
    return Parts(
        data.x_train[:n],
        data.y_train[:n],
        data.x_train[left:] if held else None,
        data.y_train[left:] if held else None,
        data.x_test,
        data.y_test,
    )


def initial(job: Job, start: Start) -> nn.Module:
    """The network of a run at the start: parameters that it shares with the study's first arm are equal to that arm's.

    Settings that only the run has (those that are tuned), and those that change starting values alone, hold for the
    first arm's network too: else all arms of a sweep over weight scales would start at the first arm's scale.
    """
    if job.study.build is None:
        raise UserError(f"The study {job.study.name} has neither build= nor procedure=; give it one of them.")
    shape = (job.data.channels, *job.data.size)

    def built(settings: Mapping[str, Any]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(start.seed)
            return job.study.build(settings, shape, len(job.data.classes))  # pyright: ignore[reportOptionalCall]

    model, first = built(start.settings), job.study.arms[0].name
    if start.arm != first:
        own = {key: start.settings[key] for key in (*job.study.tune, *job.study.packs) if key in start.settings}
        shared = dict(built({**job.settings[first], **own}).named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in shared and shared[name].shape == parameter.shape:
                    parameter.copy_(shared[name])
    return model


def order_generator(start: Start) -> torch.Generator:
    """Draws the order of the images, epoch by epoch."""
    return torch.Generator().manual_seed(0 if start.settings.get("order", "seed") == "shared" else start.seed)


def make_optimizer(model: nn.Module, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of the settings over the parameters that are trained, fused where torch offers it."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
        "adadelta": torch.optim.Adadelta,
        "adam": torch.optim.Adam,
    }
    name = settings["optimizer"]
    more: dict[str, Any] = {"fused": True} if name in ("sgd", "adagrad", "adam") else {}
    if name == "sgd":
        more["momentum"] = settings.get("momentum", 0.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kinds[name](trained, lr=settings["lr"], weight_decay=settings.get("weight_decay", 0.0), **more)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    order: Tensor,
    batch_size: int,
    tick: Callable[[int], None] | None = None,
    clip: float | None = None,
) -> tuple[float, float]:
    """One epoch in the given order; the mean loss and the accuracy while training, as the weights moved.

    `clip`: the largest norm of the gradient of all parameters together.
    """
    model.train()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss_sum, correct = torch.zeros((), device=x.device), torch.zeros((), device=x.device, dtype=torch.int64)
    reported = 0
    for step, (start, stop) in enumerate(batches(len(order), batch_size), start=1):
        chosen = order[start:stop]
        labels = y.index_select(0, chosen)
        logits = model(x.index_select(0, chosen))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        with torch.no_grad():
            loss_sum.add_(loss, alpha=stop - start)
            correct.add_((logits.argmax(1) == labels).sum())
        if tick is not None and step % TICK == 0:
            tick(stop - reported)
            reported = stop
    if tick is not None:
        tick(len(order) - reported)
    return float(loss_sum) / len(order), int(correct) / len(order)


def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = EVALUATION_BATCH) -> tuple[float, float]:
    """Mean loss and accuracy in the mode the model is in."""
    loss_sum, correct = torch.zeros((), device=x.device), torch.zeros((), device=x.device, dtype=torch.int64)
    with torch.inference_mode():
        for start, stop in batches(len(x), batch_size):
            logits = model(x[start:stop])
            loss_sum.add_(F.cross_entropy(logits, y[start:stop], reduction="sum"))
            correct.add_((logits.argmax(1) == y[start:stop]).sum())
    return float(loss_sum) / len(x), int(correct) / len(x)


@contextmanager
def by_batch(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let these modules normalize by the batch's statistics; their buffers come back, also where a layer put others."""
    kept = [(module, name, b, b.clone()) for module in modules for name, b in module._buffers.items() if b is not None]
    for module in modules:
        module.train()
    yield
    for module, name, buffer, value in kept:
        module._buffers[name] = buffer.copy_(value)


def running(model: nn.Module) -> list[nn.Module]:
    """The modules that keep running statistics."""
    return [
        module
        for module in model.modules()
        if any(key.startswith("running_") and value is not None for key, value in module._buffers.items())
    ]


def three_ways(model: nn.Module, part: Parts, settings: Mapping[str, Any], last: bool) -> dict[str, float]:
    """Test loss and accuracy as trained and, where there are running statistics, recalibrated and by batch.

    With images held out also `val_acc`, by recalibrated statistics where there are any: what is tuned is judged by the
    weights. The model is left as it was found: the running statistics that training goes on with are the averaged ones.
    """
    model.eval()
    loss, accuracy = evaluate(model, part.x_test, part.y_test)
    metrics = {"test_loss": loss, "test_acc": accuracy}
    modules = running(model)
    if not math.isfinite(loss):
        return metrics  # it has diverged: there is nothing to recalibrate
    if not modules:
        return metrics | _validated(model, part)
    wanted = settings.get("recalibrate") if last else RECALIBRATION_IMAGES
    images = part.x if wanted is None else part.x[:wanted]
    pieces = [images[start:stop] for start, stop in batches(len(images), EVALUATION_BATCH)]
    receipt = recalibrate(model, pieces, method="layerwise" if last else "one_pass")
    if receipt.edits:  # none: running statistics that are no mean and variance, as whitening's, stay as they are
        metrics["test_acc_recalibrated"] = evaluate(model, part.x_test, part.y_test)[1]
    metrics |= _validated(model, part)
    if receipt.edits:
        receipt.undo()
    with by_batch(modules):
        metrics["test_acc_batch"] = evaluate(model, part.x_test, part.y_test, settings["batch_size"])[1]
    return metrics


def _validated(model: nn.Module, part: Parts) -> dict[str, float]:
    if part.x_validation is None or part.y_validation is None:
        return {}
    return {"val_acc": evaluate(model, part.x_validation, part.y_validation)[1]}


def observations(job: Job, start: Start, model: nn.Module, epoch: int) -> Metrics:
    """What the study observes of a network at the end of an epoch, or before training (epoch −1), by prefixed names.

    The random state is left as it was found, so that observing changes no training.
    """
    if job.study.observe is None:
        return {}
    devices = [job.device] if job.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(start.seed)
        moment = Moment(
            copy.deepcopy(model).eval(), job.data, start.settings, start.seed, epoch, start.settings["epochs"]
        )
        found = job.study.observe(moment)
    return {f"start_{name}": value for name, value in found.items()} if epoch < 0 else found


def trained_network(model: nn.Module, data: Dataset) -> dict[str, Any]:
    """What the journal keeps of a network: its state, and what its study needs to build it again."""
    return {"model": model.state_dict(), "shape": [data.channels, *data.size], "classes": len(data.classes)}


def diverged(metrics: Mapping[str, Any], classes: int) -> str | None:
    """Why these metrics say that the run has diverged, or None."""
    for key in ("train_loss", "test_loss"):
        if key in metrics and not math.isfinite(metrics[key]):
            return f"the {key.replace('_', ' ')} was {metrics[key]}"
    limit = DIVERGED * math.log(max(classes, 2))
    if metrics["train_loss"] > limit:
        return f"the train loss was {metrics['train_loss']:.3g}, over {DIVERGED:.0f} times that of guessing"
    return None


def sequential(job: Job, starts: Sequence[Start], tick: Callable[[int], None]) -> Iterator[Sequence[Event]]:
    """Train the runs one after the other, each from where it was left to its end."""
    for start in starts:
        yield from (_measure if job.study.procedure is not None else _train)(job, start, tick)


def _measure(job: Job, start: Start, tick: Callable[[int], None]) -> Iterator[Sequence[Event]]:
    """A run of a study with a procedure of its own: one epoch, and the end."""
    assert job.study.procedure is not None
    torch.manual_seed(start.seed)
    began = time.perf_counter()
    status, why, metrics = "finished", None, {}
    try:
        metrics = dict(job.study.procedure(Experiment(start.settings, start.seed, job.data, job.device, tick)))
    except FloatingPointError as error:
        status, why = "diverged", str(error)
    metrics["train_seconds"] = time.perf_counter() - began
    yield [Epoch(start.run, 0, metrics, None), End(start.run, status, why, metrics, None)]


def _train(job: Job, start: Start, tick: Callable[[int], None]) -> Iterator[Sequence[Event]]:
    data, settings, classes = job.data, start.settings, len(job.data.classes)
    part = parts(data, settings)
    torch.manual_seed(start.seed)
    model = initial(job, start).to(job.device)
    optimizer = make_optimizer(model, settings)
    generator = order_generator(start)
    metrics: Mapping[str, Any] = start.metrics
    if (state := start.state) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        if job.device.type == "cuda" and "device_rng" in state:
            torch.cuda.set_rng_state(state["device_rng"], job.device)
    before = observations(job, start, model, -1) if start.epochs == 0 else {}
    for epoch in range(start.epochs, settings["epochs"]):
        if metrics and diverged(metrics, classes):
            break
        began = time.perf_counter()
        order = torch.randperm(len(part.x), generator=generator).to(job.device)
        loss, accuracy = train_epoch(
            model, optimizer, part.x, part.y, order, settings["batch_size"], tick, settings.get("clip")
        )
        trained = time.perf_counter()
        found: dict[str, Any] = {"train_loss": loss, "train_acc": accuracy, **before}
        before = {}
        if diverged(found, classes) is None:
            found |= three_ways(model, part, settings, epoch == settings["epochs"] - 1)
            found |= observations(job, start, model, epoch)
        found |= {"train_seconds": trained - began, "evaluation_seconds": time.perf_counter() - trained}
        checkpoint = {
            **trained_network(model, data),
            "optimizer": optimizer.state_dict(),
            "order": generator.get_state(),
            "rng": torch.get_rng_state(),
        }
        if job.device.type == "cuda":
            checkpoint["device_rng"] = torch.cuda.get_rng_state(job.device)
        metrics = found
        yield [Epoch(start.run, epoch, metrics, checkpoint)]
    why = diverged(metrics, classes)
    status = "finished" if why is None else "diverged"
    yield [End(start.run, status, why, metrics, trained_network(model, data))]
