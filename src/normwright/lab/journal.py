"""The journal: one SQLite file, one row a run and one an epoch, written as it happens.

What survives. The file is in write-ahead mode with `synchronous=NORMAL`, and every epoch is one transaction that holds
its metrics and the state to resume from. Killing the process (`kill -9`) loses nothing that was committed, hence at
most the epoch under way; a power cut may lose the last few commits (flushing each would cost a disk flush an epoch) but
never leaves the file inconsistent.

Who owns a run. `claim_run` marks it as running, with host, process id and the time that process started, under the
write lock. A run marked by a process of this host that no longer lives can be claimed again; what another host left
behind needs `release_runs`. A process that writes to a run which is no longer its own is told so and writes nothing.

The file's `application_id` says that it is ours and its `user_version` which schema it has; both are read from the
header before SQLite opens it, so a foreign or newer file is left exactly as it is. An older one is read as it is, and
brought up to date in place when it is opened for writing.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import socket
import sqlite3
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from .errors import UserError

__all__ = ["SCHEMA_VERSION", "End", "Epoch", "Journal", "Metrics", "Run", "Study", "environment"]

SCHEMA_VERSION = 2
_APPLICATION_ID = 0x6E776A6C  # "nwjl"

Metric: TypeAlias = "float | Sequence[Metric]"  # non-finite numbers are kept exactly; lists may nest
Metrics: TypeAlias = Mapping[str, Metric]
Status = Literal["pending", "running", "finished", "diverged", "failed", "interrupted"]

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE study (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, config TEXT NOT NULL, environment TEXT NOT NULL,
  source TEXT NOT NULL, source_sha256 TEXT NOT NULL, data_sha256 TEXT NOT NULL, command TEXT NOT NULL,
  created TEXT NOT NULL);
CREATE TABLE run (
  id INTEGER PRIMARY KEY, study INTEGER NOT NULL REFERENCES study, arm TEXT NOT NULL, seed INTEGER NOT NULL,
  config TEXT NOT NULL, hash TEXT NOT NULL,
  status TEXT NOT NULL CHECK (status IN ('pending', 'running', 'finished', 'diverged', 'failed', 'interrupted')),
  started TEXT, finished TEXT, error TEXT, host TEXT, pid INTEGER, pid_started TEXT,
  UNIQUE (study, hash));
CREATE TABLE epoch (
  run INTEGER NOT NULL REFERENCES run, epoch INTEGER NOT NULL, metrics TEXT NOT NULL, recorded TEXT NOT NULL,
  PRIMARY KEY (run, epoch)) WITHOUT ROWID;
CREATE TABLE checkpoint (run INTEGER PRIMARY KEY REFERENCES run, epoch INTEGER NOT NULL, state BLOB NOT NULL);
CREATE TABLE result (
  run INTEGER NOT NULL REFERENCES run, name TEXT NOT NULL, value NOT NULL, PRIMARY KEY (run, name)) WITHOUT ROWID;
"""
# What each version added to the one before: a new journal takes all steps, an older one those that it lacks.
_ADDED = {
    2: """
CREATE TABLE document (
  study INTEGER NOT NULL REFERENCES study, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (study, key));
""",
}


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


@dataclass(frozen=True)
class Epoch:
    """An event of a run: an epoch was trained. See `Journal.record` for the fields."""

    run: int
    epoch: int
    metrics: Metrics
    checkpoint: Any = None


@dataclass(frozen=True)
class End:
    """An event of a run: it ended, with these results. See `Journal.record` for the fields."""

    run: int
    status: Literal["finished", "diverged", "failed", "interrupted"] = "finished"
    error: str | None = None
    metrics: Metrics = field(default_factory=dict)
    trained: Any = None


