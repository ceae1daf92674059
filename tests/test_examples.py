"""What the README and the docstrings show runs as shown."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import normwright

README = Path(__file__).parent.parent / "README.md"


def modules_with_examples() -> list[str]:
    """Modules of the package whose source has a prompt in it."""
    root = Path(normwright.__path__[0])
    paths = sorted(path for path in root.rglob("*.py") if ">>>" in path.read_text(encoding="utf-8"))
    return [".".join(("normwright", *path.relative_to(root).with_suffix("").parts)) for path in paths]


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed


def test_readme(capsys):
    """The blocks run in order, the fused copy computes what the model did, and explain names a kernel."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec("\n".join(blocks), names)
    assert "runs on cpu" in capsys.readouterr().out
    x, layer = names["x"], names["layer"]
    expected = normwright.activate(normwright.normalize(x, layer.spec, layer.weight, layer.bias) + x, "relu")
    assert (layer(x, residual=x) - expected).abs().max() < 1e-4
