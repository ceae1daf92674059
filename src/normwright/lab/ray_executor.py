"""Training on a Ray cluster: workers train, and this process alone writes the journal.

A worker is an actor. It takes the job (data, study and engine, sent to the object store once) when it starts, and then
trains one group of runs at a time, in a thread, so that it never waits for the journal: what the engine yields is
fetched by `poll`, in order. A worker that dies (killed, out of memory, its machine gone) takes with it what it had not
handed over, which the journal never saw: the group goes on, on the next free worker, from its last checkpoints.

The other machines need the same versions of Python, Ray and normwright. The file of a user's own study, and modules
from its folder, travel by value; anything else that it imports must be installed there.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import sysconfig
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch

from ..allocator import tune_allocator
from .engine import End, Engine, Epoch, Event, Job, Start
from .errors import UserError
from .executor import Watcher, engine_for, groups, left, record, starts
from .journal import Journal, Run

__all__ = ["ray_cluster"]

LOSSES = 3  # workers that a group of runs may lose in a row without an epoch in between
ANSWER = 5.0  # seconds for an address to answer; Ray 2.60 by itself tries for two minutes
POLL = 0.5  # seconds that a worker collects progress before it reports
AHEAD = 64  # reports that a worker keeps while the journal is slow; each may hold a group's checkpoints


@dataclass(frozen=True)
class _Raised:
    """What the engine raised; `users`: it is a `UserError`, which ends the study."""

    text: str
    users: bool = False


# What a worker reports, in order: images trained, events to record as one transaction, and at the end of a group what
# was raised or None.
Report: TypeAlias = "int | Sequence[Event] | _Raised | None"


class _Worker:
    """Lives in a process of the cluster and trains one group of runs at a time."""

    def __init__(self, job: Job, threads: int) -> None:
        tune_allocator()
        self._job = replace(job, data=job.data.to(job.device))
        self._threads = threads
        self._reports: queue.Queue[Report] = queue.Queue(AHEAD)

    def ready(self) -> list[Report]:
        return []

    def begin(self, engine: Engine, starts: Sequence[Start]) -> list[Report]:
        threading.Thread(target=self._train, args=(engine, starts), daemon=True).start()
        return []

    def _train(self, engine: Engine, starts: Sequence[Start]) -> None:
        torch.set_num_threads(self._threads)  # here, since OpenMP keeps the number by thread
        try:
            for events in engine(self._job, starts, self._reports.put):
                self._reports.put([_copied(event) for event in events])
        except UserError as error:
            self._reports.put(_Raised(str(error), users=True))
        except Exception as error:
            self._reports.put(_Raised(f"{type(error).__name__}: {error}"))
        else:
            self._reports.put(None)

    def poll(self) -> list[Report]:
        """What happened since the last poll, up to the next events or the end; after a while, the images alone."""
        found: list[Report] = []
        images, deadline = 0, time.monotonic() + POLL
        while (wait := deadline - time.monotonic()) > 0:
            try:
                report = self._reports.get(timeout=wait)
            except queue.Empty:
                break
            if not isinstance(report, int):
                found.append(report)
                break
            images += report
        return [images, *found]


def _copied(event: Event) -> Event:
    """The event with tensors of its own, on the CPU: training goes on in place before they are fetched."""
    if isinstance(event, Epoch):
        return replace(event, checkpoint=_copy(event.checkpoint))
    return replace(event, trained=_copy(event.trained))


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


@dataclass
class _Group:
    """Runs that are trained together; `under_way` are those that are claimed and have not ended."""

    runs: Sequence[Run]
    under_way: dict[int, Run] = field(default_factory=dict)
    losses: int = 0
    unrecorded: int = 0  # images reported since the last events

    def claim(self, journal: Journal) -> list[Start]:
        claimed = journal.claim_runs(self.runs[0].study, [run.id for run in self.runs], retry_failed=True)
        self.under_way = {run.id: run for run in claimed}
        return starts(journal, claimed)

    def give_back(self, journal: Journal) -> None:
        journal.record([End(number, "interrupted", None, {}, None) for number in self.under_way])
        self.under_way = {}


@dataclass
class _Member:
    """A worker, the one call to it that is under way, and the group that it trains."""

    worker: Any
    call: Any
    group: _Group | None = None


class _Driver:
    """Hands groups to workers, records what they report, and replaces the workers that die."""

    def __init__(
        self, ray: ModuleType, spawn: Callable[[], Any], waiting: Sequence[Sequence[Run]], journal: Journal,
        watcher: Watcher,
    ) -> None:  # fmt: skip
        self._ray, self._spawn, self._journal, self._watcher = ray, spawn, journal, watcher
        self._waiting = deque(map(_Group, waiting))
        self._crew: list[_Member] = []
        self._stillborn = 0  # workers in a row that died before they were ready

    def run(self, workers: int) -> None:
        try:
            for _ in range(min(workers, len(self._waiting))):
                self._hire()
            # A worker for which the cluster has no room yet keeps nobody waiting.
            while self._waiting or any(member.group for member in self._crew):
                done, _ = self._ray.wait([member.call for member in self._crew], num_returns=1)
                member = next(member for member in self._crew if member.call == done[0])
                self._go_on(member)
        finally:
            for member in self._crew:
                self._ray.kill(member.worker)
                if member.group is not None:
                    member.group.give_back(self._journal)

    def _hire(self) -> None:
        worker = self._spawn()
        self._crew.append(_Member(worker, worker.ready.remote()))

    def _dismiss(self, member: _Member) -> None:
        self._crew.remove(member)
        self._ray.kill(member.worker)

    def _go_on(self, member: _Member) -> None:
        """See what a worker's call brought, and give the worker its next."""
        try:
            reports = self._ray.get(member.call)
        except self._ray.exceptions.RayTaskError as error:
            # What the engine yielded cannot be sent; the engine may be training on.
            self._give_up(member, f"{type(error.cause).__name__}: {error.cause}")
            self._dismiss(member)
            if self._waiting:
                self._hire()
            return
        except self._ray.exceptions.RayError as error:
            self._lost(member, error)
            return
        self._stillborn = 0
        for report in reports:
            self._take(member, report)
        if member.group is None:
            self._assign(member)
        else:
            member.call = member.worker.poll.remote()

    def _assign(self, member: _Member) -> None:
        """Give a worker the next group, or let it go."""
        while self._waiting:
            group = member.group = self._waiting.popleft()
            begin = group.claim(self._journal)
            if begin:  # else other processes have all its runs
                self._watcher.begin(list(group.under_way.values()))
                member.call = member.worker.begin.remote(engine_for(begin), begin)
                return
        member.group = None
        self._dismiss(member)

    def _take(self, member: _Member, report: Report) -> None:
        group = member.group
        assert group is not None
        if isinstance(report, int):
            group.unrecorded += report
            self._watcher.trained(report)
        elif isinstance(report, _Raised):
            if report.users:
                raise UserError(report.text)
            self._give_up(member, report.text)
        elif report is None:
            self._give_up(member, "The engine came to its end without that of the run.")
        else:
            ended = record(self._journal, report, group.under_way, self._watcher)
            for number in ended:
                del group.under_way[number]
            group.losses = group.unrecorded = 0

    def _give_up(self, member: _Member, why: str) -> None:
        """The member's group is over: a run that has not ended fails, and of several each is trained by itself."""
        group, member.group = member.group, None
        assert group is not None
        if len(group.under_way) == 1:
            (run,) = group.under_way.values()
            self._journal.fail_run(run.id, why)
            self._watcher.end(run, "failed", why)
        elif group.under_way:
            rest = list(group.under_way.values())
            self._watcher.say(f"{len(rest)} networks together: {why}; each is trained by itself")
            group.give_back(self._journal)
            self._waiting.extendleft(_Group([run]) for run in reversed(rest))

    def _lost(self, member: _Member, error: Exception) -> None:
        """Replace a worker that died; its group waits for the next free one."""
        self._crew.remove(member)
        why = _sentence(error)
        if (group := member.group) is None:
            self._stillborn += 1
            if self._stillborn == LOSSES:
                raise UserError(
                    f"No worker of the Ray cluster could start, {LOSSES} in a row, the last: {why}; check that its "
                    "machines have this normwright installed."
                )
        else:
            self._watcher.trained(-group.unrecorded)
            group.unrecorded = 0
            group.losses += 1
            if group.losses == LOSSES:
                self._give_up(member, f"{LOSSES} workers in a row died before an epoch was over, the last: {why}")
            else:
                names = ", ".join(f"{run.arm} seed {run.seed}" for run in group.under_way.values())
                self._watcher.say(f"A worker died ({why}); {names} goes on from the last whole epoch")
                group.give_back(self._journal)
                self._waiting.appendleft(group)
        if self._waiting:
            self._hire()


