"""The command line: what it prints, what it refuses, and what a killed or interrupted study leaves."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys

import pytest

from normwright import cli
from normwright.catalog import CATALOG
from normwright.lab import files
from normwright.lab.journal import Journal

COMMAND = [sys.executable, "-m", "normwright"]
TINY = ["study", "lenet", "arm=bn,none", "--smoke", "--out"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["normwright", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def metrics(folder):
    """Arm, seed, status and the metrics of every epoch but its times."""
    with Journal(folder / "journal.sqlite", mode="read") as journal:
        found = []
        for run in journal.runs():
            epochs = journal.epochs(run.id).values()
            kept = [{key: value for key, value in epoch.items() if "seconds" not in key} for epoch in epochs]
            found.append((run.arm, run.seed, run.status, kept))
        return found


def test_a_smoke_study_end_to_end(command, tmp_path):
    out = tmp_path / "run"
    code, printed, _ = command(*TINY, out, "--json")
    assert code == 0
    found = json.loads(printed)
    assert (found["study"], found["data"], found["seeds"], found["complete"]) == ("lenet", "digits", [0], True)
    assert [(r["arm"], r["evaluation"]) for r in found["results"]] == [
        ("bn", "running average"),
        ("bn", "recalibrated"),
        ("bn", "batch statistics"),
        ("none", "as trained"),
    ]
    recorded = {(arm, seed): epochs[-1] for arm, seed, _, epochs in metrics(out)}
    assert found["results"][1]["by_seed"] == {"0": recorded["bn", 0]["test_acc_recalibrated"]}
    assert found["verdicts"][0]["verdict"] == "undecided"
    assert "normwright study lenet arm=bn,none --smoke" in (out / "report.html").read_text()
    # The journal there is not written over; --resume finds nothing left to do; other settings are refused by name.
    code, _, error = command(*TINY, out)
    assert code == 2
    assert "--resume" in error
    assert "another --out" in error
    code, printed, _ = command(*TINY, out, "--resume", "--quiet")
    assert (code, printed) == (0, "")
    before = (out / "journal.sqlite").read_bytes()
    code, _, error = command(*TINY, out, "--resume", "--lr", 0.25, "--seeds", 2)
    assert code == 2
    assert "arms bn lr (there 1.0, here 0.25)" in error
    assert "seeds" not in error
    code, _, error = command("study", "lenet", "arm=bn", "--smoke", "--out", out, "--resume")
    assert code == 2
    assert "arms none (there present, here absent)" in error
    assert (out / "journal.sqlite").read_bytes() == before
    (out / "report.html").unlink()
    code, printed, _ = command("report", out)
    assert (code, printed) == (0, f"Report: {out}/report.html\n")
    assert (out / "report.html").stat().st_size > 1_000_000
    code, printed, _ = command("runs", out)
    assert code == 0
    assert len(re.findall("finished", printed)) == 2


def test_without_a_terminal_a_plain_line_an_epoch_and_a_table(command, tmp_path):
    code, printed, error = command(*TINY, tmp_path / "run", "--norm", "gn")
    assert code == 0
    assert re.search(r"^gn, seed 0, epoch 1/1: train loss \d+\.\d+, test accuracy 0\.\d+$", error, re.M)
    assert "\x1b" not in error + printed
    assert "group norm (2 groups)" in printed
    assert f"Report: {tmp_path}/run/report.html" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--lr", "-1"], "--lr is a finite number above 0; got -1.0."),
        (["--lr", "nan"], "--lr is a finite number above 0; got nan."),
        (["--seeds", "0"], "--seeds is a whole number of at least 1; got 0."),
        (["--epochs", "0"], "--epochs is a whole number of at least 1; got 0."),
        (["--batch-size", "1"], "--batch-size is a whole number of at least 2 images; got 1."),
        (["--norm", "bogus"], "got 'bogus'"),
        (["--norm", ""], "got 'norm='"),
        (["--optimizer", "lion"], "got 'lion'"),
        (["--engine", "warp"], "--engine is one of auto, packed, sequential; got 'warp'."),
        (["--executor", "moon"], "--executor is one of here, ray; got 'moon'."),
        (["arm=bogus"], "arm= takes arms of lenet"),
        (["learning_rate=1"], "a key that lenet knows"),
        (["lr=fast"], "'fast' is no value for a setting that is"),
        (["lr"], "KEY=VALUE"),
        (["--device", "quantum"], "--device quantum cannot be used here"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--out", "FILE"], "is a file"),
        (["--out", "FILE/below"], "is a file"),
    ],
)
def test_bad_values_are_one_sentence_and_write_nothing(command, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    code, printed, error = command("study", "lenet", "arm=bn,none", *arguments)
    assert (code, printed) == (2, "")
    assert text in error
    assert error.startswith("normwright: ")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["FILE"]


def test_other_wrong_commands(command, tmp_path):
    assert command("study")[0] == 2
    for arguments, text in (
        (("study", "resnet"), "no study 'resnet'"),
        (("norms", "bogus"), "No normalization is called 'bogus'"),
        (("report", tmp_path), "no journal"),
        (("runs", tmp_path), "no journal"),
    ):
        code, _, error = command(*arguments)
        assert code == 2
        assert text in error


def test_a_study_goes_on_with_more_seeds_and_more_arms(command, tmp_path):
    out = tmp_path / "run"
    assert command(*TINY, out, "--quiet")[0] == 0
    before = metrics(out)
    code, printed, error = command(
        "study", "lenet", "arm=bn,none,bn-24", "--smoke", "--seeds", 2, "--out", out, "--resume", "--json"
    )
    assert code == 0, error
    found = json.loads(printed)
    assert (found["seeds"], found["complete"]) == ([0, 1], True)
    assert {(row["arm"], row["n"]) for row in found["results"]} == {("bn", 2), ("none", 2), ("bn-24", 2)}
    assert "arm=bn,none,bn-24" in found["command"]
    after = metrics(out)
    assert after[:2] == before
    assert [(arm, seed) for arm, seed, *_ in after] == [
        ("bn", 0), ("none", 0), ("bn-24", 0), ("bn", 1), ("none", 1), ("bn-24", 1),
    ]  # fmt: skip
    code, _, error = command(*TINY, out, "--resume", "--quiet")
    assert code == 2
    assert "seeds (there 2, here 1)" in error


def test_runs_of_a_dead_machine_are_released(command, tmp_path):
    with Journal(tmp_path / "journal.sqlite") as journal:
        study = journal.create_study("lenet", {}, environment={}).id
        for seed in range(3):
            journal.add_run(study, "bn", seed, {})
            journal.claim_run(study)
    with sqlite3.connect(tmp_path / "journal.sqlite") as other:
        other.execute("UPDATE run SET host = 'elsewhere' WHERE id < 3")
    other.close()
    code, printed, _ = command("runs", tmp_path, "--release", "lenet")
    assert (code, printed) == (0, "Released 2 runs of lenet; --resume goes on with them.\n")
    with Journal(tmp_path / "journal.sqlite", mode="read") as journal:
        assert [run.status for run in journal.runs()] == ["interrupted", "interrupted", "running"]
    code, _, error = command("runs", tmp_path, "--release", "resnet")
    assert code == 2
    assert "has no study 'resnet' (it has: lenet)" in error


def test_a_missing_extra_is_named(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, error = command(*TINY, tmp_path / "run")
    assert code == 2
    assert "pip install 'normwright[lab]'" in error
    assert (tmp_path / "run" / "journal.sqlite").exists()


def test_a_full_disk_while_the_report_is_written(command, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files.os, "fsync", full)
    code, _, error = command(*TINY, tmp_path / "run", "--quiet")
    assert code == 2
    assert "disk is full" in error
    assert error.count("\n") == 1
    assert not [name for name in os.listdir(tmp_path / "run") if "report" in name]


def test_a_diverging_study_ends_well_and_shows_it(command, tmp_path):
    code, printed, _ = command(*TINY, tmp_path / "run", "--lr", "1e6", "--epochs", "2", "--json")
    found = json.loads(printed)
    assert code == 0
    assert {(f["arm"], f["status"]) for f in found["failures"]} == {("bn", "diverged"), ("none", "diverged")}
    assert "diverged" in (tmp_path / "run" / "report.html").read_text()


def test_norms_prints_every_row(command):
    code, printed, _ = command("norms")
    assert code == 0
    for name in CATALOG:
        assert name[:8] in printed


def test_group_norm_is_drawn(command):
    code, printed, _ = command("norms", "group")
    lines = [line.strip() for line in printed.splitlines()]
    assert code == 0
    assert "axis          b   g   c  s0  s1" in lines
    assert "mean over     ·   ·   ●   ●   ●" in lines
    assert "parameters    ·   ●   ●   ·   ·" in lines
    assert lines[lines.index("■ ■ · ·") + 1] == "· · · ·"


@pytest.mark.parametrize(
    ("name", "first_rows"),
    [
        ("BatchNorm", ["■ · ·", "■ · ·"]),
        ("LayerNorm", ["■ ■ ■ ■ ■ ■ ■ ■", "· · · · · · · ·"]),
        ("InstanceNorm", ["■ · · ·", "· · · ·"]),
        ("ChannelNorm", ["◧ ◧ ◧ ◧ ◧ ◧", "· · · · · ·"]),
        ("GhostBatchNorm", ["■ · ·", "■ · ·", "· · ·"]),
        ("PackedBatchNorm", ["■ · · · · ·", "■ · · · · ·"]),
    ],
)
def test_pictures_of_the_axes(name, first_rows):
    drawn = [line.strip() for line in cli.picture(CATALOG[name])]
    at = drawn.index(first_rows[0])
    assert drawn[at : at + len(first_rows)] == first_rows


def test_list_and_version_and_help(command):
    assert "lenet" in command("study", "--list")[1]
    assert re.fullmatch(r"normwright \d+\.\d+\.\d+\n", command("--version")[1])
    code, printed, _ = command("study", "--help")
    assert code == 0
    for option in ("--data", "--data-dir", "--seeds", "--epochs", "--lr", "--batch-size", "--optimizer", "--norm",
                   "--out", "--device", "--resume", "--smoke", "--quiet", "--json"):  # fmt: skip
        assert option in printed


def start(*arguments):
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )


def wait_for_epochs(process, n):
    """Read lines until so many epochs were reported."""
    for line in process.stderr:
        if "epoch" in line:
            n -= 1
            if n == 0:
                return
    raise AssertionError("the study ended too early")


@pytest.mark.slow
def test_killed_and_interrupted_studies_lose_an_epoch_at_most(tmp_path):
    """kill -9, then Ctrl-C, then to the end: the same numbers, bit for bit, as without."""
    # so many epochs that the study is not over before the signal comes
    common = ["study", "lenet", "arm=bn,none", "--smoke", "--epochs", "20", "--seeds", "1", "--batch-size", "8"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # in processes of their own, all of them: what other tests did to this one may round otherwise
    process = start(*common, "--out", str(whole), "--quiet")
    process.communicate(timeout=120)
    assert process.returncode == 0
    process = start(*common, "--out", str(parts))
    wait_for_epochs(process, 3)
    process.kill()
    process.communicate()
    assert 3 <= sum(len(epochs) for *_, epochs in metrics(parts)) < 40
    process = start(*common, "--out", str(parts), "--resume")
    wait_for_epochs(process, 1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("Stopped; every whole epoch is in ")
    assert error.splitlines()[-1].endswith("--resume")
    assert "Traceback" not in error
    assert any(status == "interrupted" for _, _, status, _ in metrics(parts))
    process = start(*common, "--out", str(parts), "--resume", "--quiet")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert metrics(parts) == metrics(whole)


@pytest.mark.slow
def test_help_is_quick():
    """Help imports no plotting, no statistics and no data: torch, which the package itself needs, is the most of it."""
    heavy = ("plotly", "scipy", "sklearn", "PIL", "numba")
    code = f"import sys, normwright.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


OWN = '''
"""A study of one's own."""
import torch
from torch import nn
from normwright.lab.data import Dataset
from normwright.lab.study import Arm, Contrast, Study

