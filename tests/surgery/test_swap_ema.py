"""swap_ema exchanges by value and gives back the same bits; averages without statistics of their own are named."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import normwright as nw
from normwright.surgery.swap_ema import swap_ema

utils = pytest.importorskip("timm.utils.model_ema")
module = importlib.import_module("normwright.surgery.swap_ema")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def trained(make, steps=5):
    """A model trained for some steps, and its average kept meanwhile."""
    model = net()
    ema = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 3) * 2 + 1).square().sum().backward()
        optimizer.step()
        (ema.update_parameters if isinstance(ema, AveragedModel) else ema.update)(model)
    return model, ema, optimizer


KINDS = {
    "AveragedModel": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    "ModelEma": lambda m: utils.ModelEma(m, decay=0.5),
    "ModelEmaV2": lambda m: utils.ModelEmaV2(m, decay=0.5),
    "ModelEmaV3": lambda m: utils.ModelEmaV3(m, decay=0.5),
}
STALE = {
    "AveragedModel": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "ModelEmaV3": lambda m: utils.ModelEmaV3(m, decay=0.5, exclude_buffers=True),
}
x = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))


def inner(ema):
    return ema.ema if isinstance(ema, utils.ModelEma) else getattr(ema, "module", ema)


def values(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_exchange_and_exact_return(kind):
    model, ema, optimizer = trained(KINDS[kind])
    mine, theirs = values(model), values(inner(ema))
    assert not torch.equal(mine["1.running_mean"], theirs["1.running_mean"])
    ids = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    wanted = copy.deepcopy(inner(ema)).eval()(x)
    own = copy.deepcopy(model).eval()(x)
    with swap_ema(model, ema, inputs=x) as receipt:
        same(values(model), theirs)
        same(values(inner(ema)), mine)
        assert torch.equal(model.eval()(x), wanted)
        assert receipt.facts == {"average": kind, "tensors": 9}
    same(values(model), mine)
    same(values(inner(ema)), theirs)
    difference = (wanted - own).detach().double()
    assert receipt.max_difference == pytest.approx(difference.abs().max().item(), rel=1e-6)
    assert ids == [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    assert list(receipt.edits) == ["0", "1", "3"]
    assert receipt.edits["1"].what == "weight, bias, running_mean, running_var, num_batches_tracked"
    assert not receipt.skipped
    # the optimizer still moves the model
    before = model[0].weight.clone()
    model.train()(x).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("kind", STALE)
def test_stale_statistics_are_named_and_recalibrated(kind):
    model, ema, _ = trained(STALE[kind])
    mine = values(model)
    with pytest.warns(UserWarning, match=r"statistics of '1' are copies of the model's own .* call recalibrate"):
        receipt = swap_ema(model, ema)
    assert "recalibrate while the average" in receipt.skipped["1"]
    nw.recalibrate(model, x)
    exact = values(model)
    receipt.undo()
    same(values(model), mine)
    same(values(inner(ema)), exact)  # statistics of the average's own weights go with it
    torch.testing.assert_close(exact["1.running_mean"], inner(ema)[0](x).mean(0))
    with pytest.raises(RuntimeError, match="undone once"):
        receipt.undo()


@pytest.mark.parametrize("form", ["module", "state_dict", "averaged", "ddp"])
def test_modules_and_mappings(form):
    model, average, _ = trained(KINDS["AveragedModel"])
    ema = {
        "module": average.module,
        "state_dict": values(average.module),
        "averaged": {key: value.clone() for key, value in average.state_dict().items()},
        "ddp": {f"module.module.{key}": value for key, value in values(average.module).items()},
    }[form]
    mine, theirs = values(model), values(average.module)
    kept = copy.deepcopy(ema if isinstance(ema, dict) else ema.state_dict())
    with swap_ema(model, ema):
        same(values(model), theirs)
    same(values(model), mine)
    same(kept, ema if isinstance(ema, dict) else values(ema))


def test_a_mapping_without_buffers():
    model, average, _ = trained(KINDS["AveragedModel"])
    ema = {name: parameter.detach().clone() for name, parameter in average.module.named_parameters()}
    mine = values(model)
    with pytest.warns(UserWarning, match="statistics of '1' are not in the average"):
        receipt = swap_ema(model, ema)
    with receipt:
        assert torch.equal(model[1].running_mean, mine["1.running_mean"])
        assert torch.equal(model[0].weight, average.module[0].weight)
    assert receipt.skipped.keys() == {"1", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    same(values(model), mine)


@pytest.mark.parametrize("wrap", ["DataParallel", "compile", "inside"])
def test_wrapped_models(wrap):
    model, ema, _ = trained(KINDS["AveragedModel"])
    theirs = values(ema.module)
    if wrap == "inside":
        outer = nn.Sequential(torch.compile(model, backend="eager"))
        ema = nn.Sequential(ema.module)
    else:
        outer = torch.compile(model, backend="eager") if wrap == "compile" else nn.DataParallel(model)
    with swap_ema(outer, ema) as receipt:
        same(values(model), theirs)
    assert receipt.model is outer


def test_an_average_in_another_type_returns_exactly():
    # float32 averages of bfloat16 weights: rounded in the model, and exact again afterwards
    model = net().bfloat16()
    ema = utils.ModelEmaV3(model, decay=0.5, dtype=torch.float32)
    with torch.no_grad():
        for p in ema.module.parameters():
            p.add_(torch.randn_like(p) * 1e-3)
    mine, theirs = values(model), values(ema.module)
    with swap_ema(model, ema):
        assert torch.equal(model[0].weight, theirs["0.weight"].bfloat16())
        assert not torch.equal(model[0].weight.float(), theirs["0.weight"])
        with torch.no_grad():
            model[3].bias[0] = 7.0  # a change meanwhile goes to the average
    same(values(model), mine)
    theirs["3.bias"][0] = 7.0
    same(values(ema.module), theirs)


def test_tied_and_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.b, self.again = nn.Linear(3, 3), self.norm
            self.b.weight = self.a.weight

    model = Tied()
    ema = copy.deepcopy(model)
    nn.init.ones_(ema.a.weight)
    split = {key: value.clone() for key, value in ema.state_dict().items()}
    mine = values(model)
    for average in (ema, split):
        with swap_ema(model, average) as receipt:
            assert torch.equal(model.b.weight, torch.ones(3, 3))
            assert model.b.weight is model.a.weight
            if average is split:
                assert torch.equal(split["a.weight"], mine["a.weight"])
                assert torch.equal(split["b.weight"], mine["a.weight"])
        assert receipt.facts["tensors"] == 3 + 5
        same(values(model), mine)
    assert torch.equal(split["b.weight"], torch.ones(3, 3))
    split["b.weight"].fill_(2.0)
    with pytest.raises(ValueError, match=r"'a.weight' and 'b.weight' are one tensor in the model and differ"):
        swap_ema(model, split)
    same(values(model), mine)


@pytest.mark.parametrize("where", range(8))
@pytest.mark.parametrize("way", ["there", "back"])
def test_interrupted_half_way_is_as_before(monkeypatch, where, way):
    model, ema, _ = trained(KINDS["AveragedModel"])
    model = model.bfloat16()  # with the exact values kept, too
    first = values(model), values(ema.module)
    receipt = swap_ema(model, ema) if way == "back" else None
    mine, theirs = values(model), values(ema.module)
    real, calls = module.write, []

    def write(target, value):
        calls.append(1)
        if len(calls) == where * 2 + 2:  # the second write of a pair
            raise KeyboardInterrupt
        real(target, value)

    monkeypatch.setattr(module, "write", write)
    with pytest.raises(KeyboardInterrupt):
        receipt.undo() if receipt else swap_ema(model, ema)
    same(values(model), mine)
    same(values(ema.module), theirs)
    if receipt:
        calls.extend([1] * 99)
        receipt.undo()
        same(values(model), first[0])
        same(values(ema.module), first[1])


@pytest.mark.parametrize("fault", ["inputs", "warning", "block"])
def test_after_an_error_all_is_as_before(fault):
    model, ema, _ = trained((STALE if fault == "warning" else KINDS)["AveragedModel"])
    mine, theirs = values(model), values(ema.module)
    calls = []
    model.register_forward_hook(lambda m, a, out: calls.append(1) or (out if len(calls) == 1 else out[:1]))
    wanted = {"inputs": ValueError, "warning": UserWarning, "block": OSError}[fault]

    def swapped():
        with swap_ema(model, ema, inputs=x if fault == "inputs" else None):
            raise OSError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(wanted):
            swapped()
    same(values(model), mine)
    same(values(ema.module), theirs)


def test_wrong_averages():
    model = net()
    mine = values(model)
    good = values(copy.deepcopy(model))
    cases = [
        ({k: v for k, v in good.items() if k != "0.bias"}, ValueError, "lacks '0.bias'"),
        ({**good, "9.weight": good["0.weight"]}, ValueError, "has besides '9.weight'"),
        ({**good, "0.weight": torch.zeros(4, 2)}, ValueError, r"'0.weight' is \(4, 3\) in torch.float32 and \(4, 2\)"),
        ({**good, "0.weight": torch.zeros(4, 3).long()}, ValueError, r"and \(4, 3\) in torch.int64"),
        ({"state_dict": good, "epoch": 3}, TypeError, "a mapping of 'state_dict', 'epoch'"),
        ({}, TypeError, "a mapping of"),
        (3, TypeError, "got a int"),
        (nn.Linear(3, 4), ValueError, "lacks '0.weight'"),
        (model, ValueError, "share the tensor '0.weight'"),
        (model.state_dict(), ValueError, "share the tensor '0.weight'"),
        (nn.Sequential(nn.LazyLinear(4), *net()[1:]), ValueError, "run the model once first"),
    ]
    for ema, kind, said in cases:
        with pytest.raises(kind, match=said):
            swap_ema(model, ema)
        same(values(model), mine)
