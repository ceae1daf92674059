"""Every check's page is its test: Example fires the check, Use instead fires none."""

import warnings

import pytest
import torch

import normwright as nw
from normwright.doctor import all_checks
from normwright.doctor.page import Page

ARGUMENTS = ("inputs", "targets", "loss", "optimizer", "loader", "checkpoint")


def examined(code: str) -> nw.doctor.Report:
    """What the doctor says of the model that a page's code makes, or the report that the code itself made."""
    torch.manual_seed(0)
    names: dict = {"torch": torch, "nw": nw}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fault may make torch warn
        exec(compile(code, "<page>", "exec"), names)
        if "report" in names:
            return names["report"]
        return nw.diagnose(names["model"], **{name: names[name] for name in ARGUMENTS if name in names})


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.code)
def test_the_example_fires_and_what_to_use_instead_does_not(check):
    page = Page.of(check)
    report = examined(page.example)
    found = [finding for finding in report.findings if finding.code == check.code]
    assert found, f"the example does not fire {check.code}; it fires {[f.code for f in report.findings]}"
    for finding in found:
        assert finding.message
        assert finding.help
        assert finding.falsify
        assert finding.severity in ("error", "warning", "advice")
        if finding.evidence != "advice":
            assert finding.numbers, "proved and measured findings show their numbers"
    clean = examined(page.use_instead)
    assert [(f.code, f.message) for f in clean.findings] == []


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.code)
def test_the_page_is_whole(check):
    page = Page.of(check)
    for section in ("What it does", "Why is this bad", "Example", "Use instead", "Fix safety", "References"):
        assert page.sections.get(section), f"{check.code} has no {section}"
    assert check.code.startswith("NW")
    assert check.name == check.name.lower().replace(" ", "-")
