"""Kernels chosen by what was timed on a GPU: the interpreter stands in for it, and a table for its clock."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

import normwright as nw
from normwright.kernels import dispatch, timed, triton

pytestmark = pytest.mark.skipif(not triton.INTERPRETING, reason="needs TRITON_INTERPRET=1")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A CPU whose own backend is Triton's, and nothing timed on it; seconds a call by kernel, to be set."""
    monkeypatch.setattr(dispatch, "_OWN", {"cpu": "triton"})
    monkeypatch.setattr("normwright.layers.twins.at_once", lambda *_: False)
    monkeypatch.setenv("NORMWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(timed, "_table", {})
    timed._verdict.cache_clear()
    seconds = {"native": 3e-5, "triton": 2e-5}

    def interleaved(steps, device):
        for step in steps.values():
            step()
        return {name: [seconds[name]] * 9 for name in steps}

    monkeypatch.setattr(timed, "_interleaved", interleaved)
    yield seconds
    timed._verdict.cache_clear()


def forget():
    """As a new process."""
    timed._table.clear()
    timed._verdict.cache_clear()


def chosen(layer, x, **more):
    (choice,) = nw.explain(layer, x, **more).choices
    return choice.kernel, choice.refused.get("triton", "")


def test_the_faster_runs_and_explain_says_why(gpu):
    layer, x = nw.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    assert chosen(layer, x) == (
        "native", "no call like this was timed on this GPU; nw.calibrate(model, inputs) times it"
    )  # fmt: skip
    found = nw.calibrate(layer, x)
    assert str(found).splitlines()[1] == (
        "  BatchNorm2d: '[b] c [s...]' on (4, 3, 5, 5): 30 µs by torch's operators, 20 µs by these kernels, "
        "1.50× (1.50 to 1.50): triton"
    )
    assert chosen(layer, x) == ("triton", "")
    gpu["triton"] = 4e-5
    nw.calibrate(layer, x)
    assert chosen(layer, x) == ("native", "0.75 times as fast as torch's operators when timed on this GPU")
    gpu["triton"] = gpu["native"] / 1.02  # no more than medians differ by
    nw.calibrate(layer, x)
    assert chosen(layer, x)[0] == "native"


def test_what_was_not_asked_for_is_left_alone(gpu):
    layer, x = nw.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state = torch.get_rng_state()
    nw.calibrate(layer, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.weight.grad is None
    assert dispatch._demanded is None


@pytest.mark.parametrize(("batch", "likely"), [(8, True), (4, True), (16, True), (3, False), (17, False)])
def test_half_to_twice_the_size_is_like_it(gpu, batch, likely):
    layer = nw.BatchNorm2d(3)
    nw.calibrate(layer, torch.randn(8, 3, 5, 5))
    assert chosen(layer, torch.randn(batch, 3, 5, 5))[0] == ("triton" if likely else "native")


def test_of_two_sizes_the_nearer_counts(gpu):
    layer = nw.BatchNorm2d(3)
    nw.calibrate(layer, torch.randn(8, 3, 5, 5))
    gpu["triton"] = 1.0
    nw.calibrate(layer, torch.randn(16, 3, 5, 5))
    assert [chosen(layer, torch.randn(n, 3, 5, 5))[0] for n in (9, 11, 12, 14)] == [
        "triton" if math.log(n / 8) < math.log(16 / n) else "native" for n in (9, 11, 12, 14)
    ]


def test_other_kinds_of_call_are_not_like_it(gpu):
    x = torch.randn(4, 6, 5, 5)
    nw.calibrate(nw.BatchNorm2d(6), x)
    others = {
        "layout": (nw.BatchNorm2d(6), x.contiguous(memory_format=torch.channels_last)),
        "type": (nw.BatchNorm2d(6), x.bfloat16()),
        "activation": (nw.BatchNorm2d(6, act="relu"), x),
        "evaluation": (nw.BatchNorm2d(6).eval(), x),
        "no parameters": (nw.BatchNorm2d(6, affine=False), x),
        "channels": (nw.BatchNorm2d(5), x[:, :5].contiguous()),
        "pattern": (nw.InstanceNorm2d(6, affine=True), x),
    }
    assert {name: chosen(*call)[0] for name, call in others.items()} == dict.fromkeys(others, "native")
    with torch.no_grad():
        assert chosen(nw.BatchNorm2d(6), x)[0] == "native"
    assert chosen(nw.BatchNorm2d(6), x, residual=x)[0] == "native"
    assert chosen(nw.BatchNorm2d(6), x, mask=torch.ones(4, dtype=torch.bool))[0] == "native"
    assert chosen(nw.BatchNorm2d(6), x)[0] == "triton"


def test_every_call_of_a_model_is_timed_once(gpu):
    model = torch.nn.Sequential(nw.BatchNorm2d(3), nw.BatchNorm2d(3, act="relu"), nw.BatchNorm2d(3))
    found = nw.calibrate(model, torch.randn(4, 3, 5, 5, requires_grad=True))
    assert [(where, shape) for where, _, shape, _ in found.calls] == [("0", (4, 3, 5, 5)), ("1", (4, 3, 5, 5))]


def test_later_processes_know(gpu, tmp_path):
    layer, x = nw.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    nw.calibrate(layer, x)
    (path,) = tmp_path.glob("timed/cpu-*.json")
    forget()
    assert chosen(layer, x)[0] == "triton"
    # another process' find is kept, and so is ours
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, ["other", 7, 1.0, 1.0, 1.0, [1.0, 1.0], ""]]))
    nw.calibrate(nw.LayerNorm(5), x)
    assert {row[0] for row in json.loads(path.read_text())} >= {"other", rows[0][0]}
    assert len(json.loads(path.read_text())) == 3


