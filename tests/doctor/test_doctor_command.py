"""`normwright doctor` and `normwright check`: what they print, write and refuse, and the exit codes that CI reads."""

import json
import sys
from functools import partialmethod

import pytest
import torch
from torch import nn

import normwright as nw
from normwright import cli
from normwright.doctor.check import Check
from normwright.doctor.command import pages

TRAIN = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

NET = build()

def batch():
    return 3 + torch.randn(64, 4, generator=torch.Generator().manual_seed(1))

def wide():
    return torch.randn(64, 5)

def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def wrong(model):
    raise KeyError("no such option")

LOADER = [batch(), batch()]
"""


class Untouched(Check):
    """Running statistics are those of a new layer."""

    code, name, severity, evidence, needs = "NWX01", "untouched", "warning", "measured", ("inputs",)

    def find(self, subject):
        for name, module in subject.tracked().items():
            if bool((module.running_var == 1).all()):
                yield self.finding(
                    name, f"{name} was never updated.", help="Recalibrate.", falsify="…", numbers={"largest_mean": 0.0},
                    repair=lambda: nw.recalibrate(subject.model, [subject.batch()]),
                )  # fmt: skip


class Given(Check):
    """What the command line gave."""

    code, name, severity, evidence = "NWX02", "given", "advice", "advice"

    def find(self, subject):
        given = [n for n in ("inputs", "targets", "loss", "optimizer", "loader", "checkpoint") if subject.has(n)]
        held = subject.optimizer and {id(p) for g in subject.optimizer.param_groups for p in g["params"]}
        ours = held == {id(p) for p in subject.model.parameters()} if held else None
        yield self.finding((), "given", help=" ".join(given), falsify=str(ours))


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command beside train.py: (exit code, stdout, stderr)."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    for name in ("diagnose", "report", "command"):
        monkeypatch.setattr(sys.modules[f"normwright.doctor.{name}"], "all_checks", lambda: (Untouched, Given))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["normwright", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def test_text_and_exit_codes(command):
    code, printed, error = command("doctor", "train.py:build", "--inputs", "train.py:batch")
    assert (code, error) == (1, "")
    assert printed.startswith("NWX01 [fixable] warning: 1 was never updated.\n  --> 1 (untouched)\n")
    assert command("doctor", "train.py:NET", "--inputs", "train.py:batch", "--ignore", "NWX01")[0] == 0
    code, printed, _ = command("doctor", "train.py:build")
    assert code == 0
    assert "not run, it needs inputs: NWX01 untouched" in printed


def test_everything_that_is_named_reaches_the_checks(command, tmp_path):
    state = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items() if key != "2.bias"}}, "net.pt")
    code, printed, error = command(
        "doctor", "train.py:build", "--inputs", "train.py:batch", "--targets", "train.py:batch",
        "--loss", "torch.nn:MSELoss", "--optimizer", "train.py:optimizer", "--loader", "train.py:LOADER",
        "--checkpoint", "net.pt", "--select", "NWX02", "--format", "json",
    )  # fmt: skip
    assert code == 0
    (finding,) = json.loads(printed)["findings"]
    assert finding["help"] == "inputs targets loss optimizer loader checkpoint"
    assert finding["falsify"] == "True"
    assert error == "net.pt lacks 2.bias.\n"


def test_files_in_every_format(command, tmp_path):
    arguments = ("doctor", "train.py:build", "--inputs", "train.py:batch", "--out", "report", "--format")
    for form in ("text", "json", "sarif", "html"):
        code, printed, _ = command(*arguments, form)
        assert code == 1
        assert printed == "Found 1 warning, 1 advice (1 fixable). Report: report\n"
        text = (tmp_path / "report").read_text()
        assert "1 was never updated." in text
        if form == "sarif":
            result = json.loads(text)["runs"][0]["results"][0]
            assert result["locations"][0]["physicalLocation"]["artifactLocation"] == {"uri": "train.py"}
        if form == "html":
            assert text.startswith("<!doctype html>")


def test_fix_writes_the_mended_network(command, tmp_path, monkeypatch):
    arguments = ("doctor", "train.py:build", "--inputs", "train.py:batch", "--fix", "fixed.pt")
    code, printed, error = command(*arguments, "--select", "NWX01")
    assert code == 0
    assert printed == "Found no fault by 1 check.\n"
    assert "Mended: recalibrate: 1 edited" in error
    assert error.endswith("Wrote fixed.pt, the state dict of the mended network.\n")
    namespace = {}
    exec(TRAIN, namespace)
    x, net = namespace["batch"](), namespace["build"]()
    written = torch.load(tmp_path / "fixed.pt", weights_only=True)["state_dict"]
    torch.testing.assert_close(written["1.running_mean"], net[0](x).mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(written["0.weight"], net[0].weight)
    code, _, error = command(*arguments)
    assert code == 2
    assert "fixed.pt" in error
    monkeypatch.setattr(Untouched, "finding", partialmethod(Untouched.finding, safe=False))
    code, _, error = command(*arguments, "--force")
    assert (code, "Mended" in error) == (1, False)
    assert command(*arguments, "--force", "--unsafe")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("train.py",), "FILE.py:NAME"),
        (("train.py:nothing",), "has no 'nothing'"),
        (("train.py:batch",), "examines an nn.Module, and train.py:batch gave a Tensor"),
        (("train.py:build", "--format", "xml"), "--format is one of text, json, sarif, html; got 'xml'"),
        (("train.py:build", "--select", "NW9999"), "no check has 'NW9999'"),
        (("train.py:build", "--optimizer", "train.py:wrong"), "raised KeyError: 'no such option'"),
        (("train.py:build", "--optimizer", "train.py:build"), "raised TypeError"),
        (("train.py:build", "--checkpoint", "none.pt"), "There is no file none.pt"),
        (
            ("train.py:build", "--inputs", "train.py:wide"),
            "train.py:build does not run on train.py:wide: the model rais",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(command, arguments, text):
    code, printed, error = command("doctor", *arguments)
    assert (code, printed) == (2, "")
    assert text in error
    assert error.startswith("normwright: ")
    assert error.count("\n") == 1


def test_a_checkpoint_of_another_network(command):
    torch.save(nn.Linear(3, 3).state_dict(), "other.pt")
    code, _, error = command("doctor", "train.py:build", "--checkpoint", "other.pt")
    assert code == 0  # the checks say it, and the keys are told
    assert "other.pt lacks 0.weight" in error
    torch.save({**nn.Sequential(nn.Linear(3, 3)).state_dict()}, "other.pt")
    code, _, error = command("doctor", "train.py:build", "--checkpoint", "other.pt")
    assert code == 2
    assert "size mismatch for 0.weight" in error


def test_a_page(command):
    rule = next(iter(pages().values()))
    code, printed, _ = command("check", rule.code.lower())
    assert code == 0
    assert printed.startswith(f"{rule.code}: {rule.name} ({rule.severity})\n")
    for title in ("What it does", "Why is this bad", "Example", "Use instead"):
        assert f"\n{title}\n" in printed
    assert command("check", rule.name)[1] == printed
    code, _, error = command("check", "NW000")
    assert code == 2
    assert "No check is called 'NW000'" in error
    assert command("check")[0] == 2


def test_the_list_and_the_markdown(command, tmp_path):
    code, printed, _ = command("check", "--list")
    assert code == 0
    assert "NWX01" in printed
    code, printed, _ = command("check", "--markdown", "pages")
    assert code == 0
    written = sorted(path.name for path in (tmp_path / "pages").iterdir())
    assert written == sorted([*(f"{code}.md" for code in pages()), "index.md"])
    assert "| [NWX01](NWX01.md) | untouched | warning |" in (tmp_path / "pages" / "index.md").read_text()
    rule = next(code for code in pages() if code.startswith("NW9"))
    assert "```python\n" in (tmp_path / "pages" / f"{rule}.md").read_text()
