"""The benchmark: which rows, what is wrong and so not timed, how turns are taken, what the figures mean."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from normwright import bench as b
from normwright.bench import cases, measure, terminal
from normwright.bench.row import least_traffic
from normwright.lab.errors import UserError
from normwright.layers import twins

SMALL = (4, 64, 6, 6)


@pytest.fixture
def app():
    made = typer.Typer()
    made.command()(b.command)
    return made


# ------------------------------------------------------------------------------------------------------------ the rows


def test_rows_hold_every_training_step_of_the_target():
    """Counted from the target's own words: norms × shapes × layouts × types."""
    names = {row.name for row in b.rows()}
    assert len(names) == len(b.rows())
    images = ["256×6×24×24", "256×16×8×8", "32×64×112×112", "32×64×56×56", "32×128×28×28", "32×256×14×14", "32×512×7×7"]
    images += ["32×256×56×56", "32×512×28×28", "32×1024×14×14", "32×2048×7×7"]
    batch = [f"{image} {layout}" for image in images for layout in ("NCHW", "NHWC")] + ["256×120", "256×84"]
    for norm, shape, dtype in itertools.product(
        ("BN", "BN+relu", "BN+sigmoid", "BN+add+relu"), batch, ("float32", "bfloat16")
    ):
        assert f"{norm} {shape} {dtype} train fwd+bwd" in names
    for norm, shape, layout, dtype in itertools.product(
        ("IN", "GN"), ("32×64×56×56", "32×256×14×14"), ("NCHW", "NHWC"), ("float32", "bfloat16")
    ):
        assert f"{norm} {shape} {layout} {dtype} train fwd+bwd" in names
    for norm, shape, dtype in itertools.product(
        ("LN", "RMS"), ("8192×768", "2048×4096", "12608×384"), ("float32", "bfloat16")
    ):
        assert f"{norm} {shape} {dtype} train fwd+bwd" in names
    assert "BN 8×4×8×8 NCHW float32 train fwd+bwd" in names


def test_both_sides_hold_the_same_numbers():
    row = b.Row("BN", SMALL, "NHWC", torch.bfloat16, "relu", True)
    case = cases.Case.make(row)
    ours, theirs = case.ours.state_dict(), case.eager.norm.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert ours["weight"].std() > 0.1  # ones would hide a forgotten weight
    assert case.residual is not None
    for t in (case.x, case.dy, case.residual):
        assert t.dtype == torch.bfloat16
        assert t.is_contiguous(memory_format=torch.channels_last)
        assert not t.is_contiguous()
    again = cases.Case.make(row)
    assert torch.equal(case.x, again.x)


def test_eager_is_norm_then_addition_then_activation():
    case = cases.Case.make(b.Row("BN", SMALL, "NCHW", act="relu", residual=True))
    x, residual = case.x.detach().clone(), case.residual.detach().clone()
    got = case.eager(x, residual)
    flat = x.transpose(0, 1).reshape(64, -1).double()
    normed = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    normed = normed.reshape(64, 4, 6, 6).transpose(0, 1)
    weight, bias = (p.detach().double().view(1, -1, 1, 1) for p in case.eager.norm.parameters())
    want = (normed * weight + bias + residual.double()).clamp(min=0)
    assert (got.double() - want).abs().max() < 1e-5
    assert torch.equal(residual, case.residual)  # the addition in place is into the norm's output


# ------------------------------------------------------------------------------------------------------------ checking

