"""How runs are grouped, what a group that raises leaves, and two processes that train from one journal."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_engine import STUDY, Watcher, build, job, journal_with, recorded
from torch import nn

from normwright.lab import executor
from normwright.lab.errors import UserError
from normwright.lab.packed import WIDTH, width
from normwright.lab.packed.width import COPIES, MOST, PASSING, SHARE, footprint
from normwright.lab.study import Arm


class Teller(Watcher):
    def __init__(self):
        super().__init__()
        self.said, self.began = [], []

    def begin(self, runs):
        self.began.append([(run.arm, run.seed) for run in runs])

    def say(self, text):
        self.said.append(text)


def grouped(work, journal, engine):
    watcher = Teller()
    found = executor.groups(work, journal.runs(), engine, watcher)
    return [[(run.arm, run.seed) for run in group] for group in found], watcher.said


def unpackable(settings, shape, classes):
    model = build(settings, shape, classes)
    if settings["norm"] == "bn":
        model.one.register_forward_hook(lambda *_: None)
    return model


def test_alike_runs_are_grouped_and_no_group_is_wider_than_pays(data, tmp_path):
    work = job(data)
    seeds = range(WIDTH + 2)
    journal, _ = journal_with(tmp_path / "j.sqlite", work, seeds)
    with journal:
        found, said = grouped(work, journal, "auto")
        half = (WIDTH + 2) // 2
        assert found == [[(arm, seed) for seed in s] for arm in ("bn", "none") for s in (seeds[:half], seeds[half:])]
        assert said == []
        assert grouped(work, journal, "sequential")[0] == [[(run.arm, run.seed)] for run in journal.runs()]


def test_on_a_gpu_as_many_networks_are_packed_as_fit(data, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))
    saved = (64 + 5) * 4  # the image, and tanh's output: its own gradient and the second layer's need the same tensor
    parameters = (64 * 5 + 5 + 5 * 3 + 3) * 4
    expected = PASSING * 300 * saved + COPIES * parameters
    before = torch.get_rng_state()
    assert footprint(model, (1, 8, 8), 300) == expected
    assert torch.equal(torch.get_rng_state(), before)
    work = replace(job(data), device=torch.device("cuda"))
    settings = {**work.settings["bn"], "batch_size": 512}
    shape = (data.channels, *data.size)
    need = footprint(build(settings, shape, 3), shape, 512)
    for free, networks in ((0, 1), (need * 20.5 / SHARE, 20), (1e12, MOST)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2e12))
        assert width(work, "bn", settings) == networks
    assert width(job(data), "bn", settings) == WIDTH


def test_twenty_seeds_of_an_arm_are_one_pack_where_they_fit(data, tmp_path, monkeypatch):
    work = job(data)
    monkeypatch.setattr("normwright.lab.packed.width", lambda job, arm, settings: MOST)
    journal, _ = journal_with(tmp_path / "j.sqlite", work, range(20))
    with journal:
        assert grouped(work, journal, "auto")[0] == [[(arm, seed) for seed in range(20)] for arm in ("bn", "none")]


def test_learning_rates_are_packed_and_other_settings_are_not(data, tmp_path):
    arms = [Arm(f"lr{lr}", f"{lr}", {"norm": "bn", "lr": lr}) for lr in (0.1, 1.0)]
    arms.append(Arm("small", "small", {"norm": "bn", "lr": 0.1, "batch_size": 8}))
    arms.append(Arm("scaled", "scaled", {"norm": "bn", "lr": 0.1, "scale": 2.0}))
    work = job(data, replace(STUDY, arms=tuple(arms)))
    journal, _ = journal_with(tmp_path / "j.sqlite", work)
    with journal:
        found, _ = grouped(work, journal, "auto")
        assert found[0] == [("lr0.1", 0), ("lr1.0", 0), ("lr0.1", 1), ("lr1.0", 1)]
        assert found[1:] == [[("small", 0), ("small", 1)], [("scaled", 0), ("scaled", 1)]]
        # a setting that changes starting values alone, where the study says so and all have it
        arms[0], arms[1] = (replace(arm, settings={**arm.settings, "scale": 1.0}) for arm in arms[:2])
    work = job(data, replace(STUDY, arms=tuple(arms), packs=("scale",)))
    journal, _ = journal_with(tmp_path / "k.sqlite", work, seeds=(0,))
    with journal:
        assert grouped(work, journal, "auto")[0] == [[("lr0.1", 0), ("lr1.0", 0), ("scaled", 0)], [("small", 0)]]


def test_what_cannot_be_packed_trains_alone_and_is_told(data, tmp_path):
    work = job(data, replace(STUDY, build=unpackable))
    journal, study = journal_with(tmp_path / "j.sqlite", work)
    with journal:
        found, said = grouped(work, journal, "auto")
        assert found == [[("bn", 0)], [("bn", 1)], [("none", 0), ("none", 1)]]
        assert len(said) == 1
        assert said[0].startswith("bn: its networks train one by one, since one (Linear) has hooks")
        with pytest.raises(UserError, match=r"--engine packed: bn cannot train packed, since one \(Linear\) has hooks"):
            executor.in_process(work, journal, study, "packed", Teller())
        assert {run.status for run in journal.runs()} == {"pending"}


def test_packed_and_sequential_record_the_same(data, tmp_path):
    """The same metrics up to rounding, without dropout, whose masks differ."""

    def plain(settings, shape, classes):
        model = build(settings, shape, classes)
        model.drop = nn.Identity()
        return model

    work = job(data, replace(STUDY, build=plain))
    found = []
    for engine in ("sequential", "packed"):
        journal, study = journal_with(tmp_path / f"{engine}.sqlite", work)
        with journal:
            watcher = Teller()
            executor.in_process(work, journal, study, engine, watcher)
            found.append(sorted(recorded(journal), key=lambda run: run[:2]))
            assert watcher.images == 4 * 3 * 100
    for one, other in zip(*found, strict=True):
        assert one[:3] == other[:3]
        for first, second in zip(one[3], other[3], strict=True):
            assert first.keys() == second.keys()
            for key, value in first.items():
                assert value == pytest.approx(second[key], abs=1e-4 if "loss" in key else 0.021), key


def test_a_group_that_raises_is_tried_run_by_run(data, tmp_path):
    def observe(moment):
        if moment.seed == 1 and moment.epoch == 1:
            raise RuntimeError("seed 1 is cursed")
        return {}

    work = job(data, replace(STUDY, observe=observe, arms=STUDY.arms[:1]))
    journal, study = journal_with(tmp_path / "j.sqlite", work, seeds=(0, 1, 2))
    with journal:
        watcher = Teller()
        executor.in_process(work, journal, study, "packed", watcher)
        assert [(run.seed, run.status, run.epochs) for run in journal.runs()] == [
            (0, "finished", 3), (1, "failed", 1), (2, "finished", 3),
        ]  # fmt: skip
        assert journal.runs()[1].error == "RuntimeError: seed 1 is cursed"
        assert len(watcher.said) == 1
        assert "each is trained by itself" in watcher.said[0]


def test_an_interrupted_group_is_given_back_and_goes_on_by_the_other_engine(data, tmp_path):
    work = job(data)
    journal, study = journal_with(tmp_path / "j.sqlite", work, seeds=(0, 1))
    with journal:
        with pytest.raises(KeyboardInterrupt):
            executor.in_process(work, journal, study, "packed", StopAfter(3))
        assert [run.status for run in journal.runs() if run.arm == "bn"] == ["interrupted"] * 2
        assert [run.epochs for run in journal.runs() if run.arm == "bn"] == [2, 2]
        executor.in_process(work, journal, study, "sequential", Teller())
        assert {(run.status, run.epochs) for run in journal.runs()} == {("finished", 3)}


class StopAfter(Teller):
    def __init__(self, epochs):
        super().__init__()
        self.left = epochs

    def epoch(self, run, epoch, metrics):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_two_processes_share_one_journal(tmp_path):
    """Each run is trained once, by one of them, and no row is lost."""
    command = [sys.executable, "-m", "normwright", "study", "lenet", "arm=bn,none", "--smoke", "--epochs", "2",
               "--seeds", "4", "--engine", "sequential", "--resume", "--quiet", "--out",
               str(tmp_path / "run")]  # fmt: skip
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    code = [sys.executable, "-m", "normwright", "report", str(tmp_path / "run"), "--json"]
    found = json.loads(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    assert found["complete"]
    assert {row["arm"]: row["n"] for row in found["results"] if row["metric"] == "test_acc"} == {"bn": 4, "none": 4}
