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
from . import analysis, report
from .data import Dataset, load
from .engine import Job, Start, initial, mixed, parts
from .errors import UserError
from .executor import ENGINES, in_process, left
from .figures import as_json, plain
from .journal import Journal, Metrics, Run, environment
from .journal import Study as Recorded
from .study import Concluded, Conclusion, Plan, Study, find, plan

__all__ = [
    "EXECUTORS",
    "Outcome",
    "Request",
    "Stopped",
    "choose_device",
    "export_network",
    "journal_of",
    "print_outcome",
    "print_runs",
    "release",
    "run_study",
]

EXECUTORS = ("here", "ray")
SMOKE_IMAGES = 200  # for training, and as many for testing


@dataclass(frozen=True)
class Request:
    """What is asked of `run_study`.

    `study`: a name or a file; `data`: None takes the study's own; `overrides` are settings by name, None where not
    given, and `settings` such as text, `key=value` (see `study.plan`).
    """

    study: str
    data: str | None = None
    data_dir: Path | None = None
    overrides: Mapping[str, Any] | None = None
    settings: Sequence[str] = ()
    out: Path | None = None
    device: str = "auto"
    resume: bool = False
    smoke: bool = False
    command: str = ""
    show: Literal["progress", "nothing"] = "progress"
    engine: str = "auto"
    executor: str = "here"
    address: str | None = None
    workers: int = 2


@dataclass(frozen=True)
class Outcome:
    """Where the results are, and the page that holds them."""

    folder: Path
    report: Path
    page: analysis.Page

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        places = {"journal": str(self.folder / "journal.sqlite"), "report": str(self.report)}
        return {**analysis.summary(self.page), **places}


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

    def begin(self, runs: Sequence[Run]) -> None: ...
    def trained(self, images: int) -> None: ...
    def epoch(self, run: Run, epoch: int, metrics: Metrics) -> None: ...
    def end(self, run: Run, status: str, error: str | None) -> None: ...
    def say(self, text: str) -> None: ...
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Lines(_Silent):
    """A plain line an epoch, for logs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def epoch(self, run: Run, epoch: int, metrics: Metrics) -> None:
        found = [
            f"{name} {value:.4f}"
            for key, name in (("train_loss", "train loss"), ("test_acc", "test accuracy"))
            if isinstance(value := metrics.get(key), float)
        ]
        self.say(f"{_named(run)}, epoch {epoch + 1}/{run.config.get('epochs', 1)}: {', '.join(found) or 'measured'}")

    def end(self, run: Run, status: str, error: str | None) -> None:
        if status != "finished":
            self.say(f"{_named(run)} {status}: {error}; the study goes on")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Bar(_Silent):
    """A bar with the arm, seeds, epoch and accuracy, the rate and the time left."""

    def __init__(self, console: Console, images: Mapping[int, int]) -> None:
        self.images = images  # of an epoch, by run
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("starting", total=0)
        self.settled = 0  # images of epochs that are recorded, and of those that will not be trained
        self.under_way = 0  # images of the epochs under way
        self.runs: dict[int, Run] = {}
        self.epochs: dict[int, int] = {}  # recorded, of the runs under way
        self.accuracy: dict[int, float] = {}

    def left(self, runs: Sequence[Run]) -> None:
        total = sum((run.config.get("epochs", 1) - run.epochs) * self.images[run.id] for run in runs)
        self.progress.update(self.task, total=total)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def begin(self, runs: Sequence[Run]) -> None:
        # Several groups may be under way at a time, and one may begin again where a worker died.
        self.runs |= {run.id: run for run in runs}
        self.epochs |= {run.id: run.epochs for run in runs}
        self._show()

    def trained(self, images: int) -> None:
        self.under_way += images
        self._show()

    def epoch(self, run: Run, epoch: int, metrics: Metrics) -> None:
        self.epochs[run.id] = epoch + 1
        self._settle(self.images[run.id])
        accuracy = metrics.get("test_acc")
        if isinstance(accuracy, float):
            self.accuracy[run.id] = accuracy
        self._show()

    def end(self, run: Run, status: str, error: str | None) -> None:
        # A run that ended early leaves the bar the epochs that it will not train.
        done = self.epochs.pop(run.id, run.epochs)
        self.settled += (run.config.get("epochs", 1) - done) * self.images[run.id]
        self.runs.pop(run.id, None)
        self.accuracy.pop(run.id, None)
        if not self.runs:
            self.under_way = 0
        self._show()
        if status != "finished":
            self.say(f"{_named(run)} {status}: {error}; the study goes on")

    def _settle(self, images: int) -> None:
        self.settled += images
        self.under_way = max(0, self.under_way - images)

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def _show(self) -> None:
        self.progress.update(self.task, completed=self.settled + max(0, self.under_way))
        runs = list(self.runs.values())
        if not runs:
            return
        arms = list(dict.fromkeys(run.arm for run in runs))
        seeds = sorted({run.seed for run in runs})
        total = runs[0].config.get("epochs", 1)
        accuracy = f" · {sum(self.accuracy.values()) / len(self.accuracy):.3f}" if self.accuracy else ""
        text = (
            f"{arms[0]}{f' and {len(arms) - 1} more' if len(arms) > 1 else ''} · "
            f"seed{'s' if len(seeds) > 1 else ''} {seeds[0]}{f'–{seeds[-1]}' if len(seeds) > 1 else ''} · "
            f"epoch {min(self.epochs[runs[0].id] + 1, total)}/{total}{accuracy}"
        )
        self.progress.update(self.task, description=text)


def _named(run: Run) -> str:
    return f"{run.arm}, seed {run.seed}"


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


def _folder(request: Request, name: str, data_name: str) -> Path:
    if request.out is not None:
        return request.out
    return Path("runs") / "-".join(
        re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.") or "data" for part in (name, data_name)
    )


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
    """The study's row in the journal: new, or the old one if it is there with the same settings and data.

    More seeds and more arms are more of the same, and are taken up; the command is then the new one.
    """

    def known() -> bool:
        return any(recorded.name == study.name for recorded in journal.studies())

    if not known():
        config = {"description": study.description(), "settings": settings}
        about = {**environment(), "allocator": tune_allocator().reason}
        try:
            return journal.create_study(
                study.name, config, source=source, data_sha256=sha256, command=command, environment=about
            )
        except UserError:
            if not known():  # another process was faster
                raise
    recorded = journal.open_study(study.name, data_sha256=sha256)
    old = recorded.config["settings"]
    shared = {
        **settings,
        "seeds": settings["seeds"][: len(old["seeds"])],
        "arms": {arm: values for arm, values in settings["arms"].items() if arm in old["arms"]},
    }
    differ = _differences(old, shared)
    if differ:
        raise UserError(
            f"The study in {journal.path.parent} was begun with other settings: {'; '.join(differ)}. Resume it with "
            "its own, or choose another --out."
        )
    if shared != settings:
        journal.extend_study(recorded.id, {"description": study.description(), "settings": settings}, command)
    return journal.open_study(study.name)


def _data(study: Study, request: Request, progress: bool) -> Dataset:
    name = request.data if request.data is not None else study.data
    limit = SMOKE_IMAGES if request.smoke else None
    if isinstance(name, str):
        return load(name, request.data_dir, limit=limit, progress=progress)
    try:
        found = name()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The data of {study.name} raised {type(error).__name__}: {error}; mend it in its file."
        ) from error
    if not isinstance(found, Dataset):
        raise UserError(
            f"The data of {study.name} is a normwright.lab.data.Dataset or a name; its function returned "
            f"{type(found).__name__}."
        )
    return found.limited(limit)


def _check_networks(job: Job) -> None:
    """Build every arm's network once: what cannot be built for these images is told before anything is written."""
    if job.study.procedure is not None:
        return
    for arm, settings in job.settings.items():
        parts(job.data, settings)
        tuned = {key: values[0] for key, values in job.study.tune.items()}
        try:
            initial(job, Start(0, arm, 0, {**settings, **tuned}))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"build= of {job.study.name} raised for the arm {arm}: {type(error).__name__}: {error}; mend it there."
            ) from error


