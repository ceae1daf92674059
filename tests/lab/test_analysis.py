"""The analysis: tuning, conclusions, contrasts and summaries, each against numbers worked out by hand."""

import json
import math

import pytest

from normwright.lab import analysis
from normwright.lab.journal import Journal
from normwright.lab.study import Arm, Contrast, Metric, Study

ENVIRONMENT = {"python": "3.11.0", "torch": "2.13.0", "numpy": "2.0.0", "normwright": "0.1.0", "platform": "Linux"}
SHARE = Metric("test_acc", "test accuracy", "share", "higher")
WIDTH = Metric("width", "width of the basin", "number", "higher")


def study(**changes):
    arms = tuple(
        Arm(f"{norm}-{lr:g}", f"{norm} at {lr:g}", {"norm": norm, "lr": lr}, series=norm, at=lr)
        for norm in ("bn", "none")
        for lr in (0.1, 1.0)
    )
    contrasts = (
        Contrast("wider with batch norm", ("bn", "width"), ("none", "width"), 0.5),
        Contrast("above chance", ("bn-1", "test_acc"), 0.1, 0.0),
        Contrast("the larger rate with batch norm", ("bn-1", "test_acc"), ("bn-0.1", "test_acc")),
        Contrast("recalibrated", ("none-0.1", "test_acc_recalibrated"), ("none-0.1", "test_acc")),
    )
    given = {
        "name": "widths", "title": "Widths", "question": "How wide?", "claim": "Wider.", "source": "made up",
        "arms": arms, "build": None, "contrasts": contrasts, "fixed": {"epochs": 2}, "nuisance": {"momentum": 0.0},
        "metrics": (SHARE, WIDTH), "axis": Metric("lr", "learning rate"), "tune": {"momentum": [0.0, 0.9]},
    }  # fmt: skip
    return Study(**{**given, **changes})


# By arm, momentum and seed: (validation accuracy, test accuracy); None diverges.
RUNS = {
    ("bn-0.1", 0.0): [(0.80, 0.71), (0.82, 0.73), (0.84, 0.75)],  # mean 0.82, taken
    ("bn-0.1", 0.9): [(0.90, 0.91), (0.92, 0.93), None],  # 0.90, 0.92 and 0: mean 0.607
    ("bn-1", 0.0): [(0.50, 0.51), (0.50, 0.52), (0.50, 0.53)],
    ("bn-1", 0.9): [(0.60, 0.76), (0.70, 0.77), (0.80, 0.81)],  # taken
    ("none-0.1", 0.0): [(0.60, 0.61), (0.60, 0.62), (0.60, 0.63)],  # equal: the first is taken
    ("none-0.1", 0.9): [(0.60, 0.64), (0.60, 0.65), (0.60, 0.66)],
    ("none-1", 0.0): [None, None, None],
    ("none-1", 0.9): [None, None, None],
}
CONCLUSION = {
    "results": {
        "bn": {"0": {"width": 2.0}, "1": {"width": 2.5}, "2": {"width": 3.0}},
        "none": {"0": {"width": 1.0}, "1": {"width": 1.25}, "2": {"width": None}},
    },
    "figures": [{"kind": "table", "title": "T", "caption": "", "columns": ["a"], "rows": [[1]]}],
}


def write(folder, asked=None, conclusion=CONCLUSION, command="normwright study widths", source="made up", most=24):
    asked = asked or study()
    arms = {arm.name: {**asked.fixed, **asked.nuisance, **arm.settings} for arm in asked.arms}
    settings = {
        "data": "digits", "data_source": source, "n_train": 100, "n_test": 50, "shape": [1, 8, 8],
        "seeds": [0, 1, 2], "device": "cpu", "engine": "packed", "arms": arms,
    }  # fmt: skip
    with Journal(folder / "journal.sqlite") as journal:
        recorded = journal.create_study(
            asked.name, {"description": asked.description(), "settings": settings}, source="text",
            data_sha256="d" * 64, command=command, environment=ENVIRONMENT,
        )  # fmt: skip
        for seed in range(3):
            for arm, momentum in RUNS:
                journal.add_run(recorded.id, arm, seed, {**arms[arm], "momentum": momentum})
        for _ in range(most):
            run = journal.claim_run(recorded.id)
            found = RUNS[run.arm, run.config["momentum"]][run.seed]
            if found is None:
                journal.record_epoch(run.id, 0, {"train_loss": math.inf})
                journal.finish_run(
                    run.id, {"train_loss": math.inf}, status="diverged", error="inf in /home/me/data/x.bin"
                )
                continue
            for epoch, share in enumerate((0.5, 1.0)):
                metrics = {"train_loss": 1.0 / (epoch + 1), "val_acc": found[0], "test_acc": found[1] * share}
                journal.record_epoch(run.id, epoch, metrics)
            journal.finish_run(run.id, metrics)
        if conclusion is not None:
            journal.store(recorded.id, "conclusion", conclusion)
    return folder


