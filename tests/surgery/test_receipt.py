"""The receipt and the tools that the surgery operations share."""

import collections
import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from normwright.surgery.receipt import (
    Edit,
    Receipt,
    buffers_restorer,
    evaluating,
    model_device,
    named_modules_once,
    output_difference,
    rng_kept,
    run_on,
    tensors_in,
    to_device,
    unwrap,
    write,
)


def test_a_receipt_prints_what_was_done():
    edit = Edit("scale", {"gain": 0.123456}, {"gain": 2}, {"moved": 1.5}, also=("head.twin",))
    receipt = Receipt(
        nn.Identity(), "fold", {"head.norm": edit, "": Edit("mode")}, {"tail": "no norm [b]"}, {"passes": 2}
    )
    text = str(receipt)
    for part in (
        "fold: 2 edited, 1 skipped",
        "head.norm",
        "= head.twin",
        "scale",
        "gain 0.1235",
        "gain 2",
        "moved 1.5",
    ):
        assert part in text
    for part in ("(the model)", "tail", "skipped: no norm [b]", "passes 2", "output difference not measured"):
        assert part in text
    assert repr(receipt) == "<Receipt of fold: 2 edited, 1 skipped, output difference not measured>"
    receipt.max_difference, receipt.rms_difference = 0.00125, 0.0005
    assert "outputs moved by 0.00125 at most, 0.0005 rms" in str(receipt)
    assert "\x1b" not in text


def test_undo_is_once():
    calls = []
    receipt = Receipt(nn.Identity(), "fold", undo_with=lambda: calls.append(1))
    receipt.undo()
    assert ", undone" in str(receipt)
    with pytest.raises(RuntimeError, match="undone once, and this fold has been; run it again"):
        receipt.undo()
    assert calls == [1]
    with pytest.raises(RuntimeError, match="cannot be undone; keep a copy"):
        Receipt(nn.Identity(), "fold").undo()


def test_an_undo_that_raises_is_not_done():
    def refuse():
        raise RuntimeError("no")

    receipt = Receipt(nn.Identity(), "fold", undo_with=refuse)
    with pytest.raises(RuntimeError, match="no"):
        receipt.undo()
    receipt.undo_with = lambda: None
    receipt.undo()


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    extra: object = None


def test_output_difference_over_any_nesting():
    def output(a, b, c):
        return Output(torch.tensor([a, 0.0]), {"x": [torch.tensor(b)], "y": (None, "text", torch.tensor([c]))})

    largest, rms = output_difference(output(1.0, 2.0, 3), output(1.5, 0.0, 7))
    assert largest == 4.0
    assert rms == pytest.approx(math.sqrt((0.25 + 4 + 16) / 4))
    assert output_difference(torch.tensor([1 + 1j]), torch.tensor([4 + 5j])) == (5.0, 5.0)
    assert output_difference(torch.empty(0), torch.empty(0)) == (0.0, 0.0)
    # in float64: 2^24 and 2^24 + 1 differ
    assert output_difference(torch.tensor(2**24), torch.tensor(2**24 + 1)) == (1.0, 1.0)


def test_output_difference_of_what_is_not_finite():
    nan, inf = float("nan"), float("inf")
    assert output_difference(torch.tensor([nan, inf, -inf]), torch.tensor([nan, inf, -inf])) == (0.0, 0.0)
    for a, b in ((nan, 1.0), (1.0, nan), (inf, -inf), (inf, 0.0)):
        assert output_difference(torch.tensor([a]), torch.tensor([b])) == (inf, inf)


@pytest.mark.parametrize(
    ("a", "b"), [("text", "text"), (torch.ones(2), torch.ones(3)), (torch.ones(2), [torch.ones(2)] * 2)]
)
def test_outputs_that_cannot_be_compared(a, b):
    with pytest.raises(ValueError, match=r"need the same shapes, at least one; got .* `forward=`"):
        output_difference(a, b)


def test_named_modules_once_lists_all_names():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    found = named_modules_once(model)
    assert [names for names, _ in found] == [("",), ("a", "b.0"), ("b",), ("b.1",)]
    assert found[1][1] is shared
    compiled = nn.Sequential(torch.compile(nn.Sequential(nn.ReLU()), backend="eager"))
    assert [names for names, _ in named_modules_once(compiled)] == [("",), ("0",), ("0.0",)]