def build(settings, shape, classes):
    if settings["width"] == 13:
        raise ZeroDivisionError("thirteen")
    size = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, settings["width"]), nn.BatchNorm1d(settings["width"]),
                         nn.ReLU(), nn.Linear(settings["width"], classes))

def data():
    y = torch.arange(60) % 3
    x = torch.nn.functional.one_hot(y, 4).float().reshape(60, 1, 2, 2) + 0.1 * torch.randn(60, 1, 2, 2)
    return Dataset("mine", x[:40], y[:40], x[40:], y[40:], ("a", "b", "c"), "made up", "0" * 64)

STUDY = Study(
    name="own", title="Own", question="Wide?", claim="Wider is better.", source="none", data=data, build=build,
    arms=(Arm("narrow", "narrow", {"width": 2}), Arm("wide", "wide", {"width": 16})),
    contrasts=(Contrast("wide against narrow", ("wide", "test_acc"), ("narrow", "test_acc")),),
    fixed={"epochs": 2, "batch_size": 8, "optimizer": "sgd"}, nuisance={"lr": 0.5}, seeds=2,
)
'''


def test_a_study_of_ones_own_with_its_own_network_and_data(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    code, printed, error = command("study", "own.py", "--json")
    assert code == 0, error
    found = json.loads(printed)
    assert (found["study"], found["data"], found["seeds"], found["complete"]) == ("own", "mine", [0, 1], True)
    assert found["verdicts"][0]["n"] == 2
    assert {"journal.sqlite", "report.html"} <= set(os.listdir(tmp_path / "runs" / "own-mine"))
    code, printed, error = command("study", "own.py", "width=16", "lr=0.1,1", "--quiet", "--out", "two")
    assert (code, printed) == (0, ""), error
    assert {(arm, status) for arm, _, status, _ in metrics(tmp_path / "two")} == {
        ("wide-lr-0.1", "finished"), ("wide-lr-1.0", "finished"),
    }  # fmt: skip
    code, printed, _ = command("report", "runs")
    assert (code, printed) == (0, "Report: runs/index.html\n")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('{"width": 16}', '{"width": 13}', "build= of own raised for the arm wide: ZeroDivisionError: thirteen"),
        ('{"width": 16}', '{"width": 2}', "The arms narrow and wide of own do not differ"),
        ("    y = torch.arange(60) % 3", "    raise OSError('no disk')", "The data of own raised OSError: no disk"),
        ("    return Dataset(", "    return dict(", "The data of own raised TypeError"),
        ("STUDY = Study(", "STUDY = dict(", "holds no study"),
        ('("narrow", "test_acc")', '("none", "test_acc")', "names an arm 'none' that there is not"),
    ],
)
def test_what_is_wrong_with_ones_own_study_is_one_sentence(command, tmp_path, monkeypatch, old, new, text):
    monkeypatch.chdir(tmp_path)
    assert old in OWN
    (tmp_path / "own.py").write_text(OWN.replace(old, new))
    code, printed, error = command("study", "own.py")
    assert (code, printed) == (2, "")
    assert text in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["own.py"]


def test_tables_of_a_journal(command, tmp_path):
    assert command(*TINY, tmp_path / "run", "--quiet")[0] == 0
    code, printed, _ = command("runs", tmp_path / "run", "--table", tmp_path / "runs.csv")
    assert (code, printed.split()) == (0, ["Wrote", f"{tmp_path}/runs.csv", "Wrote", f"{tmp_path}/runs-epochs.csv"])
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 3
