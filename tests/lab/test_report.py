"""The report: the numbers on the page are the journal's, names are escaped, and a real browser draws every plot."""

import base64
import dataclasses
import errno
import gzip
import html
import json
import math
import os
import re
import shutil

import numpy as np
import pytest

from normwright.lab import report
from normwright.lab.errors import UserError
from normwright.lab.figures import Pictures, Plot, Table, as_json, curves, heatmap
from normwright.lab.journal import Journal
from normwright.lab.study import Arm, Contrast, Metric, Published, Study

ENVIRONMENT = {
    "python": "3.11.0", "torch": "2.13.0", "numpy": "2.0.0", "normwright": "0.1.0", "platform": "Linux", "cpu": "a cpu",
    "cores": 2, "threads": 2, "gpu": None, "commit": "abc123",
}  # fmt: skip
BN = {0: 0.80, 1: 0.84, 2: 0.82}
RECALIBRATED = {0: 0.87, 1: 0.88, 2: 0.875}
NONE = {0: 0.80, 1: 0.81}  # seed 2 diverges


def figures(test, sd=None, train=None, loss=None):
    own = {"test_acc": (test, sd)}
    return own if train is None else {**own, "train_acc": (train, None), "train_loss": (loss, None)}


STUDY = Study(
    name="lenet",
    title="LeNet with and without batch norm",
    question="Does batch norm make LeNet better?",
    claim="With batch norm, LeNet is more than a point better.",
    source="arXiv:1502.03167",
    arms=(Arm("bn", "batch norm", {"norm": "bn", "lr": 1.0}), Arm("none", "no norm", {"norm": "none", "lr": 0.9})),
    build=None,
    contrasts=(
        Contrast("batch norm against no norm, as trained", ("bn", "test_acc"), ("none", "test_acc")),
        Contrast("batch norm recalibrated against no norm", ("bn", "test_acc_recalibrated"), ("none", "test_acc")),
        Contrast("recalibrated against as trained", ("bn", "test_acc_recalibrated"), ("bn", "test_acc")),
    ),
    fixed={"epochs": 2},
    nuisance={"lr": 1.0},
    published=(
        Published("batch norm written by hand", "bn", 1, figures(0.864, None, 0.899, 0.272)),
        Published("without the 1st", None, 1, figures(0.769, None, 0.899, 0.272)),
        Published("nn.BatchNorm, public re-runs", "bn", 49, figures(0.821, 0.049), ".571 to .884"),
    ),
    published_data="fashion-mnist",
)


def settings(data="fashion-mnist", seeds=3):
    arms = {
        "bn": {"epochs": 2, "lr": 1.0, "norm": "bn"},
        "none": {"epochs": 2, "lr": 0.9, "norm": "none"},
    }
    return {
        "data": data, "data_source": f"made up as {data}", "n_train": 60000, "n_test": 10000, "shape": [1, 28, 28],
        "seeds": list(range(seeds)), "device": "cpu", "engine": "sequential", "arms": arms,
    }  # fmt: skip


def write_journal(folder, data="fashion-mnist", seeds=3, description=None, finish=True):
    """A journal as a study leaves it, with known figures."""
    config = {"description": description or STUDY.description(), "settings": settings(data, seeds)}
    with Journal(folder / "journal.sqlite") as journal:
        study = journal.create_study(
            "lenet", config, source="text", data_sha256="d" * 64, command=f"normwright study lenet --data '{data}'",
            environment=ENVIRONMENT,
        )  # fmt: skip
        for seed in range(seeds):
            for arm in ("bn", "none"):
                journal.add_run(study.id, arm, seed, config["settings"]["arms"][arm])
        while finish and (run := journal.claim_run(study.id)):
            if run.arm == "none" and run.seed not in NONE:
                metrics = {"train_loss": float("nan"), "train_acc": 0.1, "train_seconds": 1.0}
                journal.record_epoch(run.id, 0, metrics)
                journal.finish_run(run.id, metrics, status="diverged", error="the train loss was nan")
                continue
            for epoch, share in enumerate((0.9, 1.0)):
                test = {"test_acc": (BN if run.arm == "bn" else NONE)[run.seed] * share, "test_loss": 0.6}
                if run.arm == "bn":
                    test |= {"test_acc_recalibrated": RECALIBRATED[run.seed] * share, "test_acc_batch": 0.86 * share}
                metrics = {"train_loss": 0.5 / (epoch + 1), "train_acc": 0.9, **test, "train_seconds": 1.25}
                journal.record_epoch(run.id, epoch, metrics)
            journal.finish_run(run.id, metrics)
    return folder