CHECKED = [
    b.Row("BN", (16, 12)),
    b.Row("BN", SMALL, "NCHW", act="relu"),
    b.Row("BN", SMALL, "NHWC", act="relu", residual=True),
    b.Row("BN", SMALL, "NCHW", torch.bfloat16, act="sigmoid"),
    b.Row("BN", SMALL, "NCHW", act="gelu", training=False),
    b.Row("BN", SMALL, "NCHW", act="relu", training=False, backward=False),
    b.Row("IN", SMALL, "NHWC"),
    b.Row("GN", SMALL, "NCHW", torch.bfloat16),
    b.Row("LN", (24, 40), dtype=torch.float64),
    b.Row("RMS", (24, 40), dtype=torch.bfloat16),
]


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row.name)
def test_two_truths_agree(row):
    """The reference and torch's modules in float64 know nothing of each other."""
    case = cases.Case.make(row)
    mine, dy = cases._by_reference(case)
    theirs, dy_too = cases._by_torch(case)
    assert torch.equal(dy, dy_too)
    needed = {"the output"} | ({"dx", "dweight"} if row.backward else set())
    needed |= {"dresidual"} if row.residual else set()
    needed |= {"running_mean", "running_var"} if row.family == "BN" else set()
    assert needed <= mine.keys() & theirs.keys()
    for name in needed:
        assert (mine[name] - theirs[name]).abs().max() <= 1e-12 * theirs[name].abs().max(), name


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row.name)
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_right_layer_passes(row, limit, monkeypatch):
    monkeypatch.setattr(cases, "REFERENCE_LIMIT", limit)
    with measure.use("native"):
        case = cases.Case.make(row)
        assert cases.check(case, cases.Truth.of(case), case.ours, case.ours) == ""


def test_the_gradient_is_not_asked_for_at_a_kink():
    dy, z = torch.ones(4), torch.tensor([-1e-4, 1e-4, 0.5, -0.5])
    assert cases._without_kinks(dy, z, "relu").tolist() == [0, 0, 1, 1]
    assert cases._without_kinks(dy, z, "sigmoid").tolist() == [1, 1, 1, 1]
    # a bfloat16 of size 4 is off by up to 2^-7
    assert cases._without_kinks(dy.bfloat16(), torch.tensor([-0.01, 0.01, 0.5, -0.5]), "relu").tolist() == [0, 0, 1, 1]


class _OffByAThousandth(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.001


def _wrong_output(y, **_):
    return y * 1.001


def _wrong_gradient(y, **_):
    return _OffByAThousandth.apply(y)


def _wrong_running(y, running_var=None, **_):
    running_var.data.mul_(1.001)
    return y


def _wrong_layout(y, **_):
    return y.contiguous()


def _wrong_type(y, **_):
    return y.double()


def _nan(y, **_):
    y = y.clone()
    y[1, 7, 3, 2] = math.nan
    return y


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (_wrong_output, "the output is off by"),
        (_wrong_gradient, "dx is off by"),
        (_wrong_running, "running_var is off by"),
        (_wrong_layout, "the output has strides"),
        (_wrong_type, "torch.float64"),
        (_nan, "the output is off by nan"),
    ],
)
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_wrong_layer_is_not_timed(wrong, said, limit, monkeypatch):
    right = twins.normalize
    monkeypatch.setattr(cases, "REFERENCE_LIMIT", limit)
    monkeypatch.setattr(twins, "normalize", lambda *args, **kwargs: wrong(right(*args, **kwargs), **kwargs))
    monkeypatch.setattr(measure, "measure", lambda *args: pytest.fail("a wrong layer was timed"))
    (result,) = b.bench([b.Row("BN", SMALL, "NHWC", act="relu")], kernel="native")
    assert said in result.wrong
    assert result.ours is result.torch is result.ratio is None


# -------------------------------------------------------------------------------------------------------------- timing


class _Clock:
    """A clock that only the timed calls move."""

    def __init__(self):
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self):
        return self.now

    def call(self, name, cost):
        def timed():
            self.now += cost
            self.order.append(name)

        return timed


