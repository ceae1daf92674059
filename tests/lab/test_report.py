"""The report: the numbers on the page are the journal's, names are escaped, and a real browser draws every plot."""

import dataclasses
import errno
import html
import json
import os
import re
import shutil

import pytest

from normwright.lab import report
from normwright.lab.errors import UserError
from normwright.lab.journal import Journal
from normwright.studies.lenet import STUDY

ENVIRONMENT = {
    "python": "3.11.0", "torch": "2.13.0", "numpy": "2.0.0", "normwright": "0.1.0", "platform": "Linux", "cpu": "a cpu",
    "cores": 2, "threads": 2, "gpu": None, "commit": "abc123",
}  # fmt: skip
BN = {0: 0.80, 1: 0.84, 2: 0.82}
RECALIBRATED = {0: 0.87, 1: 0.88, 2: 0.875}
NONE = {0: 0.80, 1: 0.81}  # seed 2 diverges


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_journal(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(folder):
    with Journal(folder / "journal.sqlite", mode="read") as journal:
        return report.collect(journal)


def text_of(markup):
    return re.sub(
        r"\s+", " ", html.unescape(re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", markup, flags=re.S))
    )


def test_the_page_holds_the_journals_numbers(page):
    rows = {(row.arm, row.metric): row for row in page.rows}
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
    assert [found.word for _, found, _ in page.verdicts] == ["undecided", "holds", "holds"]
    assert [(run.arm, run.seed) for run in page.failures] == [("none", 2)]


def test_what_the_reader_reads(page):
    text = text_of(report.render(page))
    for expected in (
        "LeNet with and without batch norm",
        "? undecided +1.5 points",
        "0.820 0.020",  # mean and deviation of the running average
        "0.875 ± 0.005",  # ours, recalibrated
        "batch norm written by hand single run 0.272 0.899 0.864",
        "nn.BatchNorm, public re-runs n = 49 – – 0.821 ± 0.049",
        "diverged no norm, seed 2, in epoch 1: the train loss was nan",
        "1 of 6 runs diverged or failed",
        "normwright study lenet --data 'fashion-mnist'",
        "sha256 " + "d" * 64,
        "torch 2.13.0",
        "abc123",
        "0, 1, 2; a seed fixes",
        "60,000 images to train",
    ):
        assert expected in text, expected
    assert "do not compare" not in text


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


def test_names_are_escaped_everywhere(tmp_path):
    evil = "<script>window.hacked=1</script>'\"&"
    description = STUDY.description()
    description["arms"] = [{"name": "bn", "label": evil}, {"name": "none", "label": "<b>none"}]
    markup = report.draw(write_journal(tmp_path, data=evil, description=description)).read_text()
    assert "<script>window.hacked" not in markup
    assert "<b>none" not in markup
    embedded = re.search(r'<script type="application/json" id="figures">(.*?)</script>', markup, re.S)[1]
    assert "<" not in embedded
    names = [t.get("name") for t in json.loads(embedded)["plot-test"]["traces"] if t.get("name")]
    assert "&lt;b&gt;none" in names


def test_figures_hold_every_seed_and_nothing_that_is_not_json(page):
    found = report.figures(page)
    json.dumps(found, allow_nan=False)
    assert set(found) == {"plot-contrasts", "plot-final", "plot-test", "plot-loss"}
    dots = [t for t in found["plot-final"]["traces"] if "text" in t]
    assert [len(t["x"]) for t in dots] == [3, 3, 3, 2]
    assert dots[0]["x"] == pytest.approx(list(BN.values()))
    thick = [t for t in found["plot-test"]["traces"] if t.get("name")]
    assert [t["name"] for t in thick] == ["batch norm, running average", "batch norm, recalibrated", "no norm"]
    assert thick[0]["y"] == pytest.approx([0.82 * 0.9, 0.82])


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


def test_points_have_a_true_minus_and_zero_no_sign():
    assert [report.points(v) for v in (0.0123, -0.0123, -0.0001)] == ["+1.2", "−1.2", "0.0"]


def test_more_arms_than_colours(page):
    many = {f"arm{i}": f"arm {i}" for i in range(12)}
    rows = tuple(dataclasses.replace(page.rows[0], arm=name, label=label) for name, label in many.items())
    found = report.figures(dataclasses.replace(page, labels=many, rows=rows, verdicts=(), runs=()))
    colours = [t["marker"]["color"] for t in found["plot-final"]["traces"] if "text" in t]
    assert colours[:9] == [f"--arm-{i % 8}" for i in range(9)]


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


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_in_a_browser(folder, browser, width, scheme):
    path = report.draw(folder)
    assert path.stat().st_size < 6_000_000
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot[data-drawn]').length === 4", timeout=60_000)
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for name in ("plot-contrasts", "plot-final", "plot-test", "plot-loss"):
        assert page.locator(f"#{name} svg .scatterlayer .trace").count() >= 2, name
        box = page.locator(f"#{name} .main-svg").first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1
    # The colours are those of the theme.
    expected = {"light": "rgb(0, 114, 178)", "dark": "rgb(88, 177, 238)"}[scheme]
    dot = page.locator("#plot-final .trace .points path").first
    assert dot.evaluate("e => getComputedStyle(e).fill") == expected
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    # On its way the mouse crosses other marks, so the text is waited for.
    page.locator("#plot-final .hoverlayer .hovertext", has_text="seed 0: 0.8000").wait_for(timeout=10_000)
    # A column sorts from the keyboard, and says so to a screen reader.
    button = page.locator("table.sortable thead button", has_text="Seed")
    button.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.locator("table.sortable th[aria-sort=descending]").count() == 1
    assert page.locator("table.sortable tbody tr").first.locator("td").first.text_content() == "2"
    context.close()
