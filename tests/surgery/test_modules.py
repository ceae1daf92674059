"""The tools that operations on modules share."""

import copy

import pytest
import torch
from torch import nn

from normwright.surgery.modules import all_or_nothing, become, copied, names_of_parameters


def _tables(model: nn.Module) -> dict:
    return {
        name: (type(module), sorted(vars(module)), [id(t) for t in module.parameters(False)], list(module._modules))
        for name, module in model.named_modules()
    }


def test_become_is_seen_by_every_holder_and_keeps_hooks_mode_and_marks() -> None:
    norm = nn.BatchNorm2d(4)
    norm.nw_frozen = True
    calls = []
    handle = norm.register_forward_hook(lambda m, args, y: calls.append(type(m)))
    model = nn.Sequential(norm, norm)
    model.eval()
    held = [norm]
    become(norm, nn.GroupNorm(2, 4))
    x = torch.randn(3, 4, 2, 2)
    assert torch.equal(model(x), nn.Sequential(nn.GroupNorm(2, 4), nn.GroupNorm(2, 4))(x))
    assert type(held[0]) is nn.GroupNorm
    assert not norm.training
    assert norm.nw_frozen
    assert calls == [nn.GroupNorm] * 2
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    handle.remove()
    model(x)
    assert len(calls) == 2


def test_become_refuses_what_class_and_state_do_not_describe() -> None:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="parametrized"):
        become(linear, nn.Identity())
    norm = nn.BatchNorm1d(2)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="forward replaced"):
        become(norm, nn.Identity())


def test_all_or_nothing_brings_back_classes_tables_and_removable_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    calls = []
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    before, state = _tables(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), all_or_nothing(model):  # noqa: PT012 - the block is what is tested
        become(model[1], nn.Identity())
        model[0].bias = None
        model[0].register_buffer("extra", torch.zeros(1), persistent=False)
        model.append(nn.Tanh())
        model[2].register_forward_hook(lambda *_: calls.append(2))
        raise ZeroDivisionError
    assert _tables(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    model(torch.randn(2, 2, 3, 3))
    assert calls == [1]
    handle.remove()
    model(torch.randn(2, 2, 3, 3))
    assert calls == [1]


def test_all_or_nothing_yields_the_way_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = _tables(model)
    with all_or_nothing(model) as restore:
        become(model[0], nn.Identity())
    assert type(model[0]) is nn.Identity
    restore()
    assert _tables(model) == before


def test_copied_refuses_wrapped_models_by_name_and_says_what_cannot_be_copied() -> None:
    with pytest.raises(TypeError, match=r"fold works on plain modules, and '0' is a OptimizedModule"):
        copied(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")), "fold")
    model = nn.Linear(2, 2)
    model.kept = model(torch.randn(1, 2))
    with pytest.raises(RuntimeError, match=r"fold edits a copy, and copy\.deepcopy of this Linear raised"):
        copied(model, "fold")


def test_names_of_parameters_shows_ties_and_counts_shared_modules_once() -> None:
    tied = nn.Linear(2, 2)
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"a": tied, "b": nn.Linear(2, 2), "c": shared, "d": shared})
    model["b"].weight = tied.weight
    names = names_of_parameters(model)
    assert names[id(tied.weight)] == ["a.weight", "b.weight"]
    assert names[id(shared.weight)] == ["c.weight"]