def _sentence(error: Exception) -> str:
    """What Ray says of a death, without its identifiers, tracebacks and guesses."""
    lines = [line for line in str(error).splitlines() if line and not line[0].isspace()] or [type(error).__name__]
    # After a heading; what a worker raised when it started is the last line of a traceback.
    line = lines[-1] if getattr(error, "actor_init_failed", False) else lines[min(1, len(lines) - 1)]
    return line.partition(". ")[0].rstrip(".")


def ray_cluster(
    job: Job,
    journal: Journal,
    study: int,
    engine: str,
    watcher: Watcher,
    address: str | None = None,
    workers: int = 2,
) -> None:
    """Train every run of the study that is left on a Ray cluster, group by group, so many groups at a time.

    Engines run on the workers, and this process records what they yield, one transaction a list. Each worker has its
    share of the cluster's cores (and GPUs, if the job's device is one) and as many threads. Runs that diverge or raise
    are recorded as in `in_process`; those whose worker dies go on from their last checkpoints, and fail after three
    deaths without an epoch in between. An interrupt gives the runs under way back to the journal and is raised again.

    Arguments:
        engine: "auto", "packed" or "sequential".
        address: of a running cluster: `auto`, `HOST:PORT` or `ray://HOST:PORT`. None: the one that this process is
            connected to already, else one on this machine that is started and stopped here.
        workers: at most as many as the cluster has CPUs are used.

    Errors: `UserError` without Ray, for an address that does not answer, a cluster without CPUs, a study that cannot
    be sent, where no worker starts, and as `in_process`.
    """
    ray = _import_ray()
    waiting = groups(job, left(journal, study), engine, watcher)
    if not waiting:
        return
    with _connected(ray, job, address, workers):
        workers, resources, threads = _shares(ray, workers, job.device)
        sent = _sent(ray, job)
        actor = ray.remote(_Worker).options(**resources)
        _Driver(ray, lambda: actor.remote(sent, threads), waiting, journal, watcher).run(workers)