def test_unwrap_looks_through_wrappers():
    model = nn.Sequential(nn.Linear(2, 2))
    assert unwrap(model) is model
    part = torch.compile(model, backend="eager")
    assert unwrap(torch.compile(nn.DataParallel(part), backend="eager")) is model


class Recorder(nn.Module):
    def forward(self, *args, **kwargs):
        self.seen = (args, kwargs)
        return args[0] if args else kwargs


def test_run_on_takes_batches_as_update_bn_does():
    model, x, y = Recorder(), torch.ones(2), torch.zeros(2)
    pair = collections.namedtuple("pair", "input target")
    for batch in (x, (x, y), [x, y], pair(x, y)):
        assert run_on(model, batch) is x
        assert model.seen == ((x,), {})
    run_on(model, {"a": x, "b": 1})
    assert model.seen == ((), {"a": x, "b": 1})
    run_on(model, ({"a": x}, y))
    assert model.seen == ((), {"a": x})
    assert run_on(model, (x, y), forward=lambda m, batch: (m, batch)) == (model, (x, y))
    with pytest.raises(ValueError, match="got an empty one"):
        run_on(model, ())


def test_run_on_moves_the_batch_to_the_model():
    model = nn.Linear(2, 2, device="meta")
    assert model_device(model) == torch.device("meta")
    assert run_on(model, torch.ones(1, 2)).device.type == "meta"
    assert model_device(nn.ReLU()) is None
    assert model_device(nn.Sequential(model, nn.Linear(2, 2))) is None
    pair = collections.namedtuple("pair", "a b")
    moved = to_device({"x": [torch.ones(1), pair("text", (torch.ones(2),))]}, "meta")
    assert [tensor.device.type for tensor in tensors_in(moved)] == ["meta", "meta"]
    assert moved["x"][1].a == "text"
    assert type(moved["x"][1]) is pair


def test_buffers_are_restored_in_place():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[0].running_mean.copy_(torch.tensor([-0.0, float("nan")]))
    tensors = dict(model.named_buffers())
    bits = {name: buffer.view(torch.int8).clone() for name, buffer in tensors.items() if buffer.dim()}
    restore = buffers_restorer({"0": model[0]})
    model(torch.randn(4, 2) + 3)
    moved = model[1].running_mean.clone()
    restore()
    assert all(buffer is tensors[name] for name, buffer in model.named_buffers())
    for name in ("0.running_mean", "0.running_var"):
        assert torch.equal(tensors[name].view(torch.int8), bits[name])
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, moved)  # not asked for


def test_buffers_of_another_type_are_not_restored():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    restore = buffers_restorer({"0": model[0], "1": model[1]})
    model(torch.randn(4, 2) + 3)
    model[1].double()
    before = model[0].running_mean.clone()
    with pytest.raises(
        RuntimeError, match=r"1\.running_mean was \(2,\) in torch.float32 and is now \(2,\) in torch.float64"
    ):
        restore()
    assert torch.equal(model[0].running_mean, before)


def test_write_reaches_inference_tensors():
    with torch.inference_mode():
        made = torch.zeros(2)
    write(made, torch.ones(2))
    assert made.tolist() == [1.0, 1.0]
    plain = torch.zeros(2)
    with torch.inference_mode():
        write(plain, torch.ones(2))
    assert plain.tolist() == [1.0, 1.0]
    assert not plain.is_inference()


def test_evaluating_restores_each_mode_also_after_an_exception():
    class Stubborn(nn.Module):
        def train(self, mode=True):
            raise AssertionError("called")

    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), Stubborn())
    model[1].training = False
    modes = [module.training for module in model.modules()]

    def inside():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_random_states_are_kept_also_after_an_exception():
    generator = torch.Generator().manual_seed(4)

    def draw():
        own = torch.rand(1, generator=generator).item()
        return torch.rand(1).item(), random.random(), np.random.rand(), own  # noqa: NPY002

    drawn = []

    def inside():
        with rng_kept(nn.Linear(1, 1), [generator]):
            drawn.append(draw())
            raise KeyError

    draw()
    with pytest.raises(KeyError):
        inside()
    assert draw() == drawn[0]