def run_study(request: Request) -> Outcome:
    """Run, or go on with, a study; the journal and the report are in the folder that `request.out` names.

    Everything that can be checked is checked before the folder is made.

    Errors: `UserError` for what the user can mend; `Stopped` on Ctrl-C, when the journal holds every whole epoch.
    """
    for option, value, known in (("--engine", request.engine, ENGINES), ("--executor", request.executor, EXECUTORS)):
        if value not in known:
            raise UserError(f"{option} is one of {', '.join(known)}; got {value!r}.")
    study, source = find(request.study)
    overrides = dict(request.overrides or {})
    if request.smoke:
        given = {key: value for key, value in overrides.items() if value is not None}
        overrides = {"epochs": 1, "seeds": 1, **study.smoke, **given}
    plan(study, str(request.data or study.data), overrides, request.settings)  # told before the data is loaded
    device = choose_device(request.device)
    if request.out is not None:
        _check_folder(request.out, request.resume)
    console = Console(stderr=True)
    data = _data(study, request, request.show == "progress" and console.is_terminal)
    wanted = plan(study, data.name, overrides, request.settings)
    study = wanted.study
    folder = _folder(request, study.name, data.name)
    _check_folder(folder, request.resume)
    job = Job(study, mixed(data).to(device), wanted.arms, device)
    _check_networks(job)
    tune_allocator()  # a resumed study trains in a process of its own
    with Journal(folder / "journal.sqlite") as journal:
        recorded = _open(journal, study, source, _settings(request, job, wanted), data.sha256, request.command)
        for arm, seed, settings in wanted.runs():
            journal.add_run(recorded.id, arm, seed, settings)
        try:
            with _watcher(request, console, job, left(journal, recorded.id)) as watcher:
                if request.executor == "ray":
                    from .ray_executor import ray_cluster

                    ray_cluster(job, journal, recorded.id, request.engine, watcher, request.address, request.workers)
                else:
                    in_process(job, journal, recorded.id, request.engine, watcher)
                _conclude(job, journal, recorded.id, watcher)
        except KeyboardInterrupt as error:
            raise Stopped(folder) from error
        page = analysis.collect(journal)
    if page.failures and all(run.status == "failed" for run in page.runs):
        raise UserError(f"Every run failed, the first with {page.failures[0].error}; nothing to report.")
    return Outcome(folder, report.draw(folder), page)


