"""Who trains: claims runs from the journal in groups of alike ones, feeds an engine, and records what it yields."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from .engine import End, Engine, Epoch, Event, Job, Start, sequential
from .errors import UserError
from .journal import Journal, Metrics, Run

__all__ = ["ENGINES", "Watcher", "engine_for", "groups", "in_process", "record", "starts", "why_not_packed"]

ENGINES = ("auto", "packed", "sequential")


class Watcher(Protocol):
    """What is told of progress."""

    def begin(self, runs: Sequence[Run]) -> None: ...
    def trained(self, images: int) -> None: ...
    def epoch(self, run: Run, epoch: int, metrics: Metrics) -> None: ...
    def end(self, run: Run, status: str, error: str | None) -> None: ...
    def say(self, text: str) -> None: ...


def engine_for(starts: Sequence[Start] | Sequence[Run]) -> Engine:
    """The engine of a group: several runs train as one network."""
    if len(starts) == 1:
        return sequential
    from .packed import packed

    return packed


def why_not_packed(job: Job, arm: str) -> str | None:
    """Why networks of this arm cannot train as one, or None if they can."""
    from .engine import initial
    from .packed import CannotPack, pack

    if job.study.procedure is not None:
        return "the study measures by a procedure of its own"
    tuned = {key: values[0] for key, values in job.study.tune.items()}
    settings = {**job.settings[arm], **tuned}
    shape = (job.data.channels, *job.data.size)
    try:
        models = [initial(job, Start(0, arm, seed, settings)).to(job.device) for seed in range(2)]
        pack(models, shape)
    except CannotPack as error:
        return str(error)
    return None


def groups(job: Job, runs: Sequence[Run], engine: str, watcher: Watcher) -> list[list[Run]]:
    """Runs that an engine trains together: one by one, or, packed, as many as pay that differ in starting values,
    learning rate and weight decay alone.

    Errors: `UserError` if `engine` is "packed" and an arm cannot be.
    """
    if engine == "sequential" or (engine == "auto" and job.study.procedure is not None):
        return [[run] for run in runs]
    from .packed import width

    free = {"lr", "weight_decay", *job.study.packs}
    alike: dict[str, list[Run]] = {}
    for run in runs:
        kept = {key: value for key, value in run.config.items() if key not in free}
        alike.setdefault(json.dumps([run.epochs, kept], sort_keys=True), []).append(run)
    reasons: dict[str, str | None] = {}
    found: list[list[Run]] = []
    for same in alike.values():
        for arm in dict.fromkeys(run.arm for run in same):
            if arm in reasons or (len(same) == 1 and engine != "packed"):
                continue
            reasons[arm] = reason = why_not_packed(job, arm)
            if reason is not None and engine == "packed":
                raise UserError(f"--engine packed: {arm} cannot train packed, since {reason}; use auto or sequential.")
            if reason is not None:
                watcher.say(f"{arm}: its networks train one by one, since {reason}")
        found += [[run] for run in same if reasons.get(run.arm) is not None]
        rest = [run for run in same if reasons.get(run.arm) is None]
        if rest:
            most = width(job, rest[0].arm, rest[0].config) if len(rest) > 1 else 1
            size = math.ceil(len(rest) / math.ceil(len(rest) / most))  # 12 runs at a width of 10 are 6 and 6
            found += [rest[i : i + size] for i in range(0, len(rest), size)]
    return found


def starts(journal: Journal, runs: Sequence[Run]) -> list[Start]:
    """What an engine is to know of claimed runs."""
    return [
        Start(
            run.id,
            run.arm,
            run.seed,
            run.config,
            run.epochs,
            journal.epochs(run.id)[run.epochs - 1] if run.epochs else {},
            journal.checkpoint(run.id) if run.epochs else None,
        )
        for run in runs
    ]


def record(journal: Journal, events: Sequence[Event], runs: Mapping[int, Run], watcher: Watcher) -> list[int]:
    """Commit what an engine yielded as one transaction, tell the watcher, and return the runs that have ended."""
    journal.record(events)
    for event in events:
        if isinstance(event, Epoch):
            watcher.epoch(runs[event.run], event.epoch, event.metrics)
        else:
            watcher.end(runs[event.run], event.status, event.error)
    return [event.run for event in events if isinstance(event, End)]


def left(journal: Journal, study: int) -> list[Run]:
    """The runs of a study that have not ended; those that failed in an earlier session are tried again."""
    return [run for run in journal.runs(study) if run.status not in ("finished", "diverged")]


def in_process(job: Job, journal: Journal, study: int, engine: str, watcher: Watcher) -> None:
    """Train every run of the study that is left in this process, group by group.

    A run that diverges or raises is recorded so and the study goes on; of a group that raises every run is tried again
    by itself, so that one bad run fails alone. An interrupt gives the runs under way back to the journal and is raised
    again. The random state of torch is left as it was found.

    Errors: `UserError` for what the user can mend: the journal's own faults end the study, and its runs can be claimed
    again.
    """
    devices = [job.device] if job.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for group in groups(job, left(journal, study), engine, watcher):
            claimed = journal.claim_runs(study, [run.id for run in group], retry_failed=True)
            if not claimed:
                continue  # another process has them
            try:
                _train_group(job, journal, claimed, watcher)
            except BaseException:
                for run in journal.runs(study):
                    if run.id in {each.id for each in claimed} and run.status == "running":
                        journal.interrupt_run(run.id)
                raise


def _train_group(job: Job, journal: Journal, claimed: Sequence[Run], watcher: Watcher) -> None:
    by_id = {run.id: run for run in claimed}
    ended: set[int] = set()
    watcher.begin(claimed)
    try:
        for events in engine_for(claimed)(job, starts(journal, claimed), watcher.trained):
            ended.update(record(journal, events, by_id, watcher))
    except UserError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        rest = [run for run in claimed if run.id not in ended]
        if len(claimed) == 1:
            journal.fail_run(claimed[0].id, text)
            watcher.end(claimed[0], "failed", text)
            return
        watcher.say(f"{len(rest)} networks together raised {text}; each is trained by itself")
        now = {run.id: run for run in journal.runs(claimed[0].study)}
        for run in rest:
            _train_group(job, journal, [now[run.id]], watcher)
