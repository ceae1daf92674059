"""The journal: one SQLite file, one row a run and one an epoch, written as it happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

__all__ = ["Journal", "Metrics", "Run", "Study", "environment"]

Metric = Union[float, int, Sequence["Metric"]]  # non-finite floats are kept exactly; lists may nest
Metrics = Mapping[str, Metric]
Status = Literal["pending", "running", "finished", "diverged", "failed", "interrupted"]


@dataclass(frozen=True)
class Study:
    """A study as the journal holds it; times are ISO 8601 in UTC."""

    id: int
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    source: str
    source_sha256: str
    data_sha256: str
    command: str
    created: str


@dataclass(frozen=True)
class Run:
    """A run as the journal holds it: `epochs` counts the epochs recorded, so the next one to train is `epochs`."""

    id: int
    study: int
    arm: str
    seed: int
    config: dict[str, Any]
    status: Status
    epochs: int
    results: dict[str, Any]
    error: str | None
    started: str | None
    finished: str | None
    host: str | None
    pid: int | None


def environment() -> dict[str, Any]:
    """Versions, machine and commit: `python, torch, numpy, normwright, platform, cpu, cores, threads, gpu, commit`."""
    raise NotImplementedError


class Journal:
    """A journal file, open; use it as a context manager or call `close()`. One connection a process and thread.

    `mode`: `"create"` opens for writing and makes the file if it is missing, `"write"` needs it to exist, `"read"`
    changes nothing. `timeout`: seconds to wait for another writer. Every fault that the user can mend (no journal,
    another version, a damaged file, a full disk, a lock held too long) is a `UserError`.

    The use in a study:

        with Journal(out / "journal.sqlite") as journal:
            study = journal.create_study("lenet", config, ...)      # or journal.open_study("lenet", config) to resume
            for arm, seed in plan:
                journal.add_run(study.id, arm, seed, run_config)    # pending; nothing happens if it is there already
            while (run := journal.claim_run(study.id)) is not None:
                state = journal.checkpoint(run.id)                  # None, or what the last record_epoch was given
                for epoch in range(run.epochs, n_epochs):           # epochs count from 0
                    journal.record_epoch(run.id, epoch, {"train_loss": loss}, checkpoint=model_and_optimizer_state)
                journal.finish_run(run.id, {"test_acc": 0.87})      # or status="diverged"; fail_run; interrupt_run
    """

    def __init__(
        self, path: str | Path, *, mode: Literal["create", "write", "read"] = "create", timeout: float = 30.0
    ) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def create_study(
        self,
        name: str,
        config: Mapping[str, Any],
        *,
        source: str = "",
        data_sha256: str = "",
        command: str = "",
        environment: Mapping[str, Any] | None = None,
    ) -> Study:
        """Record a new study; `source` is the text of its file, kept with its hash. UserError if the name is taken."""
        raise NotImplementedError

    def open_study(
        self, name: str, config: Mapping[str, Any] | None = None, *, data_sha256: str | None = None
    ) -> Study:
        """The study of that name; UserError if there is none, or if `config` or the data differ (says in which keys)."""
        raise NotImplementedError

    def studies(self) -> list[Study]:
        """All studies, oldest first."""
        raise NotImplementedError

    def add_run(self, study: int, arm: str, seed: int, config: Mapping[str, Any]) -> int:
        """Register a run as pending and return its id; the same arm, seed and config again is the same run."""
        raise NotImplementedError

    def claim_run(self, study: int, run: int | None = None, *, retry_failed: bool = False) -> Run | None:
        """Take the next run to train (or `run`), atomically: no two processes ever get the same one; None if none is left.

        Runs that are pending or interrupted can be claimed, and those marked running by a process of this host that
        is dead; with `retry_failed`, failed ones too.
        """
        raise NotImplementedError

    def record_epoch(self, run: int, epoch: int, metrics: Metrics, checkpoint: Any = None) -> None:
        """Commit one epoch and, in the same transaction, the state to resume from (replaces the one before).

        `checkpoint`: anything that `torch.load(weights_only=True)` reads back: tensors, numbers, strings, dicts, lists.
        """
        raise NotImplementedError

    def record_epochs(self, rows: Iterable[tuple[int, int, Metrics, Any]]) -> None:
        """Commit (run, epoch, metrics, checkpoint) of several runs in one transaction, as packed training needs."""
        raise NotImplementedError

    def checkpoint(self, run: int) -> Any:
        """The state given with the last epoch of `run`, tensors on the CPU, or None."""
        raise NotImplementedError

    def finish_run(
        self,
        run: int,
        results: Metrics | None = None,
        *,
        status: Literal["finished", "diverged"] = "finished",
        error: str | None = None,
    ) -> None:
        """End a run with its results; its checkpoint is deleted."""
        raise NotImplementedError

    def fail_run(self, run: int, error: str) -> None:
        """End a run that raised; its checkpoint stays for a retry."""
        raise NotImplementedError

    def interrupt_run(self, run: int) -> None:
        """Give a run back (Ctrl-C): the next `claim_run` continues it from its checkpoint."""
        raise NotImplementedError

    def runs(self, study: int | None = None, *, status: Status | None = None) -> list[Run]:
        """Runs with their results, in the order they were added."""
        raise NotImplementedError

    def epochs(self, run: int) -> dict[int, dict[str, Any]]:
        """Metrics by epoch, in order."""
        raise NotImplementedError

    def export_csv(self, path: str | Path, table: Literal["runs", "epochs"] = "runs", study: int | None = None) -> None:
        """Write one row a run (config and results in columns) or one an epoch (metrics in columns), atomically."""
        raise NotImplementedError
