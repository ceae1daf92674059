"""The journal: what is written is there after kill -9, belongs to one process, and every fault is one sentence."""

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from normwright.lab.errors import UserError
from normwright.lab.journal import SCHEMA_VERSION, End, Epoch, Journal, environment

CONFIG = {"lr": 0.1, "epochs": 3, "arms": ["bn", "none"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "journal.sqlite"


@pytest.fixture
def journal(path):
    with Journal(path) as journal:
        yield journal


def study_with_runs(journal, n=3):
    study = journal.create_study("lenet", CONFIG, environment={})
    for seed in range(n):
        journal.add_run(study.id, "bn", seed, {"lr": 0.1})
    return study.id


def child(code, *args):
    """A process of its own, which says "ready" when the test may go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_a_study_is_read_back(journal):
    written = journal.create_study(
        "lenet", CONFIG, source="print('ä')\n", data_sha256="ab" * 32, command="normwright study lenet"
    )
    (read,) = journal.studies()
    assert read == written == journal.open_study("lenet", CONFIG, data_sha256="ab" * 32)
    assert read.config == CONFIG
    assert read.source == "print('ä')\n"
    assert read.source_sha256 == "52e36847bfb25b674e8c86fda1c5679da041d197e3616dac6068567188a32a01"
    assert read.command == "normwright study lenet"
    assert read.environment == environment()


def test_the_environment_names_versions_and_machine():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["cpu"]
    json.dumps(found, allow_nan=False)
    if (Path(__file__).parents[2] / ".git").exists() and shutil.which("git"):
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        assert found["commit"].removesuffix("-dirty") == head.stdout.strip()


def test_a_study_is_made_once_and_resumed_with_the_same_settings_and_data(journal):
    journal.create_study("lenet", CONFIG, environment={}, data_sha256="a" * 64)
    with pytest.raises(UserError, match="already has a study 'lenet'; resume it"):
        journal.create_study("lenet", CONFIG, environment={})
    with pytest.raises(UserError, match=r"other settings: epochs \(3 there, 5 now\); resume"):
        journal.open_study("lenet", CONFIG | {"epochs": 5})
    with pytest.raises(UserError, match=r"other settings: extra \(None there, 1 now\)"):
        journal.open_study("lenet", CONFIG | {"extra": 1})
    with pytest.raises(UserError, match=r"other data \(SHA-256 aaaaaaaaaaaa… there, bbbbbbbbbbbb… now"):
        journal.open_study("lenet", data_sha256="b" * 64)
    with pytest.raises(UserError, match=r"no study 'vgg' \(it has: lenet\)"):
        journal.open_study("vgg")
    assert len(journal.studies()) == 1


def test_a_run_from_claim_to_finish(journal):
    study = study_with_runs(journal, 1)
    assert journal.add_run(study, "bn", 0, {"lr": 0.1}) == 1  # the same run, not another
    assert journal.add_run(study, "bn", 0, {"lr": 0.2}) == 2
    (pending, _) = journal.runs()
    assert (pending.status, pending.epochs, pending.host, pending.started) == ("pending", 0, None, None)
    run = journal.claim_run(study)
    assert (run.id, run.arm, run.seed, run.config, run.status) == (1, "bn", 0, {"lr": 0.1}, "running")
    assert run.pid == os.getpid()
    assert journal.claim_run(study, 1) is None  # it is ours already
    for epoch in range(3):
        journal.record_epoch(1, epoch, {"train_loss": 1 / (epoch + 3)}, {"epoch": epoch})
    journal.finish_run(1, {"test_acc": 0.875, "per_class": [0.5, math.nan]})
    done = journal.runs(study, status="finished")
    assert [run.id for run in done] == [1]
    assert done[0].results["test_acc"] == 0.875
    assert done[0].epochs == 3
    assert done[0].finished >= done[0].started
    assert journal.epochs(1) == {0: {"train_loss": 1 / 3}, 1: {"train_loss": 1 / 4}, 2: {"train_loss": 1 / 5}}
    recorded = journal.recorded(1)
    assert list(recorded) == [0, 1, 2]
    assert done[0].started <= recorded[0] <= recorded[1] <= recorded[2] <= done[0].finished
    assert journal.checkpoint(1) is None
    assert journal.claim_run(study).id == 2
    assert journal.claim_run(study) is None


def test_diverged_and_failed_runs_are_kept(journal):
    study = study_with_runs(journal, 3)
    a, b, c = (journal.claim_run(study).id for _ in range(3))
    journal.record_epoch(b, 0, {"loss": 1.0}, {"w": torch.ones(2)})
    journal.finish_run(a, {"train_loss": math.inf}, status="diverged", error="loss is inf at step 7")
    journal.fail_run(b, "ValueError: no such layer")
    journal.interrupt_run(c)
    assert [(run.status, run.error) for run in journal.runs()] == [
        ("diverged", "loss is inf at step 7"),
        ("failed", "ValueError: no such layer"),
        ("interrupted", None),
    ]
    assert journal.claim_run(study).id == c
    assert journal.claim_run(study) is None
    again = journal.claim_run(study, retry_failed=True)
    assert (again.id, again.epochs, again.error) == (b, 1, None)
    assert torch.equal(journal.checkpoint(b)["w"], torch.ones(2))


def test_a_finished_run_keeps_its_network_in_the_checkpoints_place(journal):
    study = study_with_runs(journal, 2)
    a, b = (journal.claim_run(study).id for _ in range(2))
    for run in (a, b):
        journal.record_epoch(run, 0, {"loss": 1.0}, {"w": torch.zeros(2), "optimizer": torch.zeros(9)})
    journal.finish_run(a, {}, trained={"w": torch.ones(2)})
    journal.finish_run(b, {}, status="diverged", error="nan")
    assert list(journal.checkpoint(a)) == ["w"]
    assert torch.equal(journal.checkpoint(a)["w"], torch.ones(2))
    assert journal.checkpoint(b) is None


NUMBERS = {
    "nan": math.nan,
    "inf": math.inf,
    "minus": -math.inf,
    "zero": -0.0,
    "tiny": 5e-324,
    "third": 1 / 3,
    "whole": 3.0,
    "count": 2**53 + 1,
    "float32": np.float32(0.1),
    "tensor": torch.tensor(0.1),
    "list": [1.5, math.nan, [-math.inf, 2]],
    "array": torch.tensor([0.1, math.inf]),
}
READ_BACK = NUMBERS | {
    "float32": float(np.float32(0.1)),
    "tensor": float(np.float32(0.1)),
    "array": [float(np.float32(0.1)), math.inf],
}


def test_numbers_are_read_back_exactly_even_those_that_sqlite_and_json_cannot_say(journal):
    study = study_with_runs(journal, 1)
    run = journal.claim_run(study).id
    journal.record_epoch(run, 0, NUMBERS)
    journal.finish_run(run, NUMBERS)
    for found in (journal.epochs(run)[0], journal.runs()[0].results):
        assert found.keys() == READ_BACK.keys()
        for name, value in READ_BACK.items():
            assert repr(found[name]) == repr(value), name  # repr tells nan, −0.0 and 3 from 3.0
    with sqlite3.connect(journal.path) as other:
        rows = other.execute("SELECT value FROM result WHERE name IN ('third', 'inf')").fetchall()
    other.close()
    assert sorted(rows) == [(1 / 3,), (math.inf,)]  # plain numbers to any reader of SQL
    with pytest.raises(TypeError, match="A metric is a number or a list of numbers, not str"):
        journal.finish_run(run, {"name": "x"})


def test_epochs_come_in_order_and_only_from_the_owner(journal):
    study = study_with_runs(journal, 2)
    run = journal.claim_run(study).id
    with pytest.raises(ValueError, match="the next of run 1 is 0, not 1"):
        journal.record_epoch(run, 1, {})
    journal.record_epoch(run, 0, {"a": 1})
    with pytest.raises(ValueError, match="the next of run 1 is 1, not 0"):
        journal.record_epoch(run, 0, {"a": 2})
    assert journal.epochs(run) == {0: {"a": 1}}
    with pytest.raises(UserError, match=r"Run 2 \(bn, seed 1\).* not this process's to write: it is pending"):
        journal.record_epoch(2, 0, {})
    with pytest.raises(ValueError, match="no run 9"):
        journal.finish_run(9)
    with sqlite3.connect(journal.path) as other:
        other.execute("UPDATE run SET pid = 1 WHERE id = 1")
    other.close()
    for write in (
        lambda: journal.record_epoch(1, 1, {}),
        lambda: journal.finish_run(1),
        lambda: journal.fail_run(1, "x"),
        lambda: journal.interrupt_run(1),
        lambda: journal.record([End(1)]),
    ):
        with pytest.raises(UserError, match="it is running in process 1 on") as error:
            write()
        one_sentence(error)
    assert journal.runs()[0].status == "running"


def test_several_runs_are_recorded_in_one_transaction(journal):
    study = study_with_runs(journal, 5)
    assert [run.id for run in journal.claim_runs(study, [1, 2, 3, 4, 5])] == [1, 2, 3, 4, 5]
    journal.record([Epoch(run, 0, {"a": run}, {"s": run}) for run in (1, 2, 3, 4, 5)])
    trained = {"w": torch.ones(2)}
    wrong = [Epoch(1, 1, {"a": 3}, {"s": 3}), End(1, metrics={"acc": 0.5}, trained=trained), Epoch(2, 5, {"a": 4})]
    with pytest.raises(ValueError, match="the next of run 2 is 1, not 5"):
        journal.record(wrong)
    assert [run.status for run in journal.runs()] == ["running"] * 5
    assert journal.runs()[0].results == {}
    assert journal.epochs(1) == {0: {"a": 1}}
    assert journal.checkpoint(1) == {"s": 1}
    journal.record(
        [
            *wrong[:2],
            End(2, metrics={"acc": 0.25}),
            End(3, "diverged", "the loss was nan", {"loss": math.nan}),
            End(4, "failed", "ValueError: x"),
            End(5, "interrupted"),
        ]
    )
    runs = journal.runs()
    assert [(run.status, run.error) for run in runs] == [
        ("finished", None),
        ("finished", None),
        ("diverged", "the loss was nan"),
        ("failed", "ValueError: x"),
        ("interrupted", None),
    ]
    assert [run.epochs for run in runs] == [2, 1, 1, 1, 1]
    assert [run.results.get("acc") for run in runs] == [0.5, 0.25, None, None, None]
    assert math.isnan(runs[2].results["loss"])
    assert torch.equal(journal.checkpoint(1)["w"], torch.ones(2))
    assert [journal.checkpoint(run) for run in (2, 3, 4, 5)] == [None, None, {"s": 4}, {"s": 5}]
    journal.claim_run(study, 5)
    with pytest.raises(UserError, match=r"Run 2 \(bn, seed 1\) .*it is finished; claim it first"):
        journal.record([Epoch(5, 1, {}), End(2)])
    assert list(journal.epochs(5)) == [0]


def test_runs_are_claimed_together(path, journal):
    study = study_with_runs(journal, 6)
    other = journal.create_study("other", {}, environment={}).id
    journal.add_run(other, "bn", 0, {})
    assert journal.claim_run(study, 3).id == 3
    journal.finish_run(3)
    with Journal(path) as second:
        assert [run.id for run in second.claim_runs(study, [5, 3, 2, 5, 7, 99])] == [5, 2]  # 7 is another study's
        taken = journal.claim_runs(study, [1, 2, 3, 4, 5])
    assert [(run.id, run.status, run.pid) for run in taken] == [
        (1, "running", os.getpid()),
        (4, "running", os.getpid()),
    ]
    assert journal.claim_runs(study, [1, 2, 3, 4, 5]) == []
    assert journal.claim_runs(study, []) == []
    journal.record([Epoch(1, 0, {"a": 0}, {"s": 0}), Epoch(1, 1, {"a": 1}), End(1, "interrupted"), End(4, "failed")])
    (again,) = journal.claim_runs(study, [1, 4])
    assert (again.id, again.epochs) == (1, 1)  # back to its checkpoint
    assert [run.id for run in journal.claim_runs(study, [4], retry_failed=True)] == [4]


def test_results_are_added_to_finished_runs_by_any_process(path, journal):
    study = study_with_runs(journal, 2)
    run = journal.claim_run(study).id
    with pytest.raises(ValueError, match="Results are added to finished runs; run 1 is running"):
        journal.add_results(run, {"ensemble": 0.5})
    journal.finish_run(run, {"acc": 0.25})
    with sqlite3.connect(path) as other:
        other.execute("UPDATE run SET host = 'elsewhere', pid = 1 WHERE id = 1")
    other.close()
    journal.add_results(run, {"ensemble": math.inf, "list": [1, math.nan], "acc": 0.75})
    results = journal.runs()[0].results
    assert repr(results) == "{'acc': 0.75, 'ensemble': inf, 'list': [1, nan]}"
    with pytest.raises(TypeError, match="A metric is a number"):
        journal.add_results(run, {"a": 1, "b": "text"})
    assert "a" not in journal.runs()[0].results
    with pytest.raises(ValueError, match="no run 9"):
        journal.add_results(9, {"a": 1})


def test_documents_of_a_study(path, journal):
    study = study_with_runs(journal, 1)
    other = journal.create_study("other", {}, environment={}).id
    figures = [{"title": "Größe", "z": [[0.1 + 0.2, None], [1e-300, True]]}, "text", 7]
    assert journal.stored(study, "figures") is None
    journal.store(study, "figures", [])
    journal.store(study, "figures", figures)
    journal.store(other, "figures", {"a": 1})
    with Journal(path, mode="read") as reader:
        assert reader.stored(study, "figures") == figures
        assert reader.stored(other, "figures") == {"a": 1}
        assert reader.stored(study, "series") is None
        with pytest.raises(UserError, match="it is read-only") as error:
            reader.store(study, "figures", [])
        one_sentence(error)
    for bad, error in ((math.nan, ValueError), ([math.inf], ValueError), (np.ones(2), TypeError)):
        with pytest.raises(error):
            journal.store(study, "figures", bad)
    assert journal.stored(study, "figures") == figures
    with pytest.raises(ValueError, match="no study 9"):
        journal.store(9, "figures", [])


# As version 1 wrote it, word for word.
VERSION_1 = """
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
INSERT INTO meta VALUES ('created', '2025-01-01T00:00:00.000+00:00'), ('schema_version', '1');
INSERT INTO study VALUES (1, 'lenet', '{"lr": 0.1}', '{}', '', '', '', '', '2025-01-01T00:00:00.000+00:00');
INSERT INTO run (id, study, arm, seed, config, hash, status) VALUES
  (1, 1, 'bn', 0, '{}', 'a', 'finished'), (2, 1, 'bn', 1, '{}', 'b', 'pending');
INSERT INTO epoch VALUES (1, 0, '{"loss": 0.5}', '2025-01-01T00:00:00.000+00:00');
INSERT INTO result VALUES (1, 'acc', 0.25);
PRAGMA user_version = 1;
PRAGMA application_id = 1853319788;
PRAGMA journal_mode = WAL;
"""


def make_version_1(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path)
    db.executescript(VERSION_1)
    db.close()


def test_a_journal_of_version_1_is_read_as_it_is(path):
    make_version_1(path)
    before = path.read_bytes()
    with Journal(path, mode="read") as journal:
        assert journal.open_study("lenet").config == {"lr": 0.1}
        assert [run.results for run in journal.runs()] == [{"acc": 0.25}, {}]
        assert journal.epochs(1) == {0: {"loss": 0.5}}
        assert journal.stored(1, "figures") is None
        with Journal(path, mode="write") as writer:  # another process brings it up to date meanwhile
            writer.store(1, "figures", [1])
        assert journal.stored(1, "figures") == [1]
    make_version_1(path.with_name("again.sqlite"))
    assert path.with_name("again.sqlite").read_bytes() == before


@pytest.mark.parametrize("mode", ["create", "write"])
def test_a_journal_of_version_1_is_brought_up_to_date_in_place(path, mode):
    make_version_1(path)
    with Journal(path, mode=mode) as journal, Journal(path, mode=mode) as second:
        assert [run.results for run in journal.runs()] == [{"acc": 0.25}, {}]
        assert journal.epochs(1) == {0: {"loss": 0.5}}
        journal.store(1, "figures", {"a": 1})
        assert second.stored(1, "figures") == {"a": 1}
        journal.add_results(1, {"later": 2.0})
        assert journal.claim_run(1).id == 2
        journal.record([Epoch(2, 0, {"loss": 1.0}), End(2, metrics={"acc": 0.5})])
        # The log beside the file holds the new version while the file's own header still has the old one.
        assert path.read_bytes()[60:64] == (1).to_bytes(4, "big")
        with Journal(path, mode="read") as reader:
            assert reader.stored(1, "figures") == {"a": 1}
    assert path.read_bytes()[60:64] == SCHEMA_VERSION.to_bytes(4, "big")
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchall() == [("2",)]
    other.close()
    with Journal(path, mode="read") as reader:
        assert [run.results for run in reader.runs()] == [{"acc": 0.25, "later": 2.0}, {"acc": 0.5}]


def test_an_old_and_a_new_journal_have_the_same_tables(tmp_path):
    schemas = []
    for name, make in (("old", make_version_1), ("new", lambda path: None)):
        make(tmp_path / name)
        Journal(tmp_path / name).close()
        with sqlite3.connect(tmp_path / name) as db:
            schemas.append(db.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall())
        db.close()
    assert schemas[0] == schemas[1]


def test_a_version_that_another_process_is_writing_counts_before_the_header_does(path):
    with Journal(path) as journal:
        journal._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")  # in the log, not in the file yet
        assert path.read_bytes()[60:64] == SCHEMA_VERSION.to_bytes(4, "big")
        for mode in ("create", "write", "read"):
            with pytest.raises(UserError, match=f"has schema version {SCHEMA_VERSION + 1}") as error:
                Journal(path, mode=mode)
            one_sentence(error)


def test_the_checkpoint_is_the_last_one_and_holds_no_code(journal):
    study = study_with_runs(journal, 1)
    run = journal.claim_run(study).id
    assert journal.checkpoint(run) is None
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "n": epoch}
        journal.record_epoch(run, epoch, {}, state)
    read = journal.checkpoint(run)
    assert read["n"] == 1
    assert torch.equal(read["net"]["weight"], net.weight)
    assert torch.equal(read["optimizer"]["state"][0]["momentum_buffer"], optimizer.state[net.weight]["momentum_buffer"])
    other = study_with_other_run(journal, study)
    with pytest.raises(TypeError, match="A checkpoint holds tensors, numbers"):
        journal.record_epoch(other, 0, {}, {"path": Path("/")})
    assert journal.epochs(other) == {}


def study_with_other_run(journal, study):
    journal.add_run(study, "none", 7, {})
    return journal.claim_run(study).id


def test_a_damaged_checkpoint_is_said(journal):
    study = study_with_runs(journal, 1)
    run = journal.claim_run(study).id
    journal.record_epoch(run, 0, {}, {"w": torch.ones(4)})
    with sqlite3.connect(journal.path) as other:
        other.execute("UPDATE checkpoint SET state = substr(state, 1, 100)")
    other.close()
    with pytest.raises(UserError, match=r"The checkpoint of run 1 .* is damaged") as error:
        journal.checkpoint(run)
    one_sentence(error)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path, journal):
    study = study_with_runs(journal, 1)
    run = journal.claim_run(study).id
    journal.record_epoch(run, 0, {}, {"w": torch.ones(4)})
    buffer = io.BytesIO()
    torch.save(Payload(tmp_path / "touched"), buffer)
    with sqlite3.connect(journal.path) as other:
        other.execute("UPDATE checkpoint SET state = ?", (buffer.getvalue(),))
    other.close()
    with pytest.raises(UserError, match="is damaged"):
        journal.checkpoint(run)
    assert not (tmp_path / "touched").exists()


def test_epochs_after_the_last_checkpoint_are_trained_again(journal):
    study = study_with_runs(journal, 2)
    kept, bare = journal.claim_run(study).id, journal.claim_run(study).id
    for epoch in range(5):
        journal.record_epoch(kept, epoch, {"a": epoch}, {"epoch": epoch} if epoch == 2 else None)
        journal.record_epoch(bare, epoch, {"a": epoch})
    journal.interrupt_run(kept)
    journal.interrupt_run(bare)
    assert journal.claim_run(study, kept).epochs == 3
    assert journal.checkpoint(kept) == {"epoch": 2}
    assert list(journal.epochs(kept)) == [0, 1, 2]
    assert journal.claim_run(study, bare).epochs == 0


WRITER = """
    import sys, time, torch
    from normwright.lab.journal import Journal
    journal = Journal(sys.argv[1])
    run = journal.claim_run(1)
    weights = torch.zeros(1000)
    for epoch in range(run.epochs, 10**6):
        weights += 1
        journal.record_epoch(run.id, epoch, {"sum": weights.sum()}, {"weights": weights, "epoch": epoch})
        if epoch == 5:
            print("ready", flush=True)
"""


def test_kill_9_loses_at_most_the_epoch_under_way(path, journal):
    study = study_with_runs(journal, 2)
    process = child(WRITER, path)
    assert [run.status for run in journal.runs()] == ["running", "pending"]
    assert journal.claim_run(study, 1) is None  # its process lives
    kill(process)
    (found,) = journal.runs(status="running")
    assert found.pid == process.pid
    assert found.epochs >= 6
    run = journal.claim_run(study)
    assert run.id == 1
    assert run.epochs == found.epochs
    state = journal.checkpoint(1)
    assert state["epoch"] == run.epochs - 1
    assert torch.equal(state["weights"], torch.full((1000,), float(run.epochs)))
    assert journal.epochs(1)[run.epochs - 1] == {"sum": 1000.0 * run.epochs}
    journal.record_epoch(1, run.epochs, {"sum": 0})
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_run_of_another_host_is_given_back_only_on_request(journal):
    study = study_with_runs(journal, 2)
    assert journal.claim_run(study).id == 1
    assert journal.claim_run(study).id == 2
    with sqlite3.connect(journal.path) as other:
        other.execute("UPDATE run SET host = 'elsewhere', pid = 999999999 WHERE id = 1")
    other.close()
    assert journal.claim_run(study) is None
    assert journal.release_runs(study) == 1
    assert [run.status for run in journal.runs()] == ["interrupted", "running"]
    assert journal.claim_run(study).id == 1


def test_a_process_with_the_number_of_a_dead_one_does_not_keep_its_run(journal):
    study = study_with_runs(journal, 1)
    journal.claim_run(study)
    with sqlite3.connect(journal.path) as other:
        other.execute("UPDATE run SET pid_started = '1'")  # as if our number had belonged to an older process
    other.close()
    if not Path("/proc/self/stat").exists():
        pytest.skip("only /proc tells when a process started")
    assert journal.claim_run(study).id == 1


def claim_all(path, gate, results):
    gate.wait()
    claimed = []
    with Journal(path) as journal:
        if not journal.studies():
            try:
                journal.create_study("lenet", CONFIG, environment={})
            except UserError:
                assert journal.studies()
        study = journal.open_study("lenet", CONFIG).id
        for seed in range(40):
            journal.add_run(study, "bn", seed, {})
        while (run := journal.claim_run(study)) is not None:
            claimed.append(run.id)
            journal.record_epoch(run.id, 0, {"loss": run.seed}, {"w": torch.ones(100)})
            journal.finish_run(run.id, {"acc": run.seed})
    results.put(claimed)


@pytest.mark.slow
def test_processes_on_one_new_journal_never_get_the_same_run(path):
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=claim_all, args=(path, gate, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    claimed = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted(run for runs in claimed for run in runs) == list(range(1, 41))
    with Journal(path, mode="read") as journal:
        assert [run.results for run in journal.runs()] == [{"acc": seed} for seed in range(40)]


def claim_groups(path, gate, results):
    gate.wait()
    claimed = []
    with Journal(path) as journal:
        numbers = list(range(1, 41))
        for start in range(0, 40, 3):  # both go for the same groups
            runs = [run.id for run in journal.claim_runs(1, numbers[start : start + 3])]
            claimed += runs
            journal.record([Epoch(run, 0, {"loss": run}, {"w": torch.ones(100)}) for run in runs])
            journal.record([End(run, metrics={"acc": run}) for run in runs])
            for run in runs:
                journal.add_results(run, {"later": run})
        journal.store(1, f"of {os.getpid()}", claimed)
    results.put((os.getpid(), claimed))


@pytest.mark.slow
def test_processes_on_one_old_journal_bring_it_up_to_date_once_and_share_its_runs(path):
    make_version_1(path)
    with sqlite3.connect(path) as other:
        other.execute("DELETE FROM epoch")
        other.execute("DELETE FROM result")
        other.execute("DELETE FROM run")
        rows = [(n, "bn", n, str(n)) for n in range(1, 41)]
        other.executemany(
            "INSERT INTO run (id, study, arm, seed, config, hash, status) VALUES (?, 1, ?, ?, '{}', ?, 'pending')", rows
        )
    other.close()
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=claim_groups, args=(path, gate, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    claimed = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted(run for runs in claimed.values() for run in runs) == list(range(1, 41))
    with Journal(path, mode="read") as journal:
        assert [run.results for run in journal.runs()] == [{"acc": n, "later": n} for n in range(1, 41)]
        assert {pid: journal.stored(1, f"of {pid}") for pid in claimed} == claimed


def test_a_fork_must_open_its_own(journal, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="must not be carried over a fork"):
        journal.studies()


def test_a_journal_held_too_long(path, journal):
    study = study_with_runs(journal, 1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Journal(path, timeout=0.1) as waiting:
        assert len(waiting.runs()) == 1  # readers do not wait
        with pytest.raises(UserError, match=r"another process has held it for over 0.1 s; wait") as error:
            waiting.claim_run(study)
        one_sentence(error)
        other.execute("ROLLBACK")
        other.close()
        assert waiting.claim_run(study).id == 1


def test_a_full_disk_keeps_all_that_was_recorded(path, journal):
    study = study_with_runs(journal, 1)
    run = journal.claim_run(study).id
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages + 20}")
    journal.record_epoch(run, 0, {"a": 0}, {"w": torch.zeros(1000)})
    with pytest.raises(UserError, match="the disk is full; free some space and resume") as error:
        journal.record_epoch(run, 1, {"a": 1}, {"w": torch.zeros(100_000)})
    one_sentence(error)
    assert journal.epochs(run) == {0: {"a": 0}}
    assert torch.equal(journal.checkpoint(run)["w"], torch.zeros(1000))
    journal._db.execute("PRAGMA max_page_count = 1000000")
    journal.record_epoch(run, 1, {"a": 1}, {"w": torch.zeros(100_000)})
    assert list(journal.epochs(run)) == [0, 1]


FULL = """
    import resource, signal, sys, torch
    from normwright.lab.errors import UserError
    from normwright.lab.journal import Journal
    journal = Journal(sys.argv[1])
    run = journal.claim_run(1)
    journal.record_epoch(run.id, 0, {"a": 0}, {"w": torch.zeros(1000)})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        journal.record_epoch(run.id, 1, {"a": 1}, {"w": torch.zeros(100_000)})
    except UserError as error:
        print("ready", flush=True)
        print(error, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file size are POSIX's")
def test_a_write_that_the_system_refuses(path, journal):
    study_with_runs(journal, 1)
    process = child(FULL, path)
    text = process.stdout.read()
    process.wait()
    process.stdout.close()
    says = "SQLite says: disk I/O error; check the disk, its quota and the rights there."
    assert text == f"The journal {path} cannot be used: {says}\n"
    assert journal.epochs(1) == {0: {"a": 0}}
    assert journal.claim_run(1).epochs == 1


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def make_foreign(path):
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE meta (key, value)")
    other.close()


def make_newer(path):
    Journal(path).close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 7")
    other.close()


@pytest.mark.parametrize("mode", ["create", "write", "read"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b"run,epoch\n" * 20), "is no journal: it is not an SQLite file"),
        (lambda path: path.write_bytes(b"SQLite format 3\0"), "is no journal"),
        (make_foreign, "is a database of another program"),
        (
            make_newer,
            f"has schema version 7, this normwright reads 1 to {SCHEMA_VERSION}; use the normwright that wrote it",
        ),
        (lambda path: path.mkdir(), "cannot be opened"),
    ],
)
def test_files_that_are_not_ours_are_left_as_they_are(tmp_path, mode, make, says):
    path = tmp_path / "journal.sqlite"
    make(path)
    before = contents(tmp_path) if path.is_file() else None
    with pytest.raises(UserError, match=says) as error:
        Journal(path, mode=mode)
    one_sentence(error)
    if before is not None:
        assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["write", "read"])