@pytest.fixture
def clock(monkeypatch):
    made = _Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def test_turns_interleave_and_tiny_calls_are_repeated(clock):
    times = measure.measure({"a": clock.call("a", 2**-17), "b": clock.call("b", 1.0)}, 6, 1e9, b.Cpu())
    assert times["a"] == pytest.approx([2**-17] * 6)
    assert times["b"] == pytest.approx([1.0] * 6)
    turns = [name for name, _ in itertools.groupby(clock.order)]
    # warm-up of a, of b, then every other turn backwards
    assert turns == ["a", "b", "a", "b", "a", "b", "a", "b"]
    blocks = [(name, len(list(group))) for name, group in itertools.groupby(clock.order)]
    inner = math.ceil(1e-3 / 2**-17)
    assert [count for name, count in blocks[2:] if name == "a"] == [2 * inner, 2 * inner, 2 * inner]
    assert blocks[1] == ("b", 3 + 1)  # called once and twice more, then its first turn; never a thousand times


def test_the_time_for_a_row_ends_it_but_not_before_five_turns(clock):
    for repeat, seconds, turns in ((30, 7.5, 8), (30, 0.0, 5), (9, 1e9, 9)):
        assert len(measure.measure({"a": clock.call("a", 1.0)}, repeat, seconds, b.Cpu())["a"]) == turns
    with pytest.raises(ValueError, match="at least 5 turns; got repeat=4"):
        b.bench([], repeat=4)


def test_figures_of_a_row_by_hand(monkeypatch):
    """The ratio is the median of ratios by turn, not the ratio of medians; bytes count against the copy's 2."""
    times = {
        "torch": [1.5, 2.0, 3.0, 4.0, 50.0],
        "ours": [1.0, 1.0, 1.0, 4.0, 10.0],
        "copy": [1.0, 1.0, 1.0, 1.0, 1.0],
    }
    monkeypatch.setattr(measure, "measure", lambda calls, *rest: {name: times[name] for name in calls})
    (result,) = b.bench([b.Row("BN", SMALL, "NCHW")], kernel="native")
    assert result.ratio == measure.Timing(2.0, 1.5, 3.0)  # of 1.5, 2, 3, 1, 5
    assert result.best == 1.5
    assert result.ours == measure.Timing(1.0, 1.0, 4.0)
    assert (result.kernel, result.turns, result.traffic) == ("native", 5, 5)
    assert result.of_copy == 2.5


@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        # a channel of 4·36 floats stays; all 4·64·36·4 bytes = 36 KiB, read side by side, do not stay in 32 KiB
        (b.Row("BN", SMALL, "NCHW"), 2 + 3),
        (b.Row("BN", SMALL, "NHWC"), 3 + 5),
        (b.Row("BN", SMALL, "NHWC", backward=False), 3),
        (b.Row("BN", SMALL, "NHWC", training=False, backward=False), 2),
        (b.Row("BN", SMALL, "NHWC", training=False), 2 + 3),
        (b.Row("BN", SMALL, "NHWC", act="relu"), 3 + 5),
        (b.Row("BN", SMALL, "NHWC", act="relu", residual=True), 4 + 6),
        (b.Row("BN", SMALL, "NCHW", act="relu", residual=True), 3 + 4),
        # bfloat16 halves the tile: x stays between its readings, x and dy together do not
        (b.Row("BN", SMALL, "NHWC", torch.bfloat16), 2 + 5),
        (b.Row("IN", SMALL, "NHWC"), 2 + 3),
        (b.Row("LN", (8192, 768)), 2 + 3),
        (b.Row("RMS", (8192, 768), backward=False), 2),
    ],
)
def test_least_traffic(row, sizes):
    assert least_traffic(row, 32 * 1024) == sizes


def test_summary_by_hand():
    def result(row, ratio):
        return b.Result(row, "cpu", ratio=measure.Timing(ratio, ratio, ratio))

    bn, ln = b.Row("BN", SMALL, "NCHW"), b.Row("LN", (8, 8))
    wrong = b.Result(b.Row("RMS", (8, 8)), "cpu", wrong="dx is off by 1 from float64, allowed 0.1")
    total = b.summary([result(bn, 2.0), result(replace(bn, act="relu"), 8.0), result(ln, 0.5), wrong])
    assert total.families == pytest.approx({"BN": 4.0, "LN": 0.5})
    assert total.mean == pytest.approx(2.0)
    assert (total.worst, total.worst_ratio, total.slower, total.rows) == (ln.name, 0.5, 1, 4)
    assert total.wrong == {"RMS 8×8 float32 train fwd+bwd": "dx is off by 1 from float64, allowed 0.1"}
    assert b.summary([wrong]).mean is None