def collect(folder):
    with Journal(folder / "journal.sqlite", mode="read") as journal:
        return analysis.collect(journal)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return collect(write(tmp_path_factory.mktemp("run")))


def test_tuning_takes_the_best_mean_and_a_lost_seed_counts_as_nothing(page):
    tried = {(each.arm, each.settings["momentum"]): each for each in page.tuned}
    assert len(tried) == len(RUNS)
    assert tried["bn-0.1", 0.0].summary.mean == pytest.approx(0.82)
    assert tried["bn-0.1", 0.9].summary.mean == pytest.approx((0.90 + 0.92 + 0) / 3)
    assert tried["bn-0.1", 0.9].diverged == 1
    taken = {key for key, each in tried.items() if each.taken}
    assert taken == {("bn-0.1", 0.0), ("bn-1", 0.9), ("none-0.1", 0.0), ("none-1", 0.0)}


def test_only_the_runs_taken_count(page):
    assert len(page.runs) == 24
    assert {(run.arm, run.config["momentum"]) for run in page.counted} == {
        ("bn-0.1", 0.0), ("bn-1", 0.9), ("none-0.1", 0.0), ("none-1", 0.0),
    }  # fmt: skip
    rows = {(row.arm, row.metric.name): row for row in page.rows}
    assert rows["bn-1", "test_acc"].values == pytest.approx({0: 0.76, 1: 0.77, 2: 0.81})
    assert rows["bn-1", "test_acc"].summary.mean == pytest.approx(0.78)
    assert (rows["bn-1", "test_acc"].series, rows["bn-1", "test_acc"].at) == ("bn", 1.0)
    assert rows["none-1", "test_acc"].summary is None
    assert len(page.failures) == 7


def test_without_tuning_all_runs_count(page):
    assert analysis.counted(page.runs, {}) == page.runs


def test_a_series_has_what_the_study_concluded(page):
    rows = {(row.arm, row.metric.name): row for row in page.rows}
    assert rows["bn", "width"].values == {0: 2.0, 1: 2.5, 2: 3.0}
    assert rows["none", "width"].values == {0: 1.0, 1: 1.25}
    assert ("bn", "test_acc") not in rows
    assert ("bn-1", "width") not in rows
    assert page.series == ["bn", "none"]
    assert page.labels["bn"] == "bn"
    assert page.axis == Metric("lr", "learning rate")


def test_contrasts_of_series_of_arms_and_with_a_constant(page):
    found = {contrast["text"]: (verdict, seeds) for contrast, verdict, seeds in page.verdicts}
    # "recalibrated" is left out: the arm finished without it.
    assert list(found) == ["wider with batch norm", "above chance", "the larger rate with batch norm"]
    verdict, seeds = found["wider with batch norm"]
    assert seeds == (0, 1)
    assert verdict.differences == pytest.approx((1.0, 1.25))
    verdict, seeds = found["above chance"]
    assert verdict.differences == pytest.approx((0.66, 0.67, 0.71))
    assert verdict.effect == pytest.approx(0.68)
    assert verdict.p_holm == pytest.approx(2 * min(v.p for v, _ in list(found.values())[1:]))
    verdict, _ = found["the larger rate with batch norm"]
    assert verdict.differences == pytest.approx((0.05, 0.04, 0.06))
    assert page.decision[0]["text"] == "wider with batch norm"