def _import_ray() -> ModuleType:
    # Ray reads these once. It reports its use to its makers unless told not to, and prints what befell a worker to
    # standard output, which `--json` needs for itself, also with log_to_driver=False.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "(?s).")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(
            f"--executor ray needs {error.name}, which is not installed: pip install 'normwright[ray]'."
        ) from error
    return ray


@contextmanager
def _connected(ray: ModuleType, job: Job, address: str | None, workers: int) -> Iterator[None]:
    """Connected to the cluster; on leaving, what was connected or started here is disconnected or stopped."""
    if ray.is_initialized() and address is None:
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        data = sum(t.nbytes for t in (job.data.x_train, job.data.y_train, job.data.x_test, job.data.y_test))
        quiet |= {"address": "local", "include_dashboard": False, "num_cpus": max(workers, _cores())}
        # The job once, and the checkpoints that are on their way; Ray takes a third of the machine's memory otherwise.
        quiet["object_store_memory"] = 2 * data + 256 * 2**20
    else:
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS", address)
        _check_answers(address)
        quiet["address"] = address
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is in the error
            ray.init(**quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if address is None:
            says, advice = "No Ray cluster could be started on this machine", "train here by --executor here"
        else:
            says = f"--address {address} cannot be used"
            advice = (
                "check that it is a Ray cluster with the same versions of Python and Ray, set RAY_AUTH_MODE=token if "
                "it asks for a token, or leave --address away for a cluster on this machine"
            )
        raise UserError(f"{says} ({_first_line(error)}); {advice}.") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """UserError for what is no address, or if nothing listens there; what `auto` finds is Ray's to judge."""
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"--address is auto, HOST:PORT or ray://HOST:PORT; got {address!r}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"No Ray cluster answers at --address {address} ({reason}); start one there by `ray start --head`, or "
            "leave --address away for one on this machine."
        ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shares(ray: ModuleType, workers: int, device: torch.device) -> tuple[int, dict[str, Any], int]:
    """How many workers find room at once, what each takes of its machine, and its threads."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in nodes]
    workers = min(workers, sum(cores))
    if not workers:
        raise UserError("The Ray cluster has no CPU to give; start a node by `ray start` with --num-cpus.")
    # The largest share of which as many fit onto the machines.
    each = max(share for share in range(1, max(cores) + 1) if sum(n // share for n in cores) >= workers)
    resources: dict[str, Any] = {"num_cpus": each}
    if device.type == "cuda":
        gpus = sum(node.get("GPU", 0) for node in nodes)
        if not gpus:
            raise UserError("The Ray cluster has no GPU to give; use --device cpu.")
        resources["num_gpus"] = min(1.0, gpus / workers)
    return workers, resources, each


def _sent(ray: ModuleType, job: Job) -> Any:
    """The job in the object store, the user's own functions by value."""
    # Ray shows a worker its own GPUs only, so that the first is meant.
    job = replace(job, data=job.data.to("cpu"), device=torch.device(job.device.type))
    cloudpickle = ray.cloudpickle
    known = cloudpickle.list_registry_pickle_by_value()
    modules = [module for module in _own_modules(vars(job.study).values()) if module.__name__ not in known]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return ray.put(job)
    except (TypeError, AttributeError, cloudpickle.pickle.PicklingError) as error:
        raise UserError(
            f"The study {job.study.name} cannot be sent to Ray's workers ({_first_line(error)}); keep open files, "
            "locks and generators out of its functions, or train it here by --executor here."
        ) from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _own_modules(values: Iterable[Any]) -> list[ModuleType]:
    """The user's modules that define one of the functions, and all that were imported from the same folders."""
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    installed.add(Path(__file__).resolve().parents[1])

    def folder(module: ModuleType | None) -> Path | None:
        file = getattr(module, "__file__", None)
        parents = [] if file is None else Path(file).resolve().parents
        return None if not parents or installed.intersection(parents) else parents[0]

    functions = [getattr(value, "func", value) for value in values if callable(value)]  # also of functools.partial
    folders = {folder(sys.modules.get(getattr(function, "__module__", ""))) for function in functions} - {None}
    return [
        module
        for name, module in list(sys.modules.items())
        if name == getattr(module, "__name__", None) != "__main__" and folder(module) in folders
    ]
