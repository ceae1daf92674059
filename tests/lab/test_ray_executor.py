"""The Ray executor: a cluster gives what one process gives, whatever happens to its workers."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from normwright.lab import engine, ray_executor
from normwright.lab.data import Dataset
from normwright.lab.errors import UserError
from normwright.lab.executor import in_process
from normwright.lab.journal import Journal
from normwright.lab.ray_executor import ray_cluster
from normwright.lab.study import Arm, Contrast, Study, find

ray = ray_executor._import_ray()
# Ray's workers give way to all else (niceness 15): beside other tests they would take a minute to start.
# Read by each cluster that starts here, also in a process of its own.
os.environ.setdefault("RAY_worker_niceness", "0")


def build(settings, shape, classes):
    if settings.get("raises"):
        raise RuntimeError("the factory fell over")
    model = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 12))
    if settings["norm"] == "bn":
        model.append(nn.BatchNorm1d(12))
    return model.extend([nn.Sigmoid(), nn.Dropout(0.2), nn.Linear(12, classes)])


def observe(moment):
    if moment.settings.get("dies") == moment.epoch:
        os.kill(os.getpid(), signal.SIGKILL)
    if moment.settings.get("cannot_be_sent"):
        return {"lock": threading.Lock()}
    if "meet" in moment.settings and moment.epoch == 0:
        # Goes on when two processes are here, which shows that two train at once.
        open(os.path.join(moment.settings["meet"], str(os.getpid())), "w").close()
        deadline = time.monotonic() + 60
        while len(os.listdir(moment.settings["meet"])) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    return {"pid": os.getpid(), "threads": torch.get_num_threads()}


STUDY = Study(
    name="tiny",
    title="Tiny",
    question="?",
    claim="!",
    source="",
    arms=(Arm("bn", "with", {"norm": "bn"}), Arm("none", "without", {"norm": "none"})),
    build=build,
    observe=observe,
    contrasts=(Contrast("with against without", ("bn", "test_acc"), ("none", "test_acc")),),
    fixed={"epochs": 4, "batch_size": 16, "optimizer": "sgd"},
    nuisance={"lr": 0.5},
)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(3, 1, 4, 4, generator=generator)

    def draw(n):
        y = torch.arange(n) % 3
        return centres[y] + 0.3 * torch.randn(n, 1, 4, 4, generator=generator), y

    (x_train, y_train), (x_test, y_test) = draw(100), draw(50)
    return Dataset("blobs", x_train, y_train, x_test, y_test, ("a", "b", "c"), "made up", "0" * 64)


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=10**8,
        log_to_driver=False,
        logging_level="error",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


class Watcher:
    """Counts; `at_epoch` is called with every epoch."""

    def __init__(self, at_epoch=lambda run, epoch, metrics: None):
        self.images, self.begun, self.epochs, self.ends, self.said = 0, [], [], [], []
        self.at_epoch = at_epoch

    def begin(self, runs):
        self.begun.append([run.id for run in runs])

    def say(self, text):
        self.said.append(text)

    def trained(self, images):
        self.images += images

    def epoch(self, run, epoch, metrics):
        self.epochs.append((run.id, epoch))
        self.at_epoch(run, epoch, metrics)

    def end(self, run, status, error):
        self.ends.append((run.id, status))


def prepared(path, data, study=STUDY, seeds=(0, 1), **arms):
    """A job, a new journal with its runs, and the study's number there; `arms`: more settings by arm."""
    settings = {
        arm.name: {**study.fixed, **study.nuisance, **arm.settings, **arms.get(arm.name, {})} for arm in study.arms
    }
    job = engine.Job(study, data, settings, torch.device("cpu"))
    journal = Journal(path)
    number = journal.create_study("tiny", {}, environment={}).id
    for seed in seeds:
        for arm in study.arms:
            journal.add_run(number, arm.name, seed, settings[arm.name])
    return job, journal, number


def recorded(journal):
    """All that is recorded of all runs but times and processes, the trained networks included."""
    return [
        (run.arm, run.seed, run.status, run.error, [comparable(m) for m in journal.epochs(run.id).values()])
        for run in journal.runs()
    ] + [
        {key: value.tolist() for key, value in (journal.checkpoint(run.id) or {"model": {}})["model"].items()}
        for run in journal.runs()
    ]


