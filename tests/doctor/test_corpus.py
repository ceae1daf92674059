"""The corpus: every fault that people met in public is found, and its mended twin has no error and no warning."""

import pytest
from corpus import pairs


def marked(pair):
    """A pair that is known to be missed must fail, so that its mark goes when it no longer does."""
    marks = [pytest.mark.xfail(strict=True, reason=pair.missed)] if pair.missed else []
    return pytest.param(pair, id=pair.name, marks=marks)


@pytest.mark.parametrize("pair", [marked(pair) for pair in pairs()])
def test_the_fault_is_found(pair):
    found = {finding.code for finding in pair.buggy}
    assert found & pair.codes, f"{pair.name} is to be reported as one of {sorted(pair.codes)}; found {sorted(found)}"


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: pair.name)
def test_the_mended_twin_is_silent(pair):
    loud = [f for f in pair.fixed if f.severity != "advice" or f.code in pair.codes]
    assert loud == []


def test_the_corpus_is_large_and_names_its_threads():
    assert len(pairs()) >= 40
    for pair in pairs():
        assert "Modelled on" in pair.module.__doc__, pair.name
        assert "https://" in pair.module.__doc__, pair.name
        assert pair.codes, pair.name