def test_a_missing_journal_is_not_made(tmp_path, mode):
    with pytest.raises(UserError, match="There is no journal") as error:
        Journal(tmp_path / "no" / "journal.sqlite", mode=mode)
    one_sentence(error)
    assert contents(tmp_path) == {}
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="is no journal"):
        Journal(tmp_path / "empty", mode=mode)


def test_a_damaged_journal(path):
    with Journal(path) as journal:
        study = study_with_runs(journal, 50)
        run = journal.claim_run(study).id
        journal.record_epoch(run, 0, {}, {"w": torch.zeros(10_000)})
    raw = bytearray(path.read_bytes())
    raw[4096:20480] = b"\xa5" * 16384
    path.write_bytes(raw)
    for mode in ("create", "write", "read"):
        with pytest.raises(UserError, match=r"it is damaged \(.*restore a copy") as error:
            Journal(path, mode=mode)
        one_sentence(error)
    path.write_bytes(raw[:5000])
    with pytest.raises(UserError, match="it is damaged"):
        Journal(path)


def test_reading_changes_nothing(path):
    with Journal(path) as journal:
        study = study_with_runs(journal, 1)
    before = path.read_bytes()
    with Journal(path, mode="read") as journal:
        assert len(journal.runs()) == 1
        with pytest.raises(UserError, match="it is read-only; make it writable") as error:
            journal.claim_run(study)
        one_sentence(error)
    assert path.read_bytes() == before


def test_reading_in_a_folder_that_may_not_be_written(path, monkeypatch):
    with Journal(path) as journal:
        study_with_runs(journal, 1)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with Journal(path, mode="read") as journal:
        assert len(journal.runs()) == 1
    assert contents(path.parent).keys() == {path.name}


def test_reading_beside_a_writer(path, journal):
    study = study_with_runs(journal, 1)
    with Journal(path, mode="read") as reader:
        run = journal.claim_run(study).id
        journal.record_epoch(run, 0, {"a": 1})
        assert reader.epochs(run) == {0: {"a": 1}}
