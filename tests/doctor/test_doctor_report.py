"""The report: what it says in each format is what was found, and fixing leaves a model without the fault."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from torch import nn

import normwright as nw
from normwright.doctor.check import Check
from normwright.doctor.report import NotRun, Report, page_markdown

EVIL = "<img src=x onerror=alert(1)>'\"&"


class Untouched(Check):
    """Running statistics are those of a new layer.

    What it does
        It compares `running_var` with 1.

    Why is this bad
        Evaluation is wrong.

    Example
        model = torch.nn.BatchNorm1d(4)

    Use instead
        model = torch.nn.BatchNorm1d(4, track_running_stats=False)

    References
        https://arxiv.org/abs/1502.03167
    """

    code, name, severity, evidence = "NWX01", "untouched", "warning", "measured"

    def find(self, subject):
        for name, module in subject.tracked().items():
            if bool((module.running_var == 1).all()):
                yield self.finding(
                    name, f"{name} was never updated.", help="Recalibrate.", falsify="a variance other than 1",
                    numbers={"largest_mean": module.running_mean.abs().max(), "values": [1.0, float("inf")]},
                    repair=lambda: nw.recalibrate(subject.model, [subject.inputs]),
                )  # fmt: skip


class IdleBias(Check):
    """A bias before batch norm."""

    code, name, severity, evidence = "NWX02", "idle-bias", "error", "proved"

    def find(self, subject):
        names = [name for name, m in subject.modules.items() if isinstance(m, nn.Linear) and m.bias is not None]
        if names:
            yield self.finding(
                names, f"{len(names)} biases do nothing.", help="Drop them.", falsify="outputs that change",
                numbers={"biases": len(names)}, repair=lambda: nw.absorb_bias(subject.model, inputs=subject.inputs),
            )  # fmt: skip


class Batchy(Check):
    """Batch norm at all."""

    code, name, severity, evidence = "NWX03", "batchy", "advice", "advice"

    def find(self, subject):
        for name, module in subject.modules.items():
            if isinstance(module, nn.BatchNorm1d):
                yield self.finding(
                    name, f"{name} is a batch norm.", help="Convert it.", falsify="never",
                    repair=lambda: nw.convert(subject.model, "group", groups=2), safe=False,
                )  # fmt: skip


class Stubborn(Check):
    """A fault that its repair does not remove."""

    code, name, severity, evidence = "NWX04", "stubborn", "warning", "measured"

    def find(self, subject):
        yield self.finding(
            "", "It stays.", help="Live with it.", falsify="it goes", numbers={"n": 1},
            repair=lambda: nw.recalibrate(subject.model, [subject.inputs]),
        )  # fmt: skip


class NeedsLoader(Check):
    """Something about the data."""

    code, name, severity, evidence, needs = "NWX05", "needs-loader", "error", "measured", ("loader",)

    def find(self, subject):
        return ()


@pytest.fixture
def checks(monkeypatch):
    def use(*chosen):
        for name in ("normwright.doctor.diagnose", "normwright.doctor.report"):
            monkeypatch.setattr(sys.modules[name], "all_checks", lambda: chosen)

    use(Untouched, IdleBias, Batchy, NeedsLoader)
    return use


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.BatchNorm1d(4))


@pytest.fixture
def inputs():
    return 3 + 2 * torch.randn(64, 4)


def test_text(checks, inputs):
    model = network()
    nw.intended("NWX01", "it is new")(model[1])
    text = str(nw.diagnose(model, inputs))
    blocks = text.split("\n\n")
    assert blocks[0] == (
        "NWX02 [fixable] error: 2 biases do nothing.\n"
        "  --> 0, 2 (idle-bias)\n"
        "   |  proved: biases 2\n"
        "   |  this would be wrong if: outputs that change\n"
        "help: Drop them."
    )
    assert "NWX01 [fixable] warning: 3 was never updated.\n  --> 3 (untouched)\n" in text
    assert "measured: largest_mean 0; values [1, inf]" in text
    assert "NWX03 [fixable on request] advice: 1 is a batch norm." in text
    assert blocks[-1].splitlines() == [
        "Found 1 error, 1 warning, 2 advice (4 fixable, 2 of them on request); 1 finding marked as intended; "
        "1 check could not run.",
        "  intended: NWX01 untouched at 1: it is new",
        "  not run, it needs loader: NWX05 needs-loader",
    ]


def test_text_of_nothing(checks, inputs):
    checks(Untouched, IdleBias)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4, track_running_stats=False))
    report = nw.diagnose(model, inputs)
    assert report.ok
    assert str(report) == "Found no fault by 2 checks."


def test_a_check_that_raises_is_reported_and_the_others_run(checks, inputs):
    class Broken(Check):
        """A check that breaks."""

        code, name, severity, evidence = "NWX00", "broken", "error", "measured"

        def find(self, subject):
            subject.model[1].running_mean.add_(1)
            raise KeyError("no such thing")

    checks(Broken, IdleBias)
    model = network()
    report = nw.diagnose(model, inputs)
    assert report.not_run == [NotRun("NWX00", "broken", "it raised KeyError: 'no such thing'")]
    assert report.ran == ["NWX02"]
    assert bool((model[1].running_mean == 0).all())


def test_json(checks, inputs):
    found = nw.diagnose(network(), inputs).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["counts"] == {"error": 1, "warning": 2, "advice": 2}
    assert not found["ok"]
    assert found["ran"] == ["NWX01", "NWX02", "NWX03"]
    assert found["not_run"] == [{"code": "NWX05", "name": "needs-loader", "why": "it needs loader"}]
    first = found["findings"][1]
    assert (first["code"], first["where"], first["fixable"], first["safe"]) == ("NWX01", ["1"], True, True)
    assert first["numbers"] == {"largest_mean": 0.0, "values": [1.0, "inf"]}
    assert first["source"] == "https://arxiv.org/abs/1502.03167"


def test_sarif(checks, inputs):
    model = network()
    nw.intended("NWX01", "it is new")(model[1])
    log = nw.diagnose(model, inputs).to_sarif(file="src/my train.py", line=7)
    assert json.loads(json.dumps(log, allow_nan=False)) == log
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert {rule["id"] for rule in rules} == {"NWX01", "NWX02", "NWX03", "NWX05"}
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["locations"][0]["physicalLocation"] == {
            "artifactLocation": {"uri": "src/my%20train.py"},
            "region": {"startLine": 7},
        }
    assert [(r["ruleId"], r["level"]) for r in run["results"]] == [
        ("NWX02", "error"), ("NWX01", "warning"), ("NWX03", "note"), ("NWX03", "note"), ("NWX01", "warning"),
    ]  # fmt: skip
    assert [r.get("suppressions") for r in run["results"]][3:] == [
        None,
        [{"kind": "inSource", "justification": "it is new"}],
    ]
    names = [place["fullyQualifiedName"] for place in run["results"][0]["locations"][0]["logicalLocations"]]
    assert names == ["0", "2"]
    page = next(rule for rule in rules if rule["id"] == "NWX01")
    assert page["shortDescription"]["text"] == "Running statistics are those of a new layer."
    assert "Evaluation is wrong." in page["help"]["text"]
    assert "```python\nmodel = torch.nn.BatchNorm1d(4)\n```" in page["help"]["markdown"]
    (note,) = run["invocations"][0]["toolExecutionNotifications"]
    assert note["associatedRule"]["id"] == "NWX05"
    # without a file, results have modules only
    bare = nw.diagnose(model, inputs).to_sarif()["runs"][0]["results"][0]
    assert list(bare["locations"][0]) == ["logicalLocations"]


def test_in_place_repairs_change_the_model_and_run_once(checks, inputs):
    checks(Untouched)
    model = network()
    report = nw.diagnose(model, inputs)
    assert [f.where for f in report.findings] == [("1",), ("3",)]
    receipts = report.fix()
    assert [receipt.operation for receipt in receipts] == ["recalibrate"]
    assert report.model is model
    assert nw.diagnose(model, inputs).ok
    torch.testing.assert_close(model[1].running_mean, model[0](inputs).mean(0), rtol=1e-4, atol=1e-5)
    assert receipts[0].facts["verified"] == "NWX01 is gone"
    assert "mended: recalibrate: 2 edited" in str(report)


def test_copies_chain(checks, inputs):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = nw.diagnose(model, inputs)
    assert [receipt.operation for receipt in report.fix()] == ["absorb_bias", "recalibrate"]
    assert report.unfixed == []
    assert report.model is not model
    assert report.model[0].bias is None
    assert report.model[2].bias is None
    want = (inputs @ model[0].weight.T).mean(0)
    torch.testing.assert_close(report.model[1].running_mean, want, rtol=1e-4, atol=1e-5)
    assert [f.code for f in nw.diagnose(report.model, inputs).findings] == ["NWX03", "NWX03"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_what_is_not_safe_is_mended_when_asked(checks, inputs):
    checks(Batchy)
    report = nw.diagnose(network(), inputs)
    assert report.fix() == []
    assert [receipt.operation for receipt in report.fix(safe_only=False)] == ["convert"]
    assert isinstance(report.model[1], nn.GroupNorm)


def test_a_repair_that_does_not_help_is_undone_and_told(checks, inputs):
    checks(Stubborn)
    model = network()
    report = nw.diagnose(model, inputs)
    assert report.fix() == []
    assert bool((model[1].running_mean == 0).all())
    (left,) = report.unfixed
    assert "recalibrate did not remove NWX04" in left.why
    assert "and was undone" in left.why
    assert "not mended: NWX04 at (the model): recalibrate did not remove" in str(report)


def test_a_finding_without_a_second_look_does_not_act_on_a_model_left_behind(checks, inputs):
    model = network()
    report = nw.diagnose(model, inputs, select="NWX02")
    log = Untouched().finding("1", "…", help="…", falsify="…", repair=lambda: nw.recalibrate(model, [inputs]))
    report.findings.append(log)
    assert [receipt.operation for receipt in report.fix()] == ["absorb_bias"]
    assert "an earlier one has made a copy" in report.unfixed[0].why
    assert bool((model[1].running_mean == 0).all())


def evil_report():
    class Evil(Check):
        code, name, severity, evidence = "NWX09", "evil" + EVIL, "error", "measured"

    Evil.__doc__ = f"A page {EVIL}\n\nWhat it does\n    {EVIL} https://example.org/a?b=1&c=2\n"
    numbers = {EVIL: EVIL, "n": 3.14159}
    places = [f"layer{i}.{EVIL}" for i in range(12)]
    finding = Evil().finding(places, EVIL, help=EVIL, falsify=EVIL, numbers=numbers)
    return Report("Net" + EVIL, [finding], [NotRun("NWX05", EVIL, EVIL)], ran=["NWX09"])


def test_html_escapes_every_name():
    report = evil_report()
    for markup in (report.to_html(), report._repr_html_()):
        assert "<img" not in markup
        assert markup.count("&lt;img src=x onerror=alert(1)&gt;") > 12
        assert "3.142" in markup
        assert "and 4 more" in markup
        assert 'href="https://example.org/a?b=1&amp;c=2"' in markup
    assert "<html" not in report._repr_html_()


def test_html_holds_what_the_text_holds(checks, inputs):
    model = network()
    nw.intended("NWX01", "it is new")(model[1])
    report = nw.diagnose(model, inputs)
    report.fix()
    markup = re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]+>", " ", report.to_html(), flags=re.S))
    for expected in (
        report.summary(), "NWX01", "3 was never updated.", "largest_mean 0", "Recalibrate.", "a variance other than 1",
        "fixable on request", "NWX01 untouched at 1: it is new", "it needs loader: NWX05 needs-loader",
        "mended: absorb_bias", "no measurement", "Evaluation is wrong.",
    ):  # fmt: skip
        assert expected in markup, expected


def test_without_jinja2_a_notebook_shows_text(monkeypatch, checks, inputs):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    report = nw.diagnose(network(), inputs)
    assert report._repr_html_().startswith("<pre>NWX02 [fixable] error")
    with pytest.raises(Exception, match="needs jinja2"):
        report.to_html()


def test_markdown_of_a_page():
    text = page_markdown(Untouched)
    assert text.startswith(
        "# NWX01: untouched\n\nRunning statistics are those of a new layer.\n\n*warning, measured*\n\n## W"
    )
    assert "## Use instead\n\n```python\nmodel = torch.nn.BatchNorm1d(4, track_running_stats=False)\n```" in text


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
def test_in_a_browser(browser, tmp_path, width, scheme):
    path = tmp_path / "report.html"
    path.write_text(evil_report().to_html(), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.title() == f"Net{EVIL} · normwright doctor"
    assert page.locator("article.finding.error").count() == 1
    assert page.locator("td").nth(1).text_content() == "3.142"
    # the places beyond the first eight are behind a click, and the page of the check too
    more = page.locator("summary", has_text="and 4 more")
    assert not page.get_by_text("layer11.").is_visible()
    more.focus()
    page.keyboard.press("Enter")
    assert page.get_by_text("layer11.").is_visible()
    background = page.evaluate("getComputedStyle(document.querySelector('.finding')).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(27, 31, 35)"}[scheme]
    # text and its ground stay apart in both themes, for print too: WCAG AA
    for media in ("screen", "print"):
        page.emulate_media(media=media, color_scheme=scheme)
        for selector in (".message", ".badge.error", ".tag", ".where", "dt", "footer"):
            assert page.evaluate(CONTRAST, selector) >= 4.5, (media, selector)
    context.close()


CONTRAST = """selector => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => { const [r, g, b] = rgb.slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  let at = document.querySelector(selector);
  const ink = parse(getComputedStyle(at).color);
  let ground = [255, 255, 255];
  for (; at; at = at.parentElement) {
    const found = parse(getComputedStyle(at).backgroundColor);
    if (found.length === 3 || found[3] > 0) { ground = found; break; }
  }
  const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
}"""