def _settings(request: Request, job: Job, wanted: Plan) -> dict[str, Any]:
    """What the journal keeps of how a study was run, and what `--resume` must repeat."""
    data = job.data
    return {
        "data": data.name,
        "data_source": data.source,
        "n_train": len(data.x_train),
        "n_test": len(data.x_test),
        "shape": [data.channels, *data.size],
        "seeds": list(range(wanted.seeds)),
        "device": str(job.device),
        "engine": request.engine,
        "arms": {name: dict(values) for name, values in wanted.arms.items()},
        "tune": {key: list(values) for key, values in wanted.study.tune.items()},
    }


def _watcher(request: Request, console: Console, job: Job, runs: Sequence[Run]) -> Any:
    if request.show == "nothing":
        return _Silent()
    if not console.is_terminal:
        return _Lines(console)
    images = {
        run.id: len(job.data.x_train) if job.study.procedure else len(parts(job.data, run.config).x) for run in runs
    }
    bar = _Bar(console, images)
    bar.left(runs)
    return bar


def _conclude(job: Job, journal: Journal, study: int, watcher: Any) -> None:
    """Let the study look at its runs once the last has ended, and keep what it found."""
    runs = journal.runs(study)
    if job.study.conclude is None or any(run.status in ("pending", "running", "interrupted") for run in runs):
        return
    watcher.say("concluding")
    conclusion = Conclusion(
        job.study, job.data, job.device, analysis.counted(runs, job.study.tune), journal.epochs, journal.checkpoint
    )
    try:
        with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
            torch.manual_seed(0)
            found = job.study.conclude(conclusion)
        if not isinstance(found, Concluded):
            raise TypeError(f"conclude returns normwright.lab.study.Concluded, not {type(found).__name__}")
        results = {name: {str(seed): dict(m) for seed, m in each.items()} for name, each in found.results.items()}
        figures = [as_json(figure) for figure in found.figures]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"All runs are recorded, but conclude= of {job.study.name} raised {type(error).__name__}: {error}; mend it "
            "and go on by --resume."
        ) from error
    journal.store(study, "conclusion", {"results": plain(results), "figures": figures})


def print_outcome(outcome: Outcome, console: Console) -> None:
    """The table at the end, the verdicts, the failures, and where the report is."""
    page = outcome.page
    table = Table(title=Text(f"{page.study['title']}, on {page.settings['data']}"), title_justify="left")
    for name in ("arm", "metric", "mean ± sd", "95% interval", "n"):
        table.add_column(name, justify="right" if name in ("mean ± sd", "95% interval", "n") else "left")
    for row in page.rows:
        s = row.summary
        mean = "no run finished" if s is None else f"{s.mean:.4g}" + ("" if s.sd is None else f" ± {s.sd:.2g}")
        bounds = f"{s.interval.low:.4g} to {s.interval.high:.4g}" if s and s.interval else "–"
        table.add_row(Text(row.label), Text(row.evaluation), mean, bounds, str(len(row.values)))
    console.print(table)
    for contrast, found, _ in page.verdicts:
        metric, interval = page.metric(contrast["first"][1]), found.interval
        points = " points" if metric.form == "share" else ""
        effect = "" if found.effect is None else f" {report.effect(found.effect, metric)}{points}"
        bounds = ""
        if interval is not None:
            bounds = f" ({report.effect(interval.low, metric)} to {report.effect(interval.high, metric)})"
        said = f"{effect}{bounds}," if effect else ""
        line = f"{contrast['text']}:{said} {found.word}"
        console.print(line if found.word != "undecided" else f"{line}. {found.reason}", markup=False, highlight=False)
    for run in page.failures:
        console.print(f"{run.status}: {run.arm}, seed {run.seed}: {run.error}", markup=False, highlight=False)
    console.print(f"Report: {outcome.report}", markup=False, highlight=False, soft_wrap=True)


def journal_of(folder: Path) -> Path:
    """The journal in the folder that --out named; UserError if there is none."""
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
    path = journal_of(folder)
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
    with Journal(journal_of(folder), mode="write") as journal:
        return journal.release_runs(journal.open_study(study).id)


def print_runs(folder: Path, console: Console) -> None:
    """A table of the runs in a folder's journal."""
    with Journal(journal_of(folder), mode="read") as journal:
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
