"""What each arm trains, counted, and the convolution of which few weights train against a mask on its gradient."""

import pytest
import torch
import torch.nn.functional as F

from normwright.lab.data import Dataset
from normwright.lab.engine import Job, Start, initial, make_optimizer
from normwright.lab.study import plan
from normwright.studies.bn_only import STUDY, FewWeights, build

ARMS = plan(STUDY, "digits", {}).arms
SHAPE = (1, 12, 12)
NORMS, LAST, ALL = 2 * (16 + 16 + 32 + 32 + 64 + 64), 64 * 10 + 10, 72_666


@pytest.mark.parametrize(
    ("arm", "count"),
    [
        ("all", ALL),
        ("norms", NORMS),
        ("few", NORMS),
        ("last", LAST),
        ("norms-last", NORMS + LAST),
        ("few-last", NORMS + LAST),
    ],
)
def test_number_of_trained_parameters(arm, count):
    model = build(ARMS[arm], SHAPE, 10)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_few_weights_are_a_masked_gradient():
    """Its change's gradient is the full weight's gradient at the chosen places: two different ones in each filter."""
    conv = FewWeights(3, 5, 3, 2, padding=1, bias=False).double()
    x = torch.randn(2, 3, 7, 7, dtype=torch.double)
    with torch.no_grad():
        conv.change.normal_()
    chosen = torch.zeros(5, 27, dtype=torch.double).flatten()
    chosen[conv.chosen] = 1
    assert torch.equal(chosen.view(5, 27).sum(1), torch.full((5,), 2.0, dtype=torch.double))
    weight = conv.weight.detach().flatten().clone()
    for place, change in zip(conv.chosen.tolist(), conv.change.tolist(), strict=True):
        weight[place] += change
    weight = weight.view_as(conv.weight).requires_grad_()
    expected = F.conv2d(x, weight, stride=2, padding=1)
    torch.testing.assert_close(conv(x), expected)
    (conv(x) ** 2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(conv.change.grad, weight.grad.flatten()[conv.chosen])


@pytest.mark.parametrize(
    ("arm", "moved"),
    [("norms", ["norm"]), ("few", ["change"]), ("last", ["output"]), ("few-last", ["change", "output"])],
)
def test_training_moves_only_what_the_arm_trains_and_all_start_equal(arm, moved):
    none = torch.zeros(0)
    data = Dataset("tiny", torch.zeros(2, *SHAPE), none, none, none, tuple("0123456789"), "", "")
    job = Job(STUDY, data, ARMS, torch.device("cpu"))
    first = dict(initial(job, Start(0, "all", 1, ARMS["all"])).named_parameters())
    model = initial(job, Start(0, arm, 1, ARMS[arm]))
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters() if name in first)
    x, y = torch.randn(20, *SHAPE), torch.arange(20) % 10
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, ARMS[arm])
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if any(part in name for part in moved)}