# ------------------------------------------------------------------------------------------------------- command line

QUICK = ["--quick", "--kernel", "native", "--no-tune-allocator", "--repeat", "5", "--seconds", "0"]


def test_json_lines(app, tmp_path):
    out = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(app, [*QUICK, "--filter", "bn 256×120", "--threads", "1", "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    about, row, total = map(json.loads, done.stdout.splitlines())
    assert out.read_text(encoding="utf-8") == done.stdout
    assert about["type"] == "environment"
    assert {"cpu", "cores", "torch", "numpy", "numba", "normwright", "commit", "date", "load"} <= about.keys()
    assert (about["threads"], about["allocator"]) == (1, "As it is.")
    assert (row["type"], row["family"], row["shape"], row["dtype"]) == ("row", "BN", [256, 120], "float32")
    assert (row["kernel"], row["wrong"], row["turns"]) == ("native", "", 5)
    assert 0 < row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"]
    assert total["mean"] == pytest.approx(row["ratio"]["median"])


def test_the_table_ends_with_mean_and_worst_row(app):
    done = CliRunner().invoke(app, [*QUICK, "--filter", "2048"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    head = lines[0].split()
    assert head[:9] == ["norm", "shape", "layout", "type", "passes", "kernel", "torch", "ours", "torch/ours"]
    assert [line.split()[0] for line in lines[1:3]] == ["LN", "RMS"]
    assert lines[-2].startswith("Geometric mean of 2 rows: ")
    assert lines[-1].startswith("Worst row: ")


def test_a_wrong_kernel_is_exit_code_1(app, monkeypatch):
    right = twins.normalize
    monkeypatch.setattr(twins, "normalize", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    done = CliRunner().invoke(app, [*QUICK, "--filter", "RMS"])
    assert done.exit_code == 1
    assert "not timed" in done.stdout
    assert "WRONG and not timed: RMS 2048×384 float32 train fwd+bwd: the output is off by" in done.stdout


def test_no_such_row(app):
    done = CliRunner().invoke(app, ["--filter", "BN nonsense"])
    assert isinstance(done.exception, UserError)
    assert "No row has all of 'BN nonsense'" in str(done.exception)


def test_training_alone(app, monkeypatch):
    seen = []
    monkeypatch.setattr(terminal, "_run", lambda chosen, *rest: seen.extend(chosen) or [])
    assert CliRunner().invoke(app, ["--training"]).exit_code == 0
    assert seen == [row for row in b.rows() if row.training and row.backward]
    assert 0 < len(seen) < len(b.rows())


@pytest.mark.parametrize("works", [True, False])
def test_compile_is_a_column_or_a_reason(works, app, monkeypatch):
    def compiler(module):
        if works:
            return module

        def fail(*args):
            raise RuntimeError("no compiler\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", compiler)
    done = CliRunner().invoke(app, [*QUICK, "--filter", "RMS", "--compile"])
    assert done.exit_code == 0, done.output
    assert "torch.compile" in done.stdout.splitlines()[0]
    story = "torch.compile is left out of RMS 2048×384 float32 train fwd+bwd: RuntimeError: no compiler."
    assert (story in done.stdout.splitlines()) == (not works)
    assert ("left out" in done.stdout) == (not works)


@pytest.mark.parametrize(("processes", "warned"), [(3.25, True), (0.1, False)])
def test_a_busy_machine_is_told(processes, warned, app, monkeypatch):
    monkeypatch.setattr(terminal, "load", lambda: processes)
    done = CliRunner().invoke(app, [*QUICK, "--filter", "RMS"])
    assert ("The machine is busy: 3.2 processes" in done.stderr) == warned