def environment() -> dict[str, Any]:
    """Versions, machine and commit: `python, torch, numpy, normwright, platform, cpu, cores, threads, gpu, commit`.

    `cores` are those this process may use, `threads` those torch does use; `gpu` and `commit` are None where there are
    none (`commit` is that of normwright's own checkout, with `-dirty` if it has changes).
    """
    try:
        own_version = version("normwright")
    except PackageNotFoundError:
        own_version = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "normwright": own_version,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # An installed copy may lie inside somebody else's checkout: only a tracked file has a commit of ours.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True, timeout=10)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _process_started(pid: int) -> str | None:
    """When the process started, in ticks since boot ("" where that is not told), or None if it is dead.

    The start tells a process from a later one that was given the same number. Only where there is `/proc` or signals
    can be sent is a death seen; elsewhere (Windows) every process counts as alive.
    """
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
    return ""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _plain(value: Any) -> Any:
    """A metric as JSON can say it; what JSON cannot say (nan, inf) becomes its name."""
    if hasattr(value, "tolist"):  # tensors, arrays and NumPy's numbers
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    raise TypeError(f"A metric is a number or a list of numbers, not {type(value).__name__}.")


def _number(value: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float(value) if isinstance(value, str) else value


def _pack_result(value: Any) -> float | str:
    # A column of SQLite: numbers, inf too, stay numbers, so that SQL can average them; nan, which SQLite would turn
    # into NULL, and lists are text.
    plain = _plain(value)
    if isinstance(plain, list):
        return json.dumps(plain)
    return plain if plain == "nan" else float(plain) if isinstance(plain, str) else plain


def _unpack_result(value: Any) -> Any:
    return _number(json.loads(value) if isinstance(value, str) and value.startswith("[") else value)


def _config_json(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True, allow_nan=False)


class Journal:
    """A journal file, open; use it as a context manager or call `close()`. One object a thread and process.

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
        self.path = Path(path)
        self.timeout = timeout
        self._pid = os.getpid()
        self._readable_states: set[int] = set()
        exists = self._check_header(may_be_new=mode == "create")
        if mode == "read":
            uri = self.path.resolve().as_uri() + "?mode=ro"
            # Reading a WAL file makes a small index beside it; in a folder that may not be written there is no other
            # writer to heed either, unless its log lies there.
            if not os.access(self.path.parent, os.W_OK) and not Path(f"{self.path}-wal").exists():
                uri += "&immutable=1"
            with self._faults():
                self._db = sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None)
        else:
            with self._faults():
                self._db = sqlite3.connect(self.path, timeout=timeout, isolation_level=None)
        try:
            if mode != "read":
                self._prepare(exists)
            with self._faults():
                # The header as it is now: what another process changed may still lie in the log beside the file.
                (found,) = self._db.execute("PRAGMA user_version").fetchone()
                self._check_version(found)
                self._db.execute("PRAGMA foreign_keys = ON")
                (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    raise sqlite3.DatabaseError(f"malformed: {verdict}")
            if mode != "read" and found < SCHEMA_VERSION:
                with self._writing() as db:
                    # Asked again under the lock, since another process may have been faster.
                    self._bring_up(db, db.execute("PRAGMA user_version").fetchone()[0])
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def _check_header(self, may_be_new: bool) -> bool:
        """Whether there is a journal of ours at the path; UserError for any other file. Opens nothing with SQLite."""
        try:
            if may_be_new:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if not self.path.exists():
                    return False
            with self.path.open("rb") as file:
                head = file.read(100)
        except FileNotFoundError as error:
            raise UserError(f"There is no journal {self.path}; name the folder of a study that was run.") from error
        except OSError as error:
            raise UserError(
                f"The journal {self.path} cannot be opened ({error.strerror}); check the path and its rights."
            ) from error
        if not head and may_be_new:
            return False
        if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
            raise UserError(
                f"{self.path} is no journal: it is not an SQLite file; move it away or choose another folder."
            )
        if int.from_bytes(head[68:72], "big") != _APPLICATION_ID:
            raise UserError(
                f"{self.path} is a database of another program, not a journal of normwright; choose another folder."
            )
        self._check_version(int.from_bytes(head[60:64], "big"))
        return True

    def _check_version(self, found: int) -> None:
        if not 1 <= found <= SCHEMA_VERSION:
            raise UserError(
                f"The journal {self.path} has schema version {found}, this normwright reads 1 to {SCHEMA_VERSION}; use "
                "the normwright that wrote it or choose another folder (nothing was changed)."
            )

    def _prepare(self, exists: bool) -> None:
        if not exists:
            # Made in one transaction and before write-ahead mode, so that the header is there whole or not at all.
            with self._writing() as db:
                if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute("INSERT INTO meta VALUES ('created', ?)", (_now(),))
                    self._bring_up(db, 1)
                    db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        deadline = time.monotonic() + self.timeout
        with self._faults():
            while True:
                try:
                    (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
                    break
                except sqlite3.OperationalError as error:
                    # SQLite does not wait by itself when another process is switching the same new file.
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
            self._db.execute("PRAGMA synchronous = NORMAL")
        if mode != "wal":
            raise UserError(
                f"The disk of {self.path} does not allow write-ahead logging; choose a folder on a local disk."
            )

    def _bring_up(self, db: sqlite3.Connection, found: int) -> None:
        for step in range(found + 1, SCHEMA_VERSION + 1):
            for statement in _ADDED[step].split(";"):
                db.execute(statement)
            db.execute("INSERT OR REPLACE INTO meta VALUES ('schema_version', ?)", (str(step),))
            db.execute(f"PRAGMA user_version = {step}")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Say SQLite's complaints about the file, as opposed to those about our statements, as a UserError."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError) and type(error) is not sqlite3.DatabaseError:
                raise
            text = " ".join(str(error).split())
            if "full" in text:
                advice = "the disk is full; free some space and resume, all that was recorded before is kept"
            elif "locked" in text:
                advice = f"another process has held it for over {self.timeout:g} s; wait for that one or stop it"
            elif "readonly" in text:
                advice = "it is read-only; make it writable or choose another folder"
            elif "malformed" in text or "not a database" in text or "no such" in text:
                advice = f"it is damaged ({text}); restore a copy, or choose another folder and start again"
            else:
                advice = f"SQLite says: {text}; check the disk, its quota and the rights there"
            raise UserError(f"The journal {self.path} cannot be used: {advice}.") from error

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        if os.getpid() != self._pid:
            raise RuntimeError("A journal must not be carried over a fork; open it anew in the child process.")
        with self._faults():
            try:
                self._db.execute(begin)
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _writing(self):
        return self._transaction("BEGIN IMMEDIATE")

    def _reading(self):
        return self._transaction("BEGIN")

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
        """Record a new study and return it; UserError if the name is taken.

        `source`: the text of the study's file, kept with its hash. `environment`: None takes `environment()`.
        """
        about = _environment() if environment is None else environment
        digest = hashlib.sha256(source.encode()).hexdigest()
        values = (name, _config_json(config), _config_json(about), source, digest, data_sha256, command, _now())
        with self._writing() as db:
            if db.execute("SELECT 1 FROM study WHERE name = ?", (name,)).fetchone():
                raise UserError(f"{self.path} already has a study {name!r}; resume it, or choose another folder.")
            db.execute(
                "INSERT INTO study (name, config, environment, source, source_sha256, data_sha256, command, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        return self.open_study(name)

    def extend_study(self, study: int, config: Mapping[str, Any], command: str) -> None:
        """Give a study that goes on with more arms or seeds its new config, and the command that runs all of it."""
        with self._writing() as db:
            db.execute("UPDATE study SET config = ?, command = ? WHERE id = ?", (_config_json(config), command, study))

    def open_study(
        self, name: str, config: Mapping[str, Any] | None = None, *, data_sha256: str | None = None
    ) -> Study:
        """The study of that name; UserError if there is none, or if `config` (in which keys) or the data differ."""
        studies = {study.name: study for study in self.studies()}
        if name not in studies:
            known = ", ".join(studies) or "none at all"
            raise UserError(f"{self.path} has no study {name!r} (it has: {known}); check the name or start it anew.")
        study = studies[name]
        if config is not None:
            given = json.loads(_config_json(config))
            differ = [
                f"{key} ({study.config.get(key)!r} there, {given.get(key)!r} now)"
                for key in sorted(given.keys() | study.config.keys())
                if (key in given, given.get(key)) != (key in study.config, study.config.get(key))
            ]
            if differ:
                raise UserError(
                    f"The study {name!r} in {self.path} was started with other settings: {', '.join(differ)}; resume "
                    "it with the same ones, or choose another folder."
                )
        if data_sha256 is not None and data_sha256 != study.data_sha256:
            raise UserError(
                f"The study {name!r} in {self.path} was started on other data (SHA-256 {study.data_sha256[:12]}… "
                f"there, {data_sha256[:12]}… now); resume it with the same data, or choose another folder."
            )
        return study

    def studies(self) -> list[Study]:
        """All studies, oldest first."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT id, name, config, environment, source, source_sha256, data_sha256, command, created "
                "FROM study ORDER BY id"
            ).fetchall()
        return [Study(row[0], row[1], json.loads(row[2]), json.loads(row[3]), *row[4:]) for row in rows]

    def add_run(self, study: int, arm: str, seed: int, config: Mapping[str, Any]) -> int:
        """Register a run as pending and return its id; the same arm, seed and config again is the same run."""
        text = _config_json(config)
        digest = hashlib.sha256(json.dumps([arm, seed, text]).encode()).hexdigest()
        with self._writing() as db:
            db.execute(
                "INSERT INTO run (study, arm, seed, config, hash, status) VALUES (?, ?, ?, ?, ?, 'pending') "
                "ON CONFLICT (study, hash) DO NOTHING",
                (study, arm, seed, text, digest),
            )
            (run,) = db.execute("SELECT id FROM run WHERE study = ? AND hash = ?", (study, digest)).fetchone()
        return run

    def claim_run(self, study: int, run: int | None = None, *, retry_failed: bool = False) -> Run | None:
        """Take the next run to train (or `run`), atomically: no two processes get the same one. None if none is left.

        Runs that are pending or interrupted can be claimed, and those marked running by a process of this host that
        is dead; with `retry_failed`, failed ones too. Epochs recorded after the last checkpoint are forgotten, since
        they will be trained again: `Run.epochs` goes on where `checkpoint(run)` stands.
        """
        claimed = self._claim(study, None if run is None else [run], 1, retry_failed)
        return claimed[0] if claimed else None

    def claim_runs(self, study: int, numbers: Collection[int], *, retry_failed: bool = False) -> list[Run]:
        """Take those runs of `numbers` that can be claimed (see `claim_run`), in one transaction, in their order.

        What another process took first is left out, so that the list may be shorter than asked for, or empty.
        """
        return self._claim(study, numbers, len(numbers), retry_failed)

    def _claim(self, study: int, numbers: Collection[int] | None, limit: int, retry_failed: bool) -> list[Run]:
        free = ["pending", "interrupted", "failed"] if retry_failed else ["pending", "interrupted"]
        host, own_start = socket.gethostname(), _process_started(self._pid)
        claimed: list[Run] = []
        with self._writing() as db:
            rows = {
                number: (status, owner)
                for number, status, *owner in db.execute(
                    "SELECT id, status, host, pid, pid_started FROM run WHERE study = ? ORDER BY id", (study,)
                )
            }
            for number in rows if numbers is None else dict.fromkeys(numbers):
                if number not in rows or len(claimed) == limit:
                    continue
                status, owner = rows[number]
                stale = status == "running" and owner[0] == host and _process_started(owner[1]) != owner[2]
                if status not in free and not stale:
                    continue
                db.execute(
                    "UPDATE run SET status = 'running', started = coalesce(started, ?), finished = NULL, error = NULL, "
                    "host = ?, pid = ?, pid_started = ? WHERE id = ?",
                    (_now(), host, self._pid, own_start, number),
                )
                db.execute(
                    "DELETE FROM epoch WHERE run = :run AND epoch > "
                    "coalesce((SELECT epoch FROM checkpoint WHERE run = :run), -1)",
                    {"run": number},
                )
                claimed += self._select_runs(db, "run.id = ?", (number,))
        return claimed

    def release_runs(self, study: int) -> int:
        """Give back the runs marked running by other hosts, once you know that those are dead; returns how many."""
        with self._writing() as db:
            cursor = db.execute(
                "UPDATE run SET status = 'interrupted' WHERE study = ? AND status = 'running' AND host <> ?",
                (study, socket.gethostname()),
            )
        return cursor.rowcount

    def record_epoch(self, run: int, epoch: int, metrics: Metrics, checkpoint: Any = None) -> None:
        """Commit one epoch and, in the same transaction, the state to resume from (replaces the one before).

        `epoch` is the next one, counted from 0. `checkpoint`: anything that `torch.load(weights_only=True)` reads back:
        tensors, numbers, strings, dicts, lists.
        """
        self.record([Epoch(run, epoch, metrics, checkpoint)])

    def record(self, events: Iterable[Epoch | End]) -> None:
        """Commit epochs and ends of several runs, in their order, in one transaction: all of them or none.

        An `Epoch` is the next one of its run, as in `record_epoch`. An `End` adds its metrics to the run's results; one
        that finished or diverged gives up its checkpoint, whose place `trained`, the network, takes if given, and one
        that failed or was interrupted keeps it, to go on from. Every run must be this process's own.
        """
        packed = []
        for event in events:
            if isinstance(event, Epoch):
                content = json.dumps({name: _plain(value) for name, value in event.metrics.items()}, allow_nan=False)
                state = event.checkpoint
            else:
                content = [(event.run, name, _pack_result(value)) for name, value in event.metrics.items()]
                state = event.trained
            packed.append((event, content, None if state is None else self._pack_state(event.run, state)))
        with self._writing() as db:
            for event, content, blob in packed:
                self._check_owner(db, event.run)
                (n,) = db.execute("SELECT count(*) FROM epoch WHERE run = ?", (event.run,)).fetchone()
                if isinstance(event, Epoch):
                    if event.epoch != n:
                        raise ValueError(
                            f"Epochs are recorded in order: the next of run {event.run} is {n}, not {event.epoch}."
                        )
                    db.execute("INSERT INTO epoch VALUES (?, ?, ?, ?)", (event.run, n, content, _now()))
                    n += 1
                else:
                    db.execute(
                        "UPDATE run SET status = ?, finished = ?, error = ? WHERE id = ?",
                        (event.status, _now(), event.error, event.run),
                    )
                    db.executemany("INSERT OR REPLACE INTO result VALUES (?, ?, ?)", content)
                    if event.status in ("finished", "diverged"):
                        db.execute("DELETE FROM checkpoint WHERE run = ?", (event.run,))
                if blob is not None:
                    db.execute("INSERT OR REPLACE INTO checkpoint VALUES (?, ?, ?)", (event.run, n - 1, blob))

    def _pack_state(self, run: int, state: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        if run not in self._readable_states:
            # Found out at the first epoch of a run rather than when it is to be resumed.
            try:
                torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
            except Exception as error:
                raise TypeError("A checkpoint holds tensors, numbers, strings, dicts and lists only.") from error
            self._readable_states.add(run)
        return buffer.getvalue()

    def _check_owner(self, db: sqlite3.Connection, run: int) -> None:
        row = db.execute("SELECT arm, seed, status, host, pid FROM run WHERE id = ?", (run,)).fetchone()
        if row is None:
            raise ValueError(f"The journal has no run {run}.")
        arm, seed, status, host, pid = row
        if (status, host, pid) != ("running", socket.gethostname(), self._pid):
            raise UserError(
                f"Run {run} ({arm}, seed {seed}) in {self.path} is not this process's to write: it is {status}"
                + (f" in process {pid} on {host}" if status == "running" else "")
                + "; claim it first, and let only one process train it."
            )

    def checkpoint(self, run: int) -> Any:
        """The state given with the last epoch of `run` that had one, or as trained at its end; tensors on the CPU.

        None if there is none.
        """
        with self._reading() as db:
            row = db.execute("SELECT state FROM checkpoint WHERE run = ?", (run,)).fetchone()
        if row is None:
            return None
        try:
            return torch.load(io.BytesIO(row[0]), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes can fail in any of zip, pickle and torch
            raise UserError(
                f"The checkpoint of run {run} in {self.path} is damaged ({type(error).__name__}); choose another "
                "folder and start again."
            ) from error

    def finish_run(
        self,
        run: int,
        results: Metrics | None = None,
        *,
        status: Literal["finished", "diverged"] = "finished",
        error: str | None = None,
        trained: Any = None,
    ) -> None:
        """End a run with its results; `trained`, the network, takes the checkpoint's place, which is else deleted."""
        self.record([End(run, status, error, results or {}, trained)])

    def fail_run(self, run: int, error: str) -> None:
        """End a run that raised, with the error's text; its checkpoint stays for `claim_run(retry_failed=True)`."""
        self.record([End(run, "failed", error)])

    def interrupt_run(self, run: int) -> None:
        """Give a run back (Ctrl-C): the next `claim_run` continues it from its checkpoint."""
        self.record([End(run, "interrupted")])

    def add_results(self, run: int, results: Metrics) -> None:
        """Add results to a finished run, whichever process trained it; a name it has already takes the new value."""
        rows = [(run, name, _pack_result(value)) for name, value in results.items()]
        with self._writing() as db:
            row = db.execute("SELECT status FROM run WHERE id = ?", (run,)).fetchone()
            if row is None:
                raise ValueError(f"The journal has no run {run}.")
            if row[0] != "finished":
                raise ValueError(f"Results are added to finished runs; run {run} is {row[0]}.")
            db.executemany("INSERT OR REPLACE INTO result VALUES (?, ?, ?)", rows)

    def store(self, study: int, key: str, value: Any) -> None:
        """Keep a JSON document (a figure, the results of a series) with a study; it replaces the one of that key.

        `value`: dicts, lists, strings, finite numbers, booleans and None. Errors: ValueError for nan and inf, which
        JSON cannot say, and for a study that there is not; TypeError for what else JSON cannot say.
        """
        text = json.dumps(value, allow_nan=False)
        with self._writing() as db:
            if not db.execute("SELECT 1 FROM study WHERE id = ?", (study,)).fetchone():
                raise ValueError(f"The journal has no study {study}.")
            db.execute("INSERT OR REPLACE INTO document VALUES (?, ?, ?)", (study, key, text))

    def stored(self, study: int, key: str) -> Any:
        """The document stored with a study under `key`; None if there is none."""
        with self._reading() as db:
            # A journal of version 1 that is only read has no such table.
            if db.execute("PRAGMA user_version").fetchone()[0] < 2:
                return None
            row = db.execute("SELECT value FROM document WHERE study = ? AND key = ?", (study, key)).fetchone()
        return None if row is None else json.loads(row[0])

    def runs(self, study: int | None = None, *, status: Status | None = None) -> list[Run]:
        """Runs with their results, in the order they were added."""
        with self._reading() as db:
            where = "(:study IS NULL OR run.study = :study) AND (:status IS NULL OR status = :status)"
            return self._select_runs(db, where, {"study": study, "status": status})

    def _select_runs(self, db: sqlite3.Connection, where: str, values: Any) -> list[Run]:
        results: dict[int, dict[str, Any]] = {}
        for run, name, value in db.execute(
            f"SELECT run, name, value FROM result WHERE run IN (SELECT id FROM run WHERE {where}) ORDER BY run, name",
            values,
        ):
            results.setdefault(run, {})[name] = _unpack_result(value)
        rows = db.execute(
            "SELECT id, study, arm, seed, config, status, (SELECT count(*) FROM epoch WHERE epoch.run = run.id), "
            f"error, started, finished, host, pid FROM run WHERE {where} ORDER BY id",
            values,
        )
        return [
            Run(number, of, arm, seed, json.loads(config), status, epochs, results.get(number, {}), *rest)
            for number, of, arm, seed, config, status, epochs, *rest in rows
        ]

    def epochs(self, run: int) -> dict[int, dict[str, Any]]:
        """Metrics by epoch, in order."""
        with self._reading() as db:
            rows = db.execute("SELECT epoch, metrics FROM epoch WHERE run = ? ORDER BY epoch", (run,)).fetchall()
        return {epoch: {name: _number(value) for name, value in json.loads(text).items()} for epoch, text in rows}

    def recorded(self, run: int) -> dict[int, str]:
        """When each epoch was committed, as `Run.started` says times."""
        with self._reading() as db:
            return dict(db.execute("SELECT epoch, recorded FROM epoch WHERE run = ? ORDER BY epoch", (run,)).fetchall())


_environment = environment  # `create_study` has an argument of that name