def comparable(metrics):
    return {key: value for key, value in metrics.items() if "seconds" not in key and "pid" not in key}


def pids(journal, run):
    return [metrics["pid"] for metrics in journal.epochs(run).values()]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """What one process with one thread records, by engine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name in ("sequential", "packed"):
        job, journal, study = prepared(tmp_path_factory.mktemp(name) / "journal.sqlite", data)
        with journal:
            in_process(job, journal, study, name, Watcher())
            found[name] = recorded(journal)
    torch.set_num_threads(threads)
    return found


@pytest.mark.slow
def test_two_workers_give_what_one_process_gives(tmp_path, data, cluster, undisturbed):
    (tmp_path / "meet").mkdir()
    meet = {"meet": str(tmp_path / "meet")}
    job, journal, study = prepared(tmp_path / "journal.sqlite", data, bn=meet, none=meet)
    with journal:
        watcher = Watcher()
        ray_cluster(job, journal, study, "sequential", watcher)
        assert recorded(journal) == undisturbed["sequential"]
        assert {metrics["threads"] for run in range(1, 5) for metrics in journal.epochs(run).values()} == {1}
        used = {pid for run in range(1, 5) for pid in pids(journal, run)}
        assert len(used) == 2
        assert os.getpid() not in used
        assert watcher.images == 4 * 4 * 100
        assert sorted(watcher.epochs) == [(run, epoch) for run in range(1, 5) for epoch in range(4)]
        assert sorted(watcher.ends) == [(run, "finished") for run in range(1, 5)]
        assert [run.results["test_acc"] for run in journal.runs()] == [
            journal.epochs(run.id)[3]["test_acc"] for run in journal.runs()
        ]
        again = Watcher()
        ray_cluster(job, journal, study, "sequential", again)
        assert (again.begun, again.images) == ([], 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "when"), [("sequential", (1, 2)), ("packed", (1,))])
def test_workers_killed_half_way_lose_nothing(tmp_path, data, cluster, undisturbed, monkeypatch, capfd, name, when):
    monkeypatch.setattr(ray_executor, "LOSSES", 2)  # in a row: there is an epoch between the two deaths
    killed = []

    def kill(run, epoch, metrics):
        if run.id == 1 and epoch in when:
            killed.append(metrics["pid"])
            os.kill(metrics["pid"], signal.SIGKILL)

    job, journal, study = prepared(tmp_path / "journal.sqlite", data)
    with journal:
        watcher = Watcher(kill)
        ray_cluster(job, journal, study, name, watcher)
        assert recorded(journal) == undisturbed[name]
        assert len(killed) == len(when)
        used = pids(journal, 1)
        assert used[0] == used[1] == killed[0]
        assert used[when[-1]] == killed[-1]
        assert used[3] not in killed
        assert sorted(watcher.epochs) == [(run, epoch) for run in range(1, 5) for epoch in range(4)]
        for number in range(1, 5):
            assert [epoch for run, epoch in watcher.epochs if run == number] == [0, 1, 2, 3]
        assert sorted(watcher.ends) == [(run, "finished") for run in range(1, 5)]
        assert watcher.images == 4 * 4 * 100  # what the dead worker had begun is taken back
        goes_on = "bn seed 0" if name == "sequential" else "bn seed 0, bn seed 1"
        died = "A worker died (The actor is dead because its worker process has died)"
        assert watcher.said == [f"{died}; {goes_on} goes on from the last whole epoch"] * len(when)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_runs_that_cannot_go_on_fail_alone(tmp_path, data, cluster):
    arms = tuple(Arm(name, name, {"norm": "none"}) for name in ("good", "raises", "cannot_be_sent", "dies"))
    study = replace(STUDY, arms=arms)
    settings = {"raises": {"raises": True}, "cannot_be_sent": {"cannot_be_sent": True}, "dies": {"dies": 0}}
    job, journal, number = prepared(tmp_path / "journal.sqlite", data, study, seeds=(0,), **settings)
    job = replace(job, settings={**job.settings, "raises": {**job.settings["raises"], "raises": True}})
    with journal:
        watcher = Watcher()
        ray_cluster(job, journal, number, "sequential", watcher)
        good, raises, cannot_be_sent, dies = journal.runs()
        assert (good.status, good.error, good.epochs) == ("finished", None, 4)
        assert (raises.status, raises.error) == ("failed", "RuntimeError: the factory fell over")
        assert cannot_be_sent.status == "failed"
        assert "cannot pickle '_thread.lock' object" in cannot_be_sent.error
        assert dies.status == "failed"
        assert dies.error.startswith("3 workers in a row died before an epoch was over, the last: ")
        assert "\n" not in dies.error
        assert watcher.begun.count([dies.id]) == 3
        assert sorted(watcher.ends) == [(1, "finished"), (2, "failed"), (3, "failed"), (4, "failed")]
        assert watcher.images == 4 * 100
        assert len(journal.runs(status="running")) == 0


@pytest.mark.slow
def test_packed_networks_that_raise_together_train_alone(tmp_path, data, cluster):
    # Alike runs, of which the second seed's alone raises.
    study = replace(STUDY, observe=partial(observe_unless, seed=1))
    job, journal, number = prepared(tmp_path / "journal.sqlite", data, replace(study, arms=study.arms[:1]))
    with journal:
        watcher = Watcher()
        ray_cluster(job, journal, number, "packed", watcher)
        assert [(run.status, run.error) for run in journal.runs()] == [
            ("finished", None),
            ("failed", "ValueError: not this one"),
        ]
        assert watcher.begun == [[1, 2], [1], [2]]
        assert watcher.said == ["2 networks together: ValueError: not this one; each is trained by itself"]


def observe_unless(moment, seed):
    if moment.seed == seed:
        raise ValueError("not this one")
    return {}


OWN = """
    import os, time
    from my_layers import Scaled
    from torch import nn
    from normwright.lab.study import Arm, Contrast, Study

    def build(settings, shape, classes):
        return nn.Sequential(nn.Flatten(), Scaled(2.0), nn.Linear(shape[0] * shape[1] * shape[2], classes))

    def observe(moment):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return {}

    STUDY = Study(
        name="own", title="Own", question="?", claim="!", source="", build=build, observe=observe,
        arms=(Arm("one", "one", {"lr": 0.1}), Arm("two", "two", {"lr": 0.2})),
        contrasts=(Contrast("two against one", ("two", "test_acc"), ("one", "test_acc")),),
        fixed={"epochs": 5, "batch_size": 256, "optimizer": "sgd"}, nuisance={"lr": 0.1}, seeds=2,
    )