def test_no_other_contrast_decides_in_place_of_the_first(tmp_path):
    asked = study()
    missing = Contrast("not there", ("gone", "test_acc"), ("bn-1", "test_acc"))
    page = collect(write(tmp_path, study(contrasts=(missing, *asked.contrasts[1:3]))))
    assert page.decision is None
    assert len(page.verdicts) == 2
    assert all(verdict.p_holm is not None for _, verdict, _ in page.verdicts)


def test_a_study_that_has_not_concluded_is_undecided(tmp_path):
    page = collect(write(tmp_path, conclusion=None))
    _, verdict, seeds = page.decision
    assert (verdict.word, verdict.n, seeds) == ("undecided", 0, ())


def test_before_the_last_run_has_ended_no_contrast_is_left_out(tmp_path):
    # bn-1 has finished without the accuracy that a conclusion may yet add.
    late = Contrast("of an ensemble", ("bn-1", "ensemble_acc"), ("bn-1", "test_acc"))
    page = collect(write(tmp_path, study(contrasts=(late,)), conclusion=None, most=8))
    assert len(page.unfinished) == 16
    assert (page.decision[1].word, page.decision[1].n) == ("undecided", 0)


def test_curves_are_means_and_deviations_over_the_runs_that_count(page):
    curve = page.curve("bn-1", "test_acc")
    assert curve.epochs == (1, 2)
    assert curve.mean == pytest.approx((0.39, 0.78))
    # 0.76, 0.77, 0.81: deviations −0.02, −0.01, 0.03, squares 14e-4, over n − 1 = 2
    assert curve.sd[1] == pytest.approx(math.sqrt(14e-4 / 2))
    assert len(curve.seeds) == 3
    assert page.curve("none-1", "train_loss").seeds == ()  # infinite losses are no points
    assert [metric.name for metric in page.curve_metrics()] == ["test_acc", "train_loss"]


def test_metrics_nobody_described_go_by_their_own_name(page):
    assert page.metric("width") == WIDTH
    assert page.metric("train_loss").label == "training loss"
    assert page.metric("top_eigenvalue") == Metric("top_eigenvalue", "top eigenvalue", "number")
    assert page.metric("blurred_acc").form == "share"


def test_the_summary_is_json_with_everything_and_no_folder(tmp_path):
    command = "normwright study '/home/me/my study.py' --data /data/cifar --out=/tmp/a/b --lr 0.1"
    page = collect(write(tmp_path, command=command, source=r"images of /mnt/big/cifar (C:\Users\me\cifar), a/b"))
    found = analysis.summary(page)
    text = json.dumps(found, allow_nan=False)
    for path in ("/home", "/data", "/tmp", "/mnt", "Users"):
        assert path not in text
    assert found["command"] == "normwright study 'my study.py' --data cifar --out=b --lr 0.1"
    assert found["settings"]["data_source"] == "images of cifar (cifar), a/b"
    assert {each["error"] for each in found["failures"]} == {"inf in x.bin"}
    first, second, third = found["verdicts"]
    assert (first["decides"], second["decides"]) == (True, False)
    assert first["form"] == "number"
    assert first["by_seed"] == {"0": 1.0, "1": 1.25}
    assert third["n"] == 3
    assert third["effect"] == pytest.approx(0.05)
    assert third["interval"] == pytest.approx(
        [0.05 - 4.302652729911275 * 0.01 / 3**0.5, 0.05 + 4.302652729911275 * 0.01 / 3**0.5]
    )
    rows = {(row["arm"], row["metric"]): row for row in found["results"]}
    assert rows["bn-1", "test_acc"]["by_seed"] == pytest.approx({"0": 0.76, "1": 0.77, "2": 0.81})
    assert rows["bn-1", "test_acc"]["median"] == pytest.approx(0.77)
    assert rows["none-1", "test_acc"]["mean"] is None
    assert found["data_sha256"] == "d" * 64
    assert found["environment"]["torch"] == "2.13.0"
    assert [each["taken"] for each in found["tuning"]][:2] == [True, False]


def test_urls_are_no_folders(tmp_path):
    page = collect(write(tmp_path, source="from https://example.org/data/cifar.tar.gz"))
    assert analysis.summary(page)["settings"]["data_source"] == "from https://example.org/data/cifar.tar.gz"
