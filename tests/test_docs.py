"""The pages in docs/: every example prints what it shows, and every name, link and picture is true."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import xml.etree.ElementTree as ElementTree
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer.main

import normwright as nw
from normwright import cli
from normwright.doctor.command import pages as check_pages
from normwright.lab.study import find as find_study

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LIVE = [page for page in PAGES if page.name != "api.md"]  # what is not made from docstrings

# questions of the study notes, by number, that are to be answered by a page with an experiment
QUESTIONS = {
    1: "batch-norm-by-hand",
    2: "axes",
    4: "running-statistics",
    5: "modes",
    7: "batch-norm-by-hand",
    13: "gradient-checking",
    14: "gradients",
    16: "logits",
    23: "checkpoints",
    24: "layouts",
}


def code_blocks(text: str) -> list[tuple[int, str]]:
    """The python blocks of a page, each with the number of lines above its first."""
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]


def run_page(text: str, name: str) -> tuple[int, str]:
    """Run the blocks of a page in one namespace; how many examples there were, and what went wrong.

    A block with prompts is a doctest. One without defines something and prints nothing.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    told: list[str] = []
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    for line, code in code_blocks(text):
        if ">>>" in code:
            test = parser.get_doctest(code, {}, name, name, line)
            test.globs = names
            runner.run(test, out=told.append, clear_globs=False)
        else:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * line + code, name, "exec"), names)
            if out.getvalue():
                told.append(f"{name}, line {line + 1}: a block without prompts printed {out.getvalue()!r}")
    return runner.tries, "".join(told)


@pytest.mark.parametrize("page", LIVE, ids=lambda page: page.stem)
def test_examples(page):
    tried, wrong = run_page(page.read_text(encoding="utf-8"), page.name)
    assert not wrong, wrong
    assert tried


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\n>>> 1 + 1\n3\n```\n", "Expected:\n    3\nGot:\n    2"),
        ("```python\n>>> 1 + 1\n```\n", "Expected nothing\nGot:\n    2"),
        ("```python\nx = 1\n```\n\n```python\n>>> x\n2\n```\n", "line 6, in page.md"),
        ("```python\nprint(1)\n```\n", "line 2: a block without prompts printed '1\\n'"),
    ],
)
def test_a_wrong_example_is_told(text, message):
    assert message in run_page(text, "page.md")[1]


@pytest.mark.parametrize("page", LIVE, ids=lambda page: page.stem)
def test_form(page):
    """A title, then one sentence; lines within the limit; nothing that belongs to one machine."""
    text = page.read_text(encoding="utf-8")
    title, blank, summary, *_ = lines = text.split("\n")
    assert title.startswith("# ")
    assert not blank
    assert summary[0].isalnum() or summary[0] == "`"
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not re.search(r"ELLIPSIS|https?:|(?<![\w.)])/\w+/\w", text)  # no example has needed the first so far


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        assert "://" not in link, f"{link}: the pages link to one another alone"
        assert (DOCS / path).is_file(), link
        if anchor:
            assert anchor in anchors(DOCS / path if path else page), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names(page):
    """Checks, studies, commands, and what is written `nw.…` exist."""
    text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
    checks = check_pages()
    assert not [code for code in re.findall(r"\bNW\d{3}\b", text) if code not in checks]
    for name in re.findall(r"\bnw\.((?:\w+)(?:\.\w+)*)", text):
        thing = nw
        for part in name.split("."):
            assert hasattr(thing, part), f"nw.{name}"
            thing = getattr(thing, part)
        assert name.partition(".")[0] in nw.__all__, f"nw.{name} is not public"

    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for words in re.findall(r"`normwright ([^`]+)`", text):
        command, *arguments = words.split()
        assert command in commands, words
        options = {flag for parameter in commands[command].params for flag in parameter.opts}
        if command == "surgery":
            operation, *arguments = arguments
            assert operation in commands[command].commands, words
            options = {flag for parameter in commands[command].commands[operation].params for flag in parameter.opts}
        assert not [word for word in arguments if word.startswith("--") and word not in options], words
        if command == "study" and arguments and not arguments[0].startswith("--"):
            assert find_study(arguments[0])
        if command == "check" and arguments and not arguments[0].startswith("--"):
            assert arguments[0] in checks
        if command == "norms" and arguments:
            from normwright.catalog import find

            assert find(arguments[0])


def test_every_question_has_its_page():
    for row, page in QUESTIONS.items():
        path = DOCS / f"{page}.md"
        assert path in LIVE, f"question {row} has no page {path.name}"
        blocks = code_blocks(path.read_text(encoding="utf-8"))
        assert any(example.want for _, code in blocks for example in doctest.DocTestParser().get_examples(code)), path


def test_every_public_name_is_in_the_reference():
    """Once, under its group, by the module that defines it: some modules have the name of their function."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    paths = re.findall(r"^::: ([\w.]+)$", text, re.M)
    names = [path.rpartition(".")[2] for path in paths]
    for path, name in zip(paths, names, strict=True):
        module = importlib.import_module(path.rpartition(".")[0])
        assert getattr(module, name) is getattr(nw, name), path
    assert sorted([*names, *re.findall(r"^### (\w+)$", text, re.M)]) == sorted(nw.__all__)


def test_every_page_is_reached():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES if page.name != "index.md" and f"]({page.name})" not in index]


def test_norms_prints_what_the_page_shows():
    row = nw.CATALOG["GroupNorm"]
    shown = (DOCS / "axes.md").read_text(encoding="utf-8")
    for line in cli.picture(row):
        assert line.strip() in shown


PANELS = {
    "batch": nw.NormSpec("[b] c [s...]"),
    "layer": nw.NormSpec("b [c s...]"),
    "channel": nw.NormSpec("b [c] s..."),
    "group": nw.NormSpec("b (g [c]) [s...]", sizes=(("g", 2),)),
    "instance": nw.NormSpec("b c [s...]"),
}


def test_picture_of_the_axes():
    """In each panel the dark squares are the values that share a mean with the first, and the numbers are right."""
    svg = "{http://www.w3.org/2000/svg}"
    shape = (3, 4, 2, 2)
    panels = {g.get("id"): g for g in ElementTree.parse(DOCS / "axes.svg").getroot().iter(f"{svg}g")}
    assert list(panels) == list(PANELS)
    for name, spec in PANELS.items():
        layout = spec.layout(shape)
        shared = [not any(place[i] for i in layout.kept) for place in product(*map(range, layout.split))]
        assert [rect.get("class") == "on" for rect in panels[name].iter(f"{svg}rect")] == shared
        words = [text.text or "" for text in panels[name].iter(f"{svg}text")]
        means = 3 * 4 * 2 * 2 // layout.count
        assert words[-2:] == [spec.pattern, f"{means} means, {layout.count} values each"]