"""
LAYERS = """
    from torch import nn

    class Scaled(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return self.by * x
"""


@pytest.fixture
def own_file(tmp_path):
    """A user's study with a module beside it."""
    file = tmp_path / "own" / "my_study.py"
    file.parent.mkdir()
    file.write_text(textwrap.dedent(OWN))
    (file.parent / "my_layers.py").write_text(textwrap.dedent(LAYERS))
    yield file
    for name in ("my_layers", "normwright_study_my_study"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_users_own_study_travels_by_value(tmp_path, data, cluster, own_file):
    study, _ = find(str(own_file))
    for file in own_file.parent.glob("*.py"):
        file.unlink()  # workers on another machine would not have it
    job, journal, number = prepared(tmp_path / "journal.sqlite", data, study)
    with journal:
        ray_cluster(job, journal, number, "sequential", Watcher())
        assert [(run.status, run.error) for run in journal.runs()] == [("finished", None)] * 4
        found = recorded(journal)
    assert not ray.cloudpickle.list_registry_pickle_by_value()
    job, journal, number = prepared(tmp_path / "here.sqlite", data, study)
    torch.set_num_threads(1)
    with journal:
        in_process(job, journal, number, "sequential", Watcher())
        assert recorded(journal) == found


def test_what_is_installed_travels_by_name(own_file):
    study, _ = find(str(own_file))
    named = [module.__name__ for module in ray_executor._own_modules([study.build, nn.Linear, partial(print), replace])]
    assert sorted(named) == ["my_layers", "normwright_study_my_study"]
    assert ray_executor._own_modules([find("lenet")[0].build]) == []
    partially = [module.__name__ for module in ray_executor._own_modules([partial(study.build, {})])]
    assert sorted(partially) == sorted(named)


COMMAND = """
    import signal, sys
    from normwright.cli import main
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    main()
"""


@pytest.mark.slow
def test_stopped_on_a_cluster_of_its_own_and_resumed_on_another(tmp_path, cluster, own_file):
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(COMMAND), "study", str(own_file), "--executor", "ray"]
    command += ["--engine", "sequential", "--out", str(out), "--json", "--data", "digits"]
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
        env={**os.environ, "PAUSE": "2"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while first.poll() is None and time.monotonic() < deadline and not trained_epochs(out):
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGINT)  # as Ctrl-C does: Ray's processes of this session get it too
        output, errors = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 130, errors
    assert errors.startswith("Stopped; every whole epoch is in")
    assert (output, errors.count("\n")) == ("", 1)
    with Journal(out / "journal.sqlite", mode="read") as journal:
        statuses = [run.status for run in journal.runs()]
        epochs = sum(run.epochs for run in journal.runs())
    assert "running" not in statuses
    assert "interrupted" in statuses
    assert not processes_of_session(first.pid)
    second = subprocess.run(
        [*command, "--resume", "--address", cluster],
        capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False,
    )  # fmt: skip
    assert (second.returncode, second.stderr) == (0, "")
    assert json.loads(second.stdout)
    with Journal(out / "journal.sqlite", mode="read") as journal:
        assert {run.status for run in journal.runs()} == {"finished"}
        assert {run.epochs for run in journal.runs()} == {5}
    assert 0 < epochs < 20


def trained_epochs(out):
    if not (out / "journal.sqlite").exists():
        return 0
    try:
        with Journal(out / "journal.sqlite", mode="read") as journal:
            return sum(run.epochs for run in journal.runs())
    except UserError:  # it is just being made
        return 0


def processes_of_session(session):
    """Processes that live in the session, once those that are ending had time to."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        listed = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-g", str(session)], capture_output=True, text=True)
        lines = [line for line in listed.stdout.splitlines() if line.split()[1][0] != "Z"]
        if not lines:
            return []
        time.sleep(0.2)
    return lines


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")


def test_what_a_worker_hands_over_does_not_change_with_training(data):
    weights, go_on = torch.zeros(3), threading.Event()

    def count(job, starts, tick):
        for epoch in range(2):
            tick(60)
            weights.add_(1)
            tick(40)
            yield [engine.Epoch(1, epoch, {}, {"model": {"w": weights}, "groups": [{"lr": 0.1, "m": weights}]})]
        yield [engine.End(1, "finished", None, {}, {"model": {"w": weights}})]
        weights.fill_(9)
        go_on.set()

    worker = ray_executor._Worker(engine.Job(STUDY, data, {}, torch.device("cpu")), 1)
    assert worker.begin(count, []) == []
    assert go_on.wait(10)
    reports = [worker.poll() for _ in range(4)]
    assert [report[0] for report in reports] == [100, 100, 0, 0]
    (first,), (second,), (end,) = (report[1] for report in reports[:3])
    assert (first.checkpoint["model"]["w"].tolist(), second.checkpoint["model"]["w"].tolist()) == ([1] * 3, [2] * 3)
    assert first.checkpoint["groups"][0]["m"].tolist() == [1] * 3
    assert end.trained["model"]["w"].tolist() == [2] * 3
    assert reports[3] == [0, None]


class Scripted:
    """A worker that says what it is told to; an exception is raised."""

    def __init__(self, ready, polls=()):
        says = iter(polls)
        self.ready = SimpleNamespace(remote=lambda: ready)
        self.begin = SimpleNamespace(remote=lambda engine, starts: [])
        self.poll = SimpleNamespace(remote=lambda: next(says))


def scripted_ray(killed):
    def get(call):
        if isinstance(call, Exception):
            raise call
        return call

    def wait(calls, num_returns):
        return calls[:1], calls[1:]

    return SimpleNamespace(wait=wait, get=get, kill=killed.append, exceptions=ray.exceptions)


def test_images_of_a_dead_worker_are_taken_back(tmp_path, data):
    _, journal, number = prepared(tmp_path / "journal.sqlite", data, replace(STUDY, arms=STUDY.arms[:1]), seeds=(0,))
    epochs = [engine.Epoch(1, epoch, {"a": epoch}, {}) for epoch in range(2)]
    end = engine.End(1, "finished", None, {}, None)
    died = ray.exceptions.ActorDiedError()
    crew = [
        Scripted([], [[100, epochs[:1]], [30], [20], died]),
        Scripted([], [[100, epochs[1:]], [0, [end]], [0, None]]),
    ]
    workers, trained, watcher, killed = iter(crew), [], Watcher(), []
    watcher.trained = trained.append
    with journal:
        driver = ray_executor._Driver(
            scripted_ray(killed), lambda: next(workers), [journal.runs(number)], journal, watcher
        )
        driver.run(2)
        assert journal.epochs(1) == {0: {"a": 0}, 1: {"a": 1}}
        assert watcher.ends == [(1, "finished")]
    assert trained == [100, 30, 20, -50, 100, 0, 0]
    assert killed == crew[1:]


def test_workers_that_cannot_start(tmp_path, data):
    _, journal, number = prepared(tmp_path / "journal.sqlite", data)
    stillborn = Scripted(ray.exceptions.ActorDiedError())
    with journal:
        waiting = [[run] for run in journal.runs(number)]
        driver = ray_executor._Driver(scripted_ray([]), lambda: stillborn, waiting, journal, Watcher())
        with pytest.raises(UserError, match="No worker of the Ray cluster could start, 3 in a row") as error:
            driver.run(1)
        assert {run.status for run in journal.runs()} == {"pending"}
    one_sentence(error)


def test_without_ray(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    job, journal, study = prepared(tmp_path / "journal.sqlite", data)
    with journal:
        with pytest.raises(UserError, match=r"needs ray, which is not installed: pip install 'normwright\[ray\]'"):
            ray_cluster(job, journal, study, "sequential", Watcher())
        assert {run.status for run in journal.runs()} == {"pending"}


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_does_not_answer(tmp_path, data, scheme):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        job, journal, study = prepared(tmp_path / "journal.sqlite", data)
        began = time.monotonic()
        with journal, pytest.raises(UserError, match=rf"No Ray cluster answers at --address {address} \(") as error:
            ray_cluster(job, journal, study, "sequential", Watcher(), address)
    one_sentence(error)
    assert time.monotonic() - began < 10


def test_an_address_that_is_none(tmp_path, data):
    job, journal, study = prepared(tmp_path / "journal.sqlite", data)
    with journal, pytest.raises(UserError, match=r"--address is auto, HOST:PORT or ray://HOST:PORT; got 'no'") as error:
        ray_cluster(job, journal, study, "sequential", Watcher(), "no")
    one_sentence(error)


def test_a_study_that_cannot_be_sent(tmp_path, data, cluster):
    lock = threading.Lock()

    def locked(settings, shape, classes):
        with lock:
            return build(settings, shape, classes)

    job, journal, study = prepared(tmp_path / "journal.sqlite", data, replace(STUDY, build=locked))
    with journal:
        with pytest.raises(UserError, match="The study tiny cannot be sent to Ray's workers") as error:
            ray_cluster(job, journal, study, "sequential", Watcher())
        assert {run.status for run in journal.runs()} == {"pending"}
    one_sentence(error)


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [
        ([2], 2, (2, 1)),
        ([8], 3, (3, 2)),
        ([8], 1, (1, 8)),
        ([2], 5, (2, 1)),
        ([8, 8], 3, (3, 4)),  # 16 // 3 = 5 would leave the third worker without room
        ([8, 0, 2], 2, (2, 4)),
    ],
)
def test_shares_find_room(cores, workers, expected):
    nodes = [{"Alive": True, "Resources": {"CPU": float(n)} if n else {}} for n in cores]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0}})
    found, resources, threads = ray_executor._shares(SimpleNamespace(nodes=lambda: nodes), workers, torch.device("cpu"))
    assert (found, threads) == expected
    assert resources == {"num_cpus": threads}


def test_shares_of_gpus():
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
    cluster = SimpleNamespace(nodes=lambda: nodes)
    assert ray_executor._shares(cluster, 2, torch.device("cuda")) == (2, {"num_cpus": 4, "num_gpus": 0.5}, 4)
    nodes[0]["Resources"] = {"CPU": 8.0}
    with pytest.raises(UserError, match="no GPU to give") as error:
        ray_executor._shares(cluster, 2, torch.device("cuda"))
    one_sentence(error)
    nodes[0]["Resources"] = {}
    with pytest.raises(UserError, match="no CPU to give") as error:
        ray_executor._shares(cluster, 2, torch.device("cpu"))
    one_sentence(error)
