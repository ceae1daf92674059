"""Run a study from the first check to the report: what `normwright study` does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..allocator import tune_allocator
from . import report
from .data import load
from .engine import ENGINES, Job, mixed
from .errors import UserError
from .journal import Journal, Metrics, Run, environment
from .journal import Study as Recorded
from .study import Study, find, plan

__all__ = [
    "Outcome",
    "Request",
    "Stopped",
    "choose_device",
    "export_network",
    "print_outcome",
    "print_runs",
    "release",
    "run_study",
]

SMOKE_IMAGES = 200  # for training, and as many for testing


@dataclass(frozen=True)
class Request:
    """What is asked of `run_study`; `overrides` are the study's settings by name, None where not given."""

    study: str
    data: str = "digits"
    data_dir: Path | None = None
    norms: Sequence[str] | None = None
    overrides: Mapping[str, Any] | None = None
    out: Path | None = None
    device: str = "auto"
    resume: bool = False
    smoke: bool = False
    command: str = ""
    show: Literal["progress", "nothing"] = "progress"
    engine: str = "sequential"


@dataclass(frozen=True)
class Outcome:
    """Where the results are, and the page that holds them."""

    folder: Path
    report: Path
    page: report.Page

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        page = self.page
        return {
            "study": page.study["name"],
            "data": page.settings["data"],
            "seeds": page.settings["seeds"],
            "journal": str(self.folder / "journal.sqlite"),
            "report": str(self.report),
            "complete": not page.unfinished,
            "verdicts": [
                {
                    "contrast": contrast["text"],
                    "verdict": found.word,
                    "reason": found.reason,
                    "effect": found.effect,
                    "interval": None if found.interval is None else [found.interval.low, found.interval.high],
                    "n": found.n,
                }
                for contrast, found, _ in page.verdicts
            ],
            "results": [
                {
                    "arm": row.arm,
                    "evaluation": row.evaluation,
                    "n": len(row.values),
                    "mean": row.summary.mean if row.summary else None,
                    "sd": row.summary.sd if row.summary else None,
                    "by_seed": {str(seed): value for seed, value in row.values.items()},
                }
                for row in page.rows
            ],
            "failures": [
                {"arm": run.arm, "seed": run.seed, "status": run.status, "error": run.error} for run in page.failures
            ],
        }


class Stopped(Exception):
    """The study was interrupted; everything up to the last whole epoch is in the journal of `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "", style="progress.data.speed")


class _Silent:
    """No progress at all."""

    def begin(self, run: Run) -> None: ...
    def trained(self, images: int) -> None: ...
    def epoch(self, run: Run, epoch: int, metrics: Metrics) -> None: ...
    def end(self, run: Run, status: str, error: str | None) -> None: ...
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Lines(_Silent):
    """A plain line an epoch, for logs."""

    def __init__(self, console: Console, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.console, self.settings = console, settings

    def epoch(self, run: Run, epoch: int, metrics: Metrics) -> None:
        accuracy = metrics.get("test_acc")
        tested = f", test accuracy {accuracy:.4f}" if isinstance(accuracy, float) else ""
        total = self.settings[run.arm]["epochs"]
        self._say(
            f"{run.arm}, seed {run.seed}, epoch {epoch + 1}/{total}: train loss {metrics['train_loss']:.4f}{tested}"
        )

    def end(self, run: Run, status: str, error: str | None) -> None:
        if status != "finished":
            self._say(f"{run.arm}, seed {run.seed} {status}: {error}; the study goes on")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Bar(_Silent):
    """A bar with the arm, seed, epoch and accuracy, the rate and the time left."""

    def __init__(self, console: Console, settings: Mapping[str, Mapping[str, Any]], images: int, left: int) -> None:
        self.settings, self.images = settings, images
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("starting", total=left * images)
        self.done = 0  # epochs of the run under way
        self.accuracy = ""

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def begin(self, run: Run) -> None:
        self.done, self.accuracy = run.epochs, ""
        self._describe(run)

    def trained(self, images: int) -> None:
        self.progress.advance(self.task, images)

    def epoch(self, run: Run, epoch: int, metrics: Metrics) -> None:
        self.done = epoch + 1
        accuracy = metrics.get("test_acc")
        self.accuracy = f" · {accuracy:.3f}" if isinstance(accuracy, float) else ""
        self._describe(run)

    def end(self, run: Run, status: str, error: str | None) -> None:
        # A run that ended early leaves the bar the epochs that it will not train.
        self.progress.advance(self.task, (self.settings[run.arm]["epochs"] - self.done) * self.images)
        if status != "finished":
            self.progress.console.print(
                f"{run.arm}, seed {run.seed} {status}: {error}; the study goes on", markup=False, highlight=False
            )

    def _describe(self, run: Run) -> None:
        total = self.settings[run.arm]["epochs"]
        text = f"{run.arm} · seed {run.seed} · epoch {min(self.done + 1, total)}/{total}{self.accuracy}"
        self.progress.update(self.task, description=text)


def choose_device(name: str) -> torch.device:
    """The device of `--device`; `auto` is cuda where there is one. UserError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {name} cannot be used here ({reason}); use auto or cpu.") from error
    return device