AXIS = Study(
    name="rates",
    title="How large a learning rate",
    question="Over how many decades?",
    claim="Half a decade more with batch norm.",
    source="made up",
    arms=tuple(
        Arm(f"{norm}-{rate:g}", f"{norm} at {rate:g}", {"norm": norm, "lr": rate}, series=norm, at=rate)
        for norm in ("batch norm", "no norm")
        for rate in (0.01, 0.1, 1.0, 10.0)
    ),
    build=None,
    contrasts=(
        Contrast("decades, batch norm against none", ("batch norm", "decades"), ("no norm", "decades"), 0.5),
        Contrast("accuracy at the largest rate", ("batch norm-10", "test_acc"), ("no norm-10", "test_acc"), -0.01),
    ),
    fixed={"epochs": 3, "validation": 50},
    nuisance={"momentum": 0.0},
    metrics=(
        Metric("test_acc", "test accuracy", "share", "higher"),
        Metric("decades", "decades of learning rate", "number", "higher"),
    ),
    axis=Metric("lr", "learning rate"),
    tune={"momentum": [0.0, 0.9]},
)


def accuracy(arm, momentum, seed):
    """What write_axis records: exact in binary, so that the page's numbers can be worked out by hand."""
    norm, rate = arm.split("-")
    loss = abs(math.log10(float(rate)) + 0.5) / (4 if norm == "batch norm" else 2)
    return 0.875 - loss / 4 + momentum / 64 + seed / 256


def write_axis(folder, study=AXIS, drawn=(), seeds=3):
    """A study over an axis, tuned, with a conclusion and figures of its own."""
    arms = {arm.name: {**study.fixed, **study.nuisance, **arm.settings} for arm in study.arms}
    config = {"description": study.description(), "settings": {**settings("digits", seeds), "arms": arms}}
    with Journal(folder / "journal.sqlite") as journal:
        recorded = journal.create_study(
            study.name, config, source="text", data_sha256="e" * 64, command="normwright study rates",
            environment=ENVIRONMENT,
        )  # fmt: skip
        for seed in range(seeds):
            for arm, own in arms.items():
                for momentum in study.tune["momentum"]:
                    journal.add_run(recorded.id, arm, seed, {**own, "momentum": momentum})
        while run := journal.claim_run(recorded.id):
            value = accuracy(run.arm, run.config["momentum"], run.seed)
            for epoch in range(3):
                share = value * (epoch + 1) / 3
                metrics = {"train_loss": 1 - share, "val_acc": share, "test_acc": share}
                journal.record_epoch(run.id, epoch, metrics)
            journal.finish_run(run.id, metrics)
        results = {
            "batch norm": {str(seed): {"decades": 2.0 + seed / 8} for seed in range(seeds)},
            "no norm": {str(seed): {"decades": 1.0} for seed in range(seeds)},
        }
        journal.store(recorded.id, "conclusion", {"results": results, "figures": [as_json(each) for each in drawn]})
    return folder


