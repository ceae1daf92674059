"""Training by the plain loop: one network after another, the data in memory. The oracle for every faster engine.

Arms are paired by seed: a seed fixes the order of the images and the starting values of all parameters that an arm
shares, by name and shape, with the study's first arm. Nothing in a step waits for the device; losses are looked at
once an epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..surgery import recalibrate
from .data import Dataset
from .errors import UserError
from .journal import Journal, Metrics, Run
from .study import Study

__all__ = [
    "ENGINES",
    "Job",
    "Watcher",
    "batches",
    "evaluate",
    "initial",
    "make_optimizer",
    "mixed",
    "sequential",
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


class Watcher(Protocol):
    """What is told of progress."""

    def begin(self, run: Run) -> None: ...
    def trained(self, images: int) -> None: ...
    def epoch(self, run: Run, epoch: int, metrics: Metrics) -> None: ...
    def end(self, run: Run, status: str, error: str | None) -> None: ...


def batches(n: int, size: int) -> list[tuple[int, int]]:
    """Bounds of the batches of n images; the last one is ragged, and joins the one before if it is a single image.

    One value has no variance, so a batch norm refuses a batch of one.
    """
    starts = list(range(0, n, size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], n], strict=True))


def initial(job: Job, arm: str, seed: int) -> nn.Module:
    """The network of an arm at the start: parameters that it shares with the first arm are equal to that arm's."""
    shape = (job.data.channels, *job.data.size)

    def built(name: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return job.study.build(job.settings[name], shape, len(job.data.classes))

    model, first = built(arm), job.study.arms[0].name
    if arm != first:
        shared = dict(built(first).named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in shared and shared[name].shape == parameter.shape:
                    parameter.copy_(shared[name])
    return model


def make_optimizer(model: nn.Module, name: str, lr: float) -> torch.optim.Optimizer:
    """The named optimizer of torch, its other settings as torch has them; fused where torch offers it."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
        "adadelta": torch.optim.Adadelta,
        "adam": torch.optim.Adam,
    }
    fused = {"fused": True} if name in ("sgd", "adagrad", "adam") else {}
    return kinds[name](model.parameters(), lr=lr, **fused)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    order: Tensor,
    batch_size: int,
    tick: Callable[[int], None] | None = None,
) -> tuple[float, float]:
    """One epoch in the given order; the mean loss and the accuracy while training, as the weights moved."""
    model.train()
    loss_sum, correct = torch.zeros((), device=x.device), torch.zeros((), device=x.device, dtype=torch.int64)
    reported = 0
    for step, (start, stop) in enumerate(batches(len(order), batch_size), start=1):
        chosen = order[start:stop]
        labels = y.index_select(0, chosen)
        logits = model(x.index_select(0, chosen))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
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


def _running(model: nn.Module) -> list[nn.Module]:
    """The modules that keep running statistics."""
    return [
        module
        for module in model.modules()
        if any(key.startswith("running_") and value is not None for key, value in module._buffers.items())
    ]


def _three_ways(model: nn.Module, job: Job, batch_size: int, last: bool) -> dict[str, float]:
    """Test loss and accuracy as trained and, where there are running statistics, recalibrated and by batch.

    The model is left as it was found: the running statistics that training goes on with are the averaged ones.
    """
    data = job.data
    model.eval()
    loss, accuracy = evaluate(model, data.x_test, data.y_test)
    metrics = {"test_loss": loss, "test_acc": accuracy}
    modules = _running(model)
    if not modules:
        return metrics
    images = data.x_train if last else data.x_train[:RECALIBRATION_IMAGES]
    pieces = [images[start:stop] for start, stop in batches(len(images), EVALUATION_BATCH)]
    receipt = recalibrate(model, pieces, method="layerwise" if last else "one_pass")
    metrics["test_acc_recalibrated"] = evaluate(model, data.x_test, data.y_test)[1]
    receipt.undo()
    kept = {id(buffer): buffer.clone() for module in modules for buffer in module.buffers(recurse=False)}
    for module in modules:
        module.train()
    metrics["test_acc_batch"] = evaluate(model, data.x_test, data.y_test, batch_size)[1]
    for module in modules:
        for buffer in module.buffers(recurse=False):
            buffer.copy_(kept[id(buffer)])
    return metrics


def trained_network(model: nn.Module, data: Dataset) -> dict[str, Any]:
    """What the journal keeps of a network: its state, and what its study needs to build it again."""
    return {"model": model.state_dict(), "shape": [data.channels, *data.size], "classes": len(data.classes)}


def _diverged(metrics: Mapping[str, Any], classes: int) -> str | None:
    """Why these metrics say that the run has diverged, or None."""
    for key in ("train_loss", "test_loss"):
        if key in metrics and not math.isfinite(metrics[key]):
            return f"the {key.replace('_', ' ')} was {metrics[key]}"
    limit = DIVERGED * math.log(max(classes, 2))
    if metrics["train_loss"] > limit:
        return f"the train loss was {metrics['train_loss']:.3g}, over {DIVERGED:.0f} times that of guessing"
    return None


def _train(job: Job, journal: Journal, run: Run, watcher: Watcher) -> tuple[str, str | None]:
    """Train one run from where the journal has it to its end, an epoch a transaction; its status and why."""
    data, settings, classes = job.data, job.settings[run.arm], len(job.data.classes)
    torch.manual_seed(run.seed)
    model = initial(job, run.arm, run.seed).to(job.device)
    optimizer = make_optimizer(model, settings["optimizer"], settings["lr"])
    generator = torch.Generator().manual_seed(run.seed)
    recorded = journal.epochs(run.id)
    metrics: dict[str, Any] = recorded[run.epochs - 1] if run.epochs else {}
    if (state := journal.checkpoint(run.id)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        if job.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_rng"], job.device)
    for epoch in range(run.epochs, settings["epochs"]):
        if metrics and _diverged(metrics, classes):
            break
        began = time.perf_counter()
        order = torch.randperm(len(data.x_train), generator=generator).to(job.device)
        loss, accuracy = train_epoch(
            model, optimizer, data.x_train, data.y_train, order, settings["batch_size"], watcher.trained
        )
        trained = time.perf_counter()
        metrics = {"train_loss": loss, "train_acc": accuracy}
        last = epoch == settings["epochs"] - 1
        if _diverged(metrics, classes) is None:
            metrics |= _three_ways(model, job, settings["batch_size"], last)
        metrics |= {"train_seconds": trained - began, "evaluation_seconds": time.perf_counter() - trained}
        checkpoint = {
            **trained_network(model, data),
            "optimizer": optimizer.state_dict(),
            "order": generator.get_state(),
            "rng": torch.get_rng_state(),
        }
        if job.device.type == "cuda":
            checkpoint["device_rng"] = torch.cuda.get_rng_state(job.device)
        journal.record_epoch(run.id, epoch, metrics, checkpoint)
        watcher.epoch(run, epoch, metrics)
    why = _diverged(metrics, classes)
    status = "finished" if why is None else "diverged"
    journal.finish_run(run.id, metrics, status=status, error=why, trained=trained_network(model, data))
    return status, why


def _claims(journal: Journal, study: int) -> Iterator[Run]:
    """Every run that was left when the loop began, once; those that failed in an earlier session are tried again."""
    left = [
        (run.id, run.status == "failed") for run in journal.runs(study) if run.status not in ("finished", "diverged")
    ]
    for number, failed in left:
        run = journal.claim_run(study, number, retry_failed=failed)
        if run is not None:  # None: another process has it
            yield run


def sequential(job: Job, journal: Journal, study: int, watcher: Watcher) -> None:
    """Train every run of the study that is left, one after the other.

    A run that diverges or raises is recorded so and the study goes on; an interrupt gives the run under way back to the
    journal and is raised again. The random state of torch is left as it was found.
    """
    devices = [job.device] if job.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for run in _claims(journal, study):
            watcher.begin(run)
            try:
                status, why = _train(job, journal, run, watcher)
            except KeyboardInterrupt:
                journal.interrupt_run(run.id)
                raise
            except UserError:
                raise  # the journal's own: a full disk ends the study, and the run can be claimed again
            except Exception as error:
                status, why = "failed", f"{type(error).__name__}: {error}"
                journal.fail_run(run.id, why)
            watcher.end(run, status, why)


ENGINES: dict[str, Callable[[Job, Journal, int, Watcher], None]] = {"sequential": sequential}
