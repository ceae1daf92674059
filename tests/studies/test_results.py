"""The committed results: their verdicts follow from their own numbers, and the README quotes what they say."""

import json
import re
from pathlib import Path

import pytest

import normwright.studies
from normwright.lab import stats
from normwright.lab.study import find

FOLDER = Path(normwright.studies.__file__).parent / "results"
FILES = sorted(FOLDER.glob("*.json"))
README = Path(__file__).parents[2] / "README.md"


def test_there_are_results():
    assert {"lenet-fashion-mnist", "gamma-beta-fashion-mnist"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_verdicts_follow_from_the_differences(path):
    found = json.loads(path.read_text())
    study, _ = find(found["study"])
    assert found["complete"]
    assert path.stem == f"{found['study']}-{found['data']}"
    assert {row["arm"] for row in found["results"]} <= {
        *(arm.name for arm in study.arms), *(arm.series for arm in study.arms),
    }  # fmt: skip
    again = stats.verdicts([(list(each["by_seed"].values()), each["least"]) for each in found["verdicts"]])
    for each, verdict in zip(found["verdicts"], again, strict=True):
        assert each["verdict"] == verdict.word, each["contrast"]
        assert each["effect"] == pytest.approx(verdict.effect)
        assert each["n"] == len(each["by_seed"])
    for row in found["results"]:
        values = list(row["by_seed"].values())
        assert len(values) == row["n"]
        if values:
            assert row["mean"] == pytest.approx(sum(values) / len(values))
    for key in ("commit", "torch", "cpu"):
        assert found["environment"][key], key
    assert not re.search(r'["\s=]/\w+/', path.read_text()), "a path of the machine that ran it"


def test_the_readme_quotes_the_results():
    """Every figure of the README's lines on a study is one of its committed means, deviations or effects, rounded."""
    lines = [line for line in README.read_text().splitlines() if "studies/results/" in line]
    assert len(lines) >= 2
    for line in lines:
        (name,) = set(re.findall(r"studies/results/([\w-]+)\.json", line))
        found = json.loads((FOLDER / f"{name}.json").read_text())
        known = set()
        for row in found["results"]:
            known |= {f"{row['mean']:.3f}", f"{row['sd']:.3f}"} if row["mean"] is not None and row["sd"] else set()
        for each in found["verdicts"]:
            for value in (each["effect"], *(each["interval"] or ())):
                points = 100 * value if each["form"] == "share" else value
                known |= {f"{points:+.1f}".replace("-", "−")}
        quoted = re.findall(r"(?<![\w.])[+−]\d+\.\d|(?<![\w.+−])0\.\d{3}", line)
        assert quoted, line
        assert set(quoted) <= known, (set(quoted) - known, line)