def own_figures(title="Loss around the weights"):
    bowl = np.add.outer(np.linspace(-1, 1, 9) ** 2, np.linspace(-1, 1, 9) ** 2)
    contours = heatmap(bowl, np.linspace(-1, 1, 9), np.linspace(-1, 1, 9), "first", "second", "loss", contours=True)
    corners = Table("", "", ["corner", "loss"], [["a", 2.0], ["b", None], ["c", -1.5], ["d", -10.25], ["e", 0.5]])
    lines = curves({title: ([1.0, 10.0], {0: [1.0, 2.0], 1: [1.5, None]})}, title, "height", log_x=True)
    images = [("zero", np.zeros((4, 4))), ("one", np.ones((4, 4, 3)))]
    return (
        Plot(title, "A bowl.", *contours, corners),
        Plot("Lines", "Two seeds.", *lines),
        Pictures("Input gradients", "By digit.", [(title, images)]),
        corners,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_journal(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def axis_folder(tmp_path_factory):
    return write_axis(tmp_path_factory.mktemp("axis"), drawn=own_figures())


def read(folder):
    with Journal(folder / "journal.sqlite", mode="read") as journal:
        return report.collect(journal)


@pytest.fixture(scope="module")
def page(folder):
    return read(folder)


def text_of(markup):
    return re.sub(
        r"\s+", " ", html.unescape(re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", markup, flags=re.S))
    )


def figures_of(markup):
    embedded = re.search(r'<script type="application/json" id="figures">(.*?)</script>', markup, re.S)[1]
    assert "<" not in embedded
    return {each["id"]: each for each in json.loads(embedded)}


def test_the_page_holds_the_journals_numbers(page):
    rows = {(row.arm, row.metric.name): row for row in page.rows}
    assert list(rows) == [
        ("bn", "test_acc"),
        ("bn", "test_acc_recalibrated"),
        ("bn", "test_acc_batch"),
        ("none", "test_acc"),
    ]
    assert rows["bn", "test_acc"].values == pytest.approx(BN)
    assert rows["bn", "test_acc"].summary.mean == pytest.approx(0.82)
    assert rows["bn", "test_acc"].summary.sd == pytest.approx(0.02)
    assert rows["none", "test_acc"].evaluation == "as trained"
    effects = [(found.n, found.effect, seeds) for _, found, seeds in page.verdicts]
    assert effects[0] == (2, pytest.approx((0.0 + 0.03) / 2), (0, 1))
    assert effects[2] == (3, pytest.approx((0.07 + 0.04 + 0.055) / 3), (0, 1, 2))
    assert [(run.arm, run.seed) for run in page.failures] == [("none", 2)]


def test_what_the_reader_reads(page):
    text = text_of(report.render(page))
    for expected in (
        "LeNet with and without batch norm",
        "? undecided +1.5 points",
        "0.820 ± 0.020",  # mean and deviation of the running average
        "0.875 ± 0.005",  # ours, recalibrated
        "batch norm written by hand published single run 0.272 0.899 0.864",
        "nn.BatchNorm, public re-runs (.571 to .884) published n = 49 – – 0.821 ± 0.049",
        "batch norm, as trained this study n = 3 0.250 ± 0.000 0.900 ± 0.000 0.820 ± 0.020",
        "batch norm, recalibrated this study n = 3 – – 0.875 ± 0.005",
        "without the 1st published single run",
        "diverged no norm, seed 2, in epoch 1: the train loss was nan",
        "1 of 6 runs diverged or failed",
        "normwright study lenet --data 'fashion-mnist'",
        "sha256 " + "d" * 64,
        "torch 2.13.0",
        "Engine sequential",
        "abc123",
        "0, 1, 2; a seed fixes",
        "60,000 images to train",
        "The same in every arm: epochs 2.",
    ):
        assert expected in text, expected
    assert "do not compare" not in text


def test_contrasts_say_p_improvement_and_what_could_be_found(page):
    text = text_of(report.render(page))
    _, found, _ = page.verdicts[2]
    # Differences 0.07, 0.04, 0.055: mean 0.055, deviation 0.015, t = (0.055 − 0.01)/(0.015/√3) = 5.196 at 2 degrees
    # of freedom, whose two-sided p is 1 − t/√(2 + t²) = 0.0351; of the two that explain it is the larger, which Holm
    # leaves as it is.
    assert found.p == pytest.approx(1 - 5.196152 / math.sqrt(2 + 27), abs=1e-6)
    assert found.p_holm == pytest.approx(found.p)
    row = "recalibrated against as trained ✓ holds +5.5 points +1.8 to +9.2 0.035 0.035 100% +1.0"
    assert row in text


def test_an_axis_tuning_and_own_figures(axis_folder):
    text = text_of(report.draw(axis_folder).read_text())
    for expected in (
        "+1.12 in decades of learning rate 95% interval +0.814 to +1.44",  # t(2) = 4.303 · 0.125/√3 = 0.3105
        "momentum 0.0 momentum 0.9",
        "batch norm at 0.01 0.785 ± 0.004 taken 0.799 ± 0.004",  # 0.875 − 1.5/16 + 1/256 (+ 0.9/64)
        "Test accuracy over the learning rate.",
        "batch norm at 10 10 3 0.799 0.004 0.799 0.799",
        "Loss around the weights",
        "Decades of learning rate",
        "Tuned alike for every arm: momentum.",
    ):
        assert expected in text, expected
    drawn = figures_of((axis_folder / "report.html").read_text())
    lines = [t for t in drawn["plot-axis-0"]["traces"] if t["meta"]["part"] == "mean"]
    assert [line["name"] for line in lines] == ["batch norm", "no norm"]
    assert lines[0]["x"] == [0.01, 0.1, 1.0, 10.0]
    expected = [accuracy(f"batch norm-{rate}", 0.9, 1) for rate in ("0.01", "0.1", "1", "10")]
    assert lines[0]["y"] == pytest.approx(expected)
    assert drawn["plot-axis-0"]["layout"]["xaxis"]["type"] == "log"
    dots = next(t for t in drawn["plot-axis-0"]["traces"] if t["meta"]["part"] == "seed")
    assert len(dots["x"]) == 12
    assert "plot-axis-1" not in drawn
    # The arms lie on the axis; what the dots show by row is the series alone.
    assert drawn["plot-final-0"]["layout"]["meta"]["rows"] == ["batch norm", "no norm"]
    assert [key for key in drawn if "own" in key] == ["plot-own-0", "plot-own-1"]
    assert 'alt="Input gradients: Loss around the weights, zero"' in (axis_folder / "report.html").read_text()


def test_other_data_is_not_set_beside_published_figures(tmp_path):
    text = text_of(report.draw(write_journal(tmp_path, data="digits")).read_text())
    assert "The published figures are for fashion-mnist; these runs used digits . The two do not compare." in text


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    text = text_of(report.draw(write_journal(tmp_path, seeds=1)).read_text())
    assert "no interval: one seed" in text
    assert "One seed has no interval" in text
    assert "· 1 seed " in text


def test_runs_that_have_not_finished_are_announced(tmp_path):
    text = text_of(report.draw(write_journal(tmp_path, finish=False)).read_text())
    assert "6 of 6 runs have not finished; the same command with --resume goes on" in text
    assert "no run finished" in text


EVIL = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>'\"&%{x}--ink"


def evil_study():
    arms = tuple(dataclasses.replace(arm, label=f"{EVIL} {arm.at}", series=f"{EVIL} {arm.series}") for arm in AXIS.arms)
    contrasts = [dataclasses.replace(AXIS.contrasts[1], text=EVIL)]
    texts = dict.fromkeys(("title", "question", "claim", "source"), EVIL)
    metrics = tuple(dataclasses.replace(metric, label=f"{EVIL} {metric.name}") for metric in AXIS.metrics)
    axis = Metric("lr", EVIL)
    return dataclasses.replace(AXIS, arms=arms, contrasts=tuple(contrasts), metrics=metrics, axis=axis, **texts)


def test_names_are_escaped_everywhere(tmp_path):
    markup = report.draw(write_axis(tmp_path, evil_study(), own_figures(EVIL))).read_text()
    assert "<script>window.hacked" not in markup
    assert "<img src=x" not in markup
    drawn = figures_of(markup)
    # A key names a line for the page's own script; everything else may be drawn.
    texts = json.dumps([{**each, "traces": [{**t, "meta": None} for t in each["traces"]]} for each in drawn.values()])
    assert "<script" not in texts
    assert "<img" not in texts
    lines = [t for t in drawn["plot-axis-0"]["traces"] if t["meta"]["part"] == "mean"]
    assert lines[0]["name"].startswith("&lt;script&gt;")
    assert "%{x}" not in lines[0]["name"]


def test_a_stored_figure_with_markup_is_inert_and_keeps_its_lines():
    found = report._inert({"a": ["x<br>y", "<b>z</b>", "<a href='javascript:1'>q</a>", "<B onclick=1>", 3, None]})
    assert found == {"a": ["x<br>y", "<b>z</b>", "&lt;a href='javascript:1'>q&lt;/a>", "&lt;B onclick=1>", 3, None]}


def test_figures_hold_every_seed_and_nothing_that_is_not_json(page):
    found = report.figures(page)
    json.dumps(found, allow_nan=False)
    assert {key: len(plots) for key, plots in found.items()} == {
        "contrasts": 1, "final": 1, "axis": 0, "curves": 3, "own": 0,
    }  # fmt: skip
    dots = found["final"][0]["traces"][0]
    assert len(dots["x"]) == 3 + 3 + 3 + 2
    assert dots["x"][:3] == pytest.approx(list(BN.values()))
    trained, again, loss = found["curves"]
    thick = [t for t in trained["traces"] if t["meta"]["part"] == "mean"]
    assert [t["name"] for t in thick] == ["batch norm", "no norm"]
    assert thick[0]["y"] == pytest.approx([0.82 * 0.9, 0.82])
    thin = next(t for t in trained["traces"] if t["meta"] == {"key": "bn", "part": "seed"})
    assert thin["y"] == pytest.approx([0.72, 0.80, None, 0.756, 0.84, None, 0.738, 0.82, None])
    assert [t["name"] for t in again["traces"] if t["meta"]["part"] == "mean"] == ["batch norm"]
    assert loss["layout"]["yaxis"]["type"] == "log"


def test_arms_of_a_series_share_its_colour(axis_folder):
    page = read(axis_folder)
    colours = [report._colour(page, arm.name) for arm in AXIS.arms]
    assert colours == ["--arm-0"] * 4 + ["--arm-1"] * 4
    assert report._colour(page, "no norm") == "--arm-1"
    looks = {(report._symbol(page, arm.name), report._dash(page, arm.name)) for arm in AXIS.arms[:4]}
    assert len(looks) == 4


def test_more_arms_than_colours(page):
    many = {f"arm{i}": f"arm {i}" for i in range(21)}
    study = {**page.study, "arms": [{"name": name, "label": label} for name, label in many.items()]}
    rows = tuple(dataclasses.replace(page.rows[0], arm=name, label=label) for name, label in many.items())
    large = dataclasses.replace(page, study=study, labels=many, rows=rows, verdicts=(), runs=(), counted=())
    found = report.figures(large)
    colours = found["final"][0]["traces"][0]["marker"]["color"]
    assert colours[::3] == [f"--arm-{i % 8}" for i in range(21)]
    looks = {(report._colour(large, n), report._symbol(large, n), report._dash(large, n)) for n in many}
    assert len(looks) == 21


def test_a_study_too_large_for_a_page_is_thinned_until_it_fits(page, monkeypatch):
    rng = np.random.default_rng(0)
    run = page.counted[0]
    runs = tuple(dataclasses.replace(run, id=i, arm="bn" if i % 2 else "none", seed=i // 2) for i in range(120))
    epochs = {i: {e: {"test_acc": float(v)} for e, v in enumerate(rng.random(800))} for i in range(120)}
    noise = {"kind": "plot", "title": "noise", "caption": "", "traces": [{"y": rng.random(60_000).tolist()}]}
    large = dataclasses.replace(
        page, runs=runs, counted=runs, curves=epochs, figures=({**noise, "layout": {}, "table": None},) * 4
    )
    text = report.render(large)
    assert len(text.encode()) < 6_000_000
    assert "Left out: this figure takes 1." in text_of(text)
    drawn = figures_of(text)
    assert max(len(t["x"]) for t in drawn["plot-curves-0"]["traces"] if t["meta"]["part"] == "mean") == 200
    assert "So many runs leave room for means and bands alone" in text_of(text)


def test_plotly_lies_in_the_page_once_and_whole(folder):
    from plotly.offline import get_plotlyjs

    markup = report.draw(folder).read_text()
    (packed,) = re.findall(r'id="plotly">([^<]+)<', markup)
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()


@pytest.mark.parametrize(
    ("value", "decimals", "signed", "text"),
    [
        (0.8204, 3, False, "0.820"), (-0.0123, 3, True, "−0.012"), (-0.00001, 3, True, "0.000"),
        (1234.5, 1, False, "1,234.5"), (1.2345, None, True, "+1.23"), (260.4, None, False, "260"),
        (0.0, None, True, "0"), (-0.0456, None, False, "−0.0456"), (1.234e-7, None, False, "1.23×10⁻⁷"),
        (-6.02e23, None, True, "−6.02×10²³"), (math.inf, 3, False, "inf"),
    ],
)  # fmt: skip
def test_numbers_are_written_with_their_digits(value, decimals, signed, text):
    assert report.written(value, decimals, signed) == text


def test_points_have_a_true_minus_and_zero_no_sign():
    assert [report.points(v) for v in (0.0123, -0.0123, -0.0001)] == ["+1.2", "−1.2", "0.0"]


def test_decimals_serve_all_values_or_none():
    assert report.decimals([0.5, 1.234]) == 3
    assert report.decimals([120.0, 45.0]) == 1
    assert report.decimals([0.272]) == 3
    assert report.decimals([1500.0, 5.0]) is None
    assert report.decimals([]) == 3


def test_it_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    report.draw(copy).write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        report.draw(copy)
    assert (copy / "report.html").read_text() == "old"
    assert not [name for name in os.listdir(copy) if "report" in name and name != "report.html"]


def test_a_folder_without_a_journal(tmp_path):
    with pytest.raises(UserError, match="no journal in"):
        report.draw(tmp_path)
    with pytest.raises(UserError, match="nor in a folder in it"):
        report.draw_index(tmp_path)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A folder of studies, one with an unpleasant name, one that is no journal and one that is not ours."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("a lenet #1 %20", "rates", "junk", "foreign"):
        (root / name).mkdir()
    write_journal(root / "a lenet #1 %20")
    write_axis(root / "rates", evil_study())
    (root / "junk" / "journal.sqlite").write_bytes(b"no database" * 50)
    with Journal(root / "foreign" / "journal.sqlite") as journal:
        journal.create_study("mine", {}, environment=ENVIRONMENT)
    report.draw_index(root)
    return root


def test_the_index_lists_every_study_and_what_it_could_not_draw(several):
    markup = (several / "index.html").read_text()
    text = text_of(markup)
    assert "LeNet with and without batch norm Does batch norm make LeNet better?" in text
    assert "? undecided +1.5 points, −17.6 to +20.6" in text
    assert "junk : junk/journal.sqlite is no journal" in text
    assert "foreign : This journal was not written by `normwright study`" in text
    assert "<script>window.hacked" not in markup
    assert str(several) not in markup
    for name in ("a lenet #1 %20", "rates"):
        assert (several / name / "report.html").is_file()
    # The effect lies where it belongs between zero and the ends of the interval.
    zero, effect, low, high = (
        float(re.search(pattern, markup)[1])
        for pattern in (
            r'"zero" x1="([\d.]+)%',
            r'cx="([\d.]+)%',
            r'"interval" x1="([\d.]+)%',
            r'"interval".*?x2="([\d.]+)%',
        )
    )
    assert low < zero < effect < high
    # That interval is the widest of all; a twenty-fifth of it is left free at either end.
    assert (low, high) == (pytest.approx(100 * 0.04 / 1.08, abs=0.01), pytest.approx(100 * 1.04 / 1.08, abs=0.01))
    assert (effect - zero) / (high - zero) == pytest.approx(1.5 / 20.56, abs=0.01)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium on this machine (set CHROMIUM to its path)")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield found
        found.close()


class Visit:
    """A page open in the browser, with what it said on the console and asked of the network."""

    def __init__(self, browser, path, width=1200, scheme="light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        self.page, self.said, self.asked = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        count = self.page.locator(".plot").count()
        self.page.wait_for_function(
            "n => document.querySelectorAll('.plot[data-drawn]').length === n", arg=count, timeout=60_000
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            assert self.said == []
            assert [url for url in self.asked if not url.startswith(("file:", "data:", "blob:"))] == []
            assert self.page.evaluate("window.hacked === undefined")
        self.context.close()

    def drawn(self, width):
        """Every plot has marks, and lies within the page."""
        for place in self.page.locator(".plot").all():
            name = place.get_attribute("id")
            assert place.locator(".scatterlayer .trace, .contourlayer .contour, .heatmaplayer image").count(), name
            box = place.locator(".main-svg").first.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width + 1, name


def sorted_by(page, table, header):
    """The first cells of a table's rows once its column was sorted, upwards and downwards, by keyboard."""
    button = page.locator(f"{table} thead button", has_text=header)
    orders = []
    for state in ("ascending", "descending"):
        button.focus()
        page.keyboard.press("Enter")
        assert page.locator(f"{table} th[aria-sort={state}]").count() == 1
        orders.append([row.text_content() for row in page.locator(f"{table} tbody tr > :first-child").all()])
    return orders


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_in_a_browser(folder, browser, width, scheme):
    path = report.draw(folder)
    assert path.stat().st_size < 6_000_000
    with Visit(browser, path, width, scheme) as visit:
        page = visit.page
        assert page.locator(".plot").count() == 5
        visit.drawn(width)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # The colours are those of the theme.
        expected = {"light": "rgb(0, 114, 178)", "dark": "rgb(88, 177, 238)"}[scheme]
        dot = page.locator("#plot-final-0 .trace .points path").first
        assert dot.evaluate("e => getComputedStyle(e).fill") == expected
        dot.scroll_into_view_if_needed()
        box = dot.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2)
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
        # On its way the mouse crosses other marks, so the text is waited for.
        said = "batch norm, running average, seed 0: 0.8000"
        page.locator("#plot-final-0 .hoverlayer .hovertext", has_text=said).wait_for(timeout=10_000)
        # Names of rows are beside them, or above them where the screen is narrow.
        labels = page.locator("#plot-final-0 .ytick text").count(), page.locator("#plot-final-0 .annotation").count()
        assert labels == ((2, 0) if width > 640 else (0, 2))
        seeds = [int(page.locator("#all-runs tbody tr").nth(i).locator("td").first.text_content()) for i in (0, 5)]
        assert seeds == [0, 2]
        sorted_by(page, "#all-runs", "Seed")
        assert page.locator("#all-runs tbody tr").first.locator("td").first.text_content() == "2"


@pytest.mark.slow
def test_tables_sort_by_number_and_leave_empty_cells_last(axis_folder, browser):
    with Visit(browser, report.draw(axis_folder)) as visit:
        visit.drawn(1200)
        page = visit.page
        page.locator(".own details summary").first.click()
        up, down = sorted_by(page, ".own details table", "loss")
        assert up == ["d", "c", "e", "a", "b"]  # −10.25, −1.5, 0.5, 2, nothing
        assert down == ["a", "e", "c", "d", "b"]
        tables, sortable = page.locator("table").count(), page.locator("table.sortable thead button").count()
        assert tables == page.locator("table.sortable").count()
        assert sortable == page.locator("table thead th").count()
        assert page.locator(".picture img").evaluate_all("all => all.map(i => [i.naturalWidth, i.alt])") == [
            [96, "Input gradients: Loss around the weights, zero"],
            [96, "Input gradients: Loss around the weights, one"],
        ]  # fmt: skip


@pytest.mark.slow
def test_the_legend_brings_one_arm_forward(axis_folder, browser):
    shown = "id => document.getElementById(id).data.filter(t => t.visible !== false).map(t => t.meta.part)"
    with Visit(browser, report.draw(axis_folder)) as visit:
        page = visit.page
        # Eight arms: means alone, until one is chosen, which comes with its seeds and band.
        assert page.evaluate(shown, "plot-curves-0") == ["mean"] * 8
        button = page.locator(".legend button", has_text="no norm at 0.1")
        button.focus()
        page.keyboard.press("Space")
        page.wait_for_function(f"() => ({shown})('plot-curves-0').length === 10")
        assert sorted(page.evaluate(shown, "plot-curves-0")) == ["band", *["mean"] * 8, "seed"]
        assert button.get_attribute("aria-pressed") == "true"
        button.click()
        page.wait_for_function(f"() => ({shown})('plot-curves-0').length === 8")
        assert button.get_attribute("aria-pressed") == "false"
        # Two series are few enough to be seen whole from the start.
        assert len(page.evaluate(shown, "plot-axis-0")) == 6
        # The first stop of the keyboard leads past the header.
        page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#main"


@pytest.mark.slow
def test_on_paper_it_is_light_and_unfolded(axis_folder, browser):
    with Visit(browser, report.draw(axis_folder), scheme="dark") as visit:
        page = visit.page
        line = page.locator("#plot-axis-0 .scatterlayer .trace .lines path").first
        dark = line.evaluate("e => getComputedStyle(e).stroke")
        page.emulate_media(media="print", color_scheme="dark")
        page.wait_for_function(
            "([path, d]) => getComputedStyle(document.querySelector(path)).stroke !== d",
            arg=["#plot-axis-0 .scatterlayer .trace .lines path", dark],
        )
        assert line.evaluate("e => getComputedStyle(e).stroke") == "rgb(0, 114, 178)"
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 33, 38)"
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details:not([open])").count() > 0
        assert page.pdf()[:5] == b"%PDF-"


@pytest.mark.slow
def test_the_index_in_a_browser(several, browser):
    for width, scheme in ((1200, "light"), (390, "dark")):
        with Visit(browser, several / "index.html", width, scheme) as visit:
            page = visit.page
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.locator(".chart circle").count() == 2
            if width > 640:
                up, down = sorted_by(page, ".studies", "Effect")
                assert up == down[::-1]
            page.locator("a.title", has_text="LeNet").click()
            # The page's policy forbids evaluating text, hence functions.
            page.wait_for_function("() => document.querySelectorAll('.plot[data-drawn]').length === 5", timeout=60_000)
            assert page.title() == "LeNet with and without batch norm · normwright"
            page.go_back()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_unpleasant_names_do_nothing(tmp_path, browser, width):
    path = report.draw(write_axis(tmp_path, evil_study(), own_figures(EVIL)))
    with Visit(browser, path, width) as visit:
        visit.drawn(width)
        page = visit.page
        assert page.locator("img[src=x]").count() == 0
        page.locator(".legend button").first.click()
        line = page.locator("#plot-axis-0 .scatterlayer .trace .points path").last
        line.scroll_into_view_if_needed()
        line.hover(force=True)
        page.locator("#plot-axis-0 .hoverlayer .hovertext", has_text="<img src=x").first.wait_for(timeout=10_000)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_without_scripts_the_tables_stand(folder, browser):
    path = report.draw(folder)
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(path.as_uri())
    assert not page.locator(".plot").first.is_visible()
    assert page.locator("#final table").is_visible()
    assert page.locator("#contrasts table").is_visible()
    context.close()
