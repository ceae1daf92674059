"""Exports are read back by the tools they are for, and every number is the one that was recorded."""

import csv
import json
import math
import sys
from datetime import datetime

import pytest

from normwright.lab.errors import UserError
from normwright.lab.export import export
from normwright.lab.journal import End, Epoch, Journal

THIRD = 1 / 3
EPOCHS = {
    (1, 0): {"loss": THIRD, "gamma": [1.5, math.nan], "count": 2, "mixed": 1},
    (1, 1): {"loss": math.nan, "gamma": [math.inf, 5e-324], "count": 2**53 + 1, "mixed": [1]},
    (2, 0): {"loss": -math.inf, "nested": [[1.0, 2.0], [3.0]], "epoch": 0.5, "mixed": 2.5},
}
RESULTS = {
    1: {"acc": 0.1 + 0.2, 'comma, quote"': -math.inf, "seed": 9.0, "ragged": [1, [2, math.nan]]},
    2: {"acc": math.nan, "whole": 3, "big": 2**70},
    3: {},
}
CONFIGS = {
    1: {"lr": 0.1, "clip": None, "name": "sgd", "where": ["a", 1], "deep": {"k": 1}, "on": True, "w": 1},
    2: {"lr": 0.2, "clip": 2.0, "name": "ädam", "where": [], "deep": {}, "on": False, "w": "x"},
    3: {"lr": 1},
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        study = journal.create_study("lenet", {}, environment={}).id
        for seed, config in enumerate(CONFIGS.values()):
            journal.add_run(study, "batch norm / nn", seed, config)
        other = journal.create_study("../other", {}, environment={}).id
        journal.add_run(other, "..", 0, {})
        journal.claim_runs(study, [1, 2])
        journal.record(
            [
                *(Epoch(run, epoch, metrics) for (run, epoch), metrics in EPOCHS.items()),
                End(1, metrics=RESULTS[1]),
                End(2, "diverged", "the loss was\n-inf", RESULTS[2] | {"big": 1e70}),
            ]
        )
    return path


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def one_sentence(error):
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_csv(tmp_path, path):
    out = tmp_path / "new" / "table.csv"
    assert export(path, out) == [out, out.with_name("table-epochs.csv")]
    runs, epochs = map(rows_of, (out, out.with_name("table-epochs.csv")))
    assert [(row["study"], row["run"], row["arm"], row["seed"], row["status"], row["epochs"]) for row in runs] == [
        ("lenet", "1", "batch norm / nn", "0", "finished", "2"),
        ("lenet", "2", "batch norm / nn", "1", "diverged", "1"),
        ("lenet", "3", "batch norm / nn", "2", "pending", "0"),
        ("../other", "4", "..", "0", "pending", "0"),
    ]
    assert runs[1]["error"] == "the loss was\n-inf"
    assert float(runs[0]["acc"]) == 0.1 + 0.2
    assert [runs[0]['comma, quote"'], runs[1]["acc"], runs[2]["acc"]] == ["-inf", "nan", ""]
    assert runs[0]["metric.seed"] == "9.0"
    assert runs[0]["ragged"] == '[1, [2, "nan"]]'
    assert [row["config.name"] for row in runs] == ["sgd", "ädam", "", ""]
    assert [row["config.deep"] for row in runs] == ['{"k": 1}', "{}", "", ""]
    assert [(row["run"], row["epoch"]) for row in epochs] == [("1", "0"), ("1", "1"), ("2", "0")]
    assert [row["loss"] for row in epochs] == [repr(THIRD), "nan", "-inf"]
    assert [row["gamma"] for row in epochs] == ['[1.5, "nan"]', '["inf", 5e-324]', ""]
    assert epochs[1]["count"] == str(2**53 + 1)
    assert epochs[2]["metric.epoch"] == "0.5"
    export(path, out, study="../other")
    assert [row["run"] for row in rows_of(out)] == ["4"]


def test_parquet(tmp_path, path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "runs.parquet"
    assert export(path, out) == [out, tmp_path / "runs-epochs.parquet"]
    table = parquet.read_table(out)
    types = {field.name: str(field.type) for field in table.schema}
    assert types["config.lr"] == types["acc"] == "double"
    assert types["seed"] == types["whole"] == "int64"
    assert types["config.on"] == "bool"
    assert types["config.w"] == types["config.where"] == types["config.deep"] == types["ragged"] == "string"
    rows = table.to_pylist()
    for row, run in zip(rows, (1, 2, 3), strict=False):
        expected = {f"config.{key}": value for key, value in CONFIGS[run].items()} | RESULTS[run]
        for key, value in expected.items():
            found = row["metric.seed" if key == "seed" else key]
            if types.get(key) == "string" and not isinstance(value, str):
                found = json.loads(found)
            if key == "big":
                value = 1e70
            if key == "ragged":
                value = [1, [2, "nan"]]
            if key == "config.w" and value == "x":
                found = json.loads(found)
            assert repr(found) == repr(float(value) if types.get(key) == "double" and value is not None else value), key
    assert rows[2]["acc"] is None
    assert [row["study"] for row in rows] == ["lenet"] * 3 + ["../other"]
    table = parquet.read_table(tmp_path / "runs-epochs.parquet")
    types = {field.name: str(field.type).replace("item", "element") for field in table.schema}  # by version
    assert (types["gamma"], types["nested"], types["count"]) == (
        *("list<element: double>", "list<element: list<element: double>>", "int64"),
    )
    rows = table.to_pylist()
    assert [(row["run"], row["epoch"]) for row in rows] == list(EPOCHS)
    for row, metrics in zip(rows, EPOCHS.values(), strict=True):
        for name in ("loss", "gamma", "count", "nested"):
            assert repr(row[name]) == repr(metrics.get(name)), name
    assert [row["mixed"] for row in rows] == ["1", "[1]", "2.5"]
    assert rows[2]["metric.epoch"] == 0.5


def test_tensorboard(tmp_path, path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.util.tensor_util import make_ndarray

    out = tmp_path / "board"
    out.mkdir()  # empty, so that is fine
    folders = export(path, out)
    assert [str(folder.relative_to(out)) for folder in folders] == [
        "lenet/batch_norm_nn-seed0-run1",
        "lenet/batch_norm_nn-seed1-run2",
        "lenet/batch_norm_nn-seed2-run3",
        "_other/_-seed0-run4",
    ]
    assert sorted(out.rglob("*tfevents*")) == sorted(next(folder.iterdir()) for folder in folders)
    with Journal(path, mode="read") as journal:
        for run, folder in zip(journal.runs(), folders, strict=True):
            read = EventAccumulator(str(folder)).Reload()
            metrics = journal.epochs(run.id)
            expected = {}
            for epoch, values in metrics.items():
                for name, value in values.items():
                    if not isinstance(value, list):
                        expected.setdefault(name, []).append((epoch, repr(float(value))))
            for name, value in run.results.items():
                if not isinstance(value, list):
                    expected[f"result/{name}"] = [(run.epochs, repr(float(value)))]
            found = {
                name: [(event.step, repr(float(make_ndarray(event.tensor_proto)))) for event in read.Tensors(name)]
                for name in read.Tags()["tensors"]
                if not name.startswith("_hparams_")
            }
            assert found == expected
            if run.id == 1:
                times = [event.wall_time for event in read.Tensors("loss")]
                assert times == [datetime.fromisoformat(time).timestamp() for time in journal.recorded(1).values()]
            content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
            hparams = HParamsPluginData.FromString(content).session_start_info.hparams
            assert set(hparams) == {*run.config, "arm"}
            if run.id == 1:
                assert hparams["lr"].number_value == 0.1
                assert hparams["name"].string_value == "sgd"
                assert hparams["on"].bool_value is True
                assert hparams["deep"].string_value == '{"k": 1}'
                assert hparams["arm"].string_value == "batch norm / nn"


def test_the_format_goes_by_the_ending_unless_it_is_said(tmp_path, path):
    assert export(path, tmp_path / "data.txt", "csv")[1].name == "data-epochs.txt"
    assert rows_of(tmp_path / "data.txt")[0]["study"] == "lenet"
    assert export(path, tmp_path / "UPPER.CSV")[1].name == "UPPER-epochs.CSV"
    for out, format, says in (
        (tmp_path / "data.xlsx", None, "ends in .xlsx, which is no format of ours: end it in .csv or .parquet"),
        (tmp_path / "data", "json", "exported as csv, parquet, tensorboard, not as 'json'"),
        (tmp_path, None, "is there already and not empty"),
        (tmp_path / "data.txt", "tensorboard", "is there already and not empty"),
        (tmp_path / "data.txt" / "below", "tensorboard", "below cannot be written"),
        (tmp_path / "data.txt" / "below.csv", None, "below.csv cannot be written"),
    ):
        with pytest.raises(UserError, match=says) as error:
            export(path, out, format)
        one_sentence(error)
    with pytest.raises(UserError, match="no study 'vgg'"):
        export(path, tmp_path / "x.csv", study="vgg")
    with pytest.raises(UserError, match="There is no journal"):
        export(tmp_path / "none.sqlite", tmp_path / "x.csv")
    assert not list(tmp_path.glob(".*part"))
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(("name", "package"), [("runs.parquet", "pyarrow"), ("board", "tensorboard")])
def test_a_missing_package_names_the_extra(tmp_path, path, monkeypatch, name, package):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"needs {package}.*not installed: pip install 'normwright\[export\]'"
    ) as error:
        export(path, tmp_path / name)
    one_sentence(error)
    assert not (tmp_path / name).exists()


def test_an_empty_journal(tmp_path):
    Journal(tmp_path / "journal.sqlite").close()
    export(tmp_path / "journal.sqlite", tmp_path / "runs.csv")
    assert rows_of(tmp_path / "runs.csv") == []
    pytest.importorskip("pyarrow")
    assert len(export(tmp_path / "journal.sqlite", tmp_path / "runs.parquet")) == 2