def test_a_file_that_is_damaged_or_cannot_be_written_is_said(gpu, tmp_path, monkeypatch):
    layer, x = nw.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    nw.calibrate(layer, x)
    (path,) = tmp_path.glob("timed/cpu-*.json")
    path.write_text("[[1, 2]]")
    forget()
    with pytest.warns(UserWarning, match="cannot be read from .* torch's operators run until nw.calibrate"):
        assert chosen(layer, x)[0] == "native"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NORMWRIGHT_CACHE", str(tmp_path / "file"))
    forget()
    with pytest.warns(UserWarning, match="cannot be (read|kept)"):
        nw.calibrate(layer, x)
    assert chosen(layer, x)[0] == "triton"


def test_times_of_other_kernels_or_another_torch_do_not_count(gpu, monkeypatch):
    layer, x = nw.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    nw.calibrate(layer, x)
    forget()
    monkeypatch.setattr(timed, "_version", lambda: "another")
    assert chosen(layer, x)[0] == "native"


@pytest.mark.parametrize("which", [0, 1])
def test_kernels_that_are_wrong_are_never_chosen(gpu, which, monkeypatch):
    layer, x = nw.BatchNorm2d(3), torch.randn(4, 3, 5, 5, requires_grad=True)
    right = (triton.forward, triton.backward)[which]

    def off(*arguments):
        first, *rest = right(*arguments)
        return (first * 1.01, *rest)

    monkeypatch.setattr(triton, right.__name__, off)
    assert "torch's operators, for these kernels are wrong here" in str(nw.calibrate(layer, x))
    kernel, why = chosen(layer, x)
    assert kernel == "native"
    what = ("the output", "the gradient of x")[which]
    assert why.startswith(f"these kernels are wrong here: {what} is off from float64 by ")


def test_kernels_that_raise_are_never_chosen(gpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(triton, "forward", fail)
    layer, x = nw.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    nw.calibrate(layer, x)
    assert chosen(layer, x) == ("native", "these kernels raise RuntimeError: no such instruction")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", [{}, {"act": "relu", "residual": True}, {"act": "gelu"}], ids=str)
def test_kernels_that_are_right_are_found_so(gpu, dtype, extra):
    layer = nw.BatchNorm2d(6, act=extra.get("act"))
    layer = layer.double() if dtype == torch.float64 else layer
    x = torch.randn(4, 6, 5, 5, dtype=dtype, requires_grad=True)
    ((*_, found),) = nw.calibrate(layer, x, residual=x if "residual" in extra else None).calls
    assert found.wrong == ""


def test_turns_and_samples(monkeypatch):
    """Samples of 2 ms and more, in turns that begin with either side, divided by the calls that they hold."""
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def step(name, seconds):
        def run():
            now[0] += seconds
            order.append(name)

        return run

    steps = {"native": step("native", 2**-10), "triton": step("triton", 2**-11)}
    times = timed._interleaved(steps, torch.device("cpu"))
    assert times == {"native": [2**-10] * 9, "triton": [2**-11] * 9}
    assert order[:8] == ["native"] * 4 + ["triton"] * 4  # three to warm up, one to see how many make 2 ms
    turns = ["native"] * 3 + ["triton"] * 5 + ["triton"] * 5 + ["native"] * 3
    assert order[8 : 8 + 16] == turns
    assert len(order) == 8 + 9 * 8


def test_the_cpu_and_a_model_without_our_norms_are_refused(gpu, monkeypatch):
    with pytest.raises(ValueError, match=r"saw no call of normwright's kernels; nw.accelerate\(model\)"):
        nw.calibrate(torch.nn.BatchNorm1d(3), torch.randn(4, 3))
    monkeypatch.setattr(dispatch, "_OWN", {"cpu": "cpu"})
    with pytest.raises(ValueError, match="the input of BatchNorm1d is on cpu, where it is known"):
        nw.calibrate(nw.BatchNorm1d(3), torch.randn(4, 3))
