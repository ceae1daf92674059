"""Every study from its first check to its report, at its smallest size, and what all of them must say."""

import ast
import json
import sys

import pytest

from normwright import cli
from normwright.lab.journal import Journal
from normwright.lab.study import find, names, plan


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_smoke(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["normwright", "study", name, "--smoke", "--json", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    found = json.loads(printed.out)
    assert found["complete"]
    assert [failure for failure in found["failures"] if failure["status"] == "failed"] == []
    assert {verdict["verdict"] for verdict in found["verdicts"]} <= {"holds", "does not hold", "undecided"}
    assert (tmp_path / "run" / "report.html").stat().st_size < 6_000_000
    with Journal(tmp_path / "run" / "journal.sqlite", mode="read") as journal:
        runs = journal.runs()
        assert {run.status for run in runs} <= {"finished", "diverged"}
        assert {run.arm for run in runs} == {arm.name for arm in find(name)[0].arms}


@pytest.mark.parametrize("name", names())
def test_every_study_states_its_question_claim_and_source(name):
    study, source = find(name)
    module = ast.parse(source)
    assert study.name == name
    assert len(ast.get_docstring(module)) > 300
    assert study.question.endswith("?")
    assert study.claim.endswith(".")
    assert study.source
    assert study.contrasts
    assert study.seeds >= 10, "a claim takes ten seeds"
    plan(study, "digits", {})
    plan(study, "fashion-mnist", {})
    for contrast in study.contrasts:
        assert contrast.text
        assert contrast.first[1]


def test_studies_are_flat_files():
    """A study imports the laboratory and the layers, never another study: it is copied, not shared."""
    for name in names():
        for node in ast.walk(ast.parse(find(name)[1])):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("normwright.studies"), name