def _folder(request: Request, data_name: str) -> Path:
    if request.out is not None:
        return request.out
    return Path("runs") / f"{request.study}-{re.sub(r'[^A-Za-z0-9._-]+', '-', data_name).strip('-.') or 'data'}"


def _check_folder(folder: Path, resume: bool) -> None:
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise UserError(f"--out names a folder, and {part} is a file; choose another --out.")
    if (folder / "journal.sqlite").exists() and not resume:
        raise UserError(f"{folder} already holds a study; go on with it by --resume, or choose another --out.")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, by name, with both values."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += _differences(was, now, f"{prefix}{key} ")
        elif was != now:
            if key == "seeds" and isinstance(was, list) and isinstance(now, list):
                was, now = len(was), len(now)
            found.append(f"{prefix}{key} (there {_plain(was)}, here {_plain(now)})")
    return found


def _plain(value: Any) -> str:
    return "absent" if value is None else "present" if isinstance(value, Mapping) else str(value)


def _open(journal: Journal, study: Study, source: str, settings: dict[str, Any], sha256: str, command: str) -> Recorded:
    """The study's row in the journal, new or, if it is there with the same settings and data, the old one."""
    if not any(recorded.name == study.name for recorded in journal.studies()):
        config = {"description": study.description(), "settings": settings}
        about = {**environment(), "allocator": tune_allocator().reason}
        return journal.create_study(
            study.name, config, source=source, data_sha256=sha256, command=command, environment=about
        )
    recorded = journal.open_study(study.name)
    differ = _differences(recorded.config["settings"], settings)
    if differ:
        raise UserError(
            f"The study in {journal.path.parent} was begun with other settings: {'; '.join(differ)}. Resume it with "
            "its own, or choose another --out."
        )
    return journal.open_study(study.name, data_sha256=sha256)


def _watcher(request: Request, console: Console, settings: Mapping[str, Any], images: int, left: int) -> Any:
    if request.show == "nothing":
        return _Silent()
    if console.is_terminal:
        return _Bar(console, settings, images, left)
    return _Lines(console, settings)


def run_study(request: Request) -> Outcome:
    """Run, or go on with, a study; the journal and the report are in the folder that `request.out` names.

    Everything that can be checked is checked before the folder is made.

    Errors: `UserError` for what the user can mend; `Stopped` on Ctrl-C, when the journal holds every whole epoch.
    """
    study, source = find(request.study)
    if request.norms is not None:
        study = study.with_norms(request.norms)
    overrides = dict(request.overrides or {})
    if request.smoke:
        overrides = {"epochs": 1, "seeds": 1, **{key: value for key, value in overrides.items() if value is not None}}
    plan(study, request.data, overrides)  # wrong numbers are told before the data is loaded
    device = choose_device(request.device)
    if request.out is not None:
        _check_folder(request.out, request.resume)
    console = Console(stderr=True)
    data = load(
        request.data,
        request.data_dir,
        limit=SMOKE_IMAGES if request.smoke else None,
        progress=request.show == "progress" and console.is_terminal,
    )
    n_seeds, arms = plan(study, data.name, overrides)
    folder = _folder(request, data.name)
    _check_folder(folder, request.resume)
    job = Job(study, mixed(data).to(device), arms, device)
    seeds = list(range(n_seeds))
    settings = {
        "data": data.name,
        "data_source": data.source,
        "n_train": len(data.x_train),
        "n_test": len(data.x_test),
        "shape": [data.channels, *data.size],
        "seeds": seeds,
        "device": str(device),
        "engine": request.engine,
        "arms": {name: dict(values) for name, values in arms.items()},
    }
    # A network that cannot be built for these images is told before anything is written.
    for arm in study.arms:
        study.build(arms[arm.name], (data.channels, *data.size), len(data.classes))
    tune_allocator()  # a resumed study trains in a process of its own
    with Journal(folder / "journal.sqlite") as journal:
        recorded = _open(journal, study, source, settings, data.sha256, request.command)
        for seed in seeds:
            for arm in study.arms:
                journal.add_run(recorded.id, arm.name, seed, arms[arm.name])
        left = sum(
            arms[run.arm]["epochs"] - run.epochs
            for run in journal.runs(recorded.id)
            if run.status not in ("finished", "diverged")
        )
        try:
            with _watcher(request, console, arms, len(data.x_train), left) as watcher:
                ENGINES[request.engine](job, journal, recorded.id, watcher)
        except KeyboardInterrupt as error:
            raise Stopped(folder) from error
        page = report.collect(journal)
    if page.failures and all(run.status == "failed" for run in page.runs):
        raise UserError(f"Every run failed, the first with {page.failures[0].error}; nothing to report.")
    return Outcome(folder, report.draw(folder), page)


