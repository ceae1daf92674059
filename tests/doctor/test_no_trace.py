"""A model is bit for bit what it was after `diagnose`, and one that cannot be run is still looked at."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import normwright as nw


class Restless(nn.Module):
    """Everything that a probe could disturb: buffers, plain tensors, power iteration, dropout, counters, hooks."""

    def __init__(self, fails_in=None):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)
        self.plain = torch.zeros(8)
        self.nested = {"last": [torch.zeros(2, 8)], "calls": 0}
        self.fails_in = fails_in
        self.norm.register_forward_hook(lambda *_: None)
        self.head.requires_grad_(False)
        self.drop.eval()

    def forward(self, x):
        h = self.norm(self.linear(x))
        self.plain += h.detach().mean(0)
        self.nested["last"][0][0] = h.detach()[0]
        self.nested["calls"] += 1
        if self.fails_in == ("training" if self.training else "evaluation"):
            raise ZeroDivisionError("on purpose")
        return self.head(self.drop(h).relu())


def picture(model, optimizer):
    """Every bit and every identity that has to stay."""
    tensors = [*model.named_parameters(), *model.named_buffers(), ("plain", model.plain)]
    tensors.append(("nested", model.nested["last"][0]))
    return {
        "values": [(name, id(t), t.detach().clone().numpy().tobytes(), t.requires_grad) for name, t in tensors],
        "gradients": [(id(p.grad), None if p.grad is None else p.grad.numpy().tobytes()) for p in model.parameters()],
        "modes": [(type(m), m.training, m.extra_repr()) for m in model.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
        ],
        "plain": (id(model.nested), id(model.nested["last"]), model.nested["calls"], sorted(vars(model))),
        "optimizer": str(optimizer.state_dict()),
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
    }


@pytest.mark.parametrize("fails_in", [None, "training", "evaluation"])
def test_diagnose_leaves_no_trace(fails_in):
    model = Restless(fails_in)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    data = [(torch.randn(32, 6), torch.randint(0, 3, (32,))) for _ in range(3)]
    if fails_in is None:
        for x, target in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    generator = torch.Generator().manual_seed(5)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*data, strict=True))), 32, shuffle=True, generator=generator
    )
    before, drawn = picture(model, optimizer), generator.get_state()
    report = nw.diagnose(
        model, data[0][0], targets=data[0][1], loss=nn.CrossEntropyLoss(), optimizer=optimizer, loader=loader
    )
    assert picture(model, optimizer) == before
    assert torch.equal(generator.get_state(), drawn)
    if fails_in is not None:
        said = " ".join(skipped.why for skipped in report.not_run)
        assert "ZeroDivisionError" in said
        assert report.ran  # the others ran


def test_two_inputs_a_mapping_and_a_model_that_needs_more():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4, momentum=0.99)

        def forward(self, a, b):
            return self.norm(a) + self.norm(b)

    a, b = torch.randn(32, 4), torch.randn(32, 4)
    for given in (
        {"inputs": {"a": a, "b": b}},
        {"inputs": (a, b), "forward": lambda model, batch: model(*batch)},
    ):
        report = nw.diagnose(Two(), **given)
        assert "NW108" in {finding.code for finding in report.findings}
        assert not [skipped for skipped in report.not_run if "raised" in skipped.why]
    report = nw.diagnose(Two(), a)
    assert "NW108" in {finding.code for finding in report.findings}  # what the layer itself shows is still found
    assert any("missing 1 required positional argument: 'b'" in skipped.why for skipped in report.not_run)