def print_outcome(outcome: Outcome, console: Console) -> None:
    """The table at the end, the verdict, the failures, and where the report is."""
    page = outcome.page
    table = Table(title=f"{page.study['title']}: test accuracy on {page.settings['data']}", title_justify="left")
    for name in ("arm", "evaluation", "mean ± sd", "95% interval", "n"):
        table.add_column(name, justify="right" if name in ("mean ± sd", "95% interval", "n") else "left")
    for row in page.rows:
        s = row.summary
        mean = "no run finished" if s is None else f"{s.mean:.4f}" + ("" if s.sd is None else f" ± {s.sd:.4f}")
        bounds = f"{s.interval.low:.4f} to {s.interval.high:.4f}" if s and s.interval else "–"
        table.add_row(Text(row.label), row.evaluation, mean, bounds, str(len(row.values)))
    console.print(table)
    for contrast, found, _ in page.verdicts:
        effect = "" if found.effect is None else f" {report.points(found.effect)} points"
        bounds = (
            ""
            if found.interval is None
            else f" ({report.points(found.interval.low)} to {report.points(found.interval.high)})"
        )
        console.print(f"{contrast['text']}:{effect}{bounds}, {found.word}", markup=False, highlight=False)
    for run in page.failures:
        console.print(f"{run.status}: {run.arm}, seed {run.seed}: {run.error}", markup=False, highlight=False)
    console.print(f"Report: {outcome.report}", markup=False, highlight=False, soft_wrap=True)


def _journal(folder: Path) -> Path:
    path = folder / "journal.sqlite"
    if not path.is_file():
        raise UserError(f"There is no journal in {folder} (journal.sqlite); give the folder that --out named.")
    return path


def export_network(folder: Path, number: int, out: Path, *, force: bool = False) -> str:
    """Write the network of a run, as it was after its last epoch, as a checkpoint; a sentence saying what it is.

    The file says how the network is built: `normwright surgery` and `surgery.checkpoint.restore` need no factory.

    Errors: `UserError` if there is no such run, it kept no network, or `out` exists and `force` is not set.
    """
    from ..surgery.checkpoint import refuse_existing, write

    refuse_existing(out, force)
    path = _journal(folder)
    with Journal(path, mode="read") as journal:
        studies = {study.id: study for study in journal.studies()}
        runs = {run.id: run for run in journal.runs()}
        if number not in runs:
            known = f"its runs are {min(runs)} to {max(runs)}" if runs else "it has none yet"
            raise UserError(f"{path} has no run {number}; {known}.")
        run, state = runs[number], journal.checkpoint(number)
    if state is None or "shape" not in state:
        raise UserError(
            f"Run {number} in {path} kept no network (it is {run.status}); networks are kept from the first epoch on, "
            "by this version of normwright: train it again in another folder."
        )
    study = studies[run.study]
    network = {"study": study.name, "arm": run.arm, "seed": run.seed, "settings": run.config}
    network |= {"shape": state["shape"], "classes": state["classes"], "epochs": run.epochs}
    network |= {"data": study.config["settings"]["data"], "data_sha256": study.data_sha256}
    write(out, state["model"], {"network": network})
    return f"Wrote {out}: {study.name}, arm {run.arm}, seed {run.seed}, after {run.epochs} epochs ({run.status})."


def release(folder: Path, study: str) -> int:
    """Give back the runs of a study that other hosts, which must be dead, have marked running; how many."""
    with Journal(_journal(folder), mode="write") as journal:
        return journal.release_runs(journal.open_study(study).id)


def print_runs(folder: Path, console: Console) -> None:
    """A table of the runs in a folder's journal."""
    with Journal(_journal(folder), mode="read") as journal:
        for study in journal.studies():
            table = Table(title=Text(f"{study.name}, begun {study.created}"), title_justify="left")
            for name in ("run", "arm", "seed", "status", "epochs", "train loss", "test accuracy", "error"):
                table.add_column(name)
            for run in journal.runs(study.id):
                epochs = journal.epochs(run.id)
                last = epochs[max(epochs)] if epochs else {}
                loss, accuracy = (f"{last[key]:.4f}" if key in last else "–" for key in ("train_loss", "test_acc"))
                table.add_row(
                    str(run.id), Text(run.arm), str(run.seed), run.status, str(run.epochs), loss, accuracy,
                    Text(run.error or ""),
                )  # fmt: skip
            console.print(table)
