"""split_domains keeps the evaluated function, trains each part as its own batch norm, and joins back exactly."""

import copy
import pickle

import pytest
import torch
from torch import nn

import normwright as nw
from normwright.layers import twins
from normwright.surgery.split_domains import in_domain, join_domains, split_domains

x = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1


def net(norm=nn.BatchNorm2d, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    model.append(nn.BatchNorm1d(5, momentum=None))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    model(x)
    return model


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: twins.BatchNorm2d(c, act="gelu", eps=1e-3)])
def test_evaluation_is_the_same_in_every_domain(norm, shared):
    model = net(norm)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = copy.deepcopy(model).eval()(x)
    receipt = split_domains(model, 3, shared_affine=shared, inputs=x)
    work = receipt.model
    assert list(receipt.edits) == ["1", "5"]
    assert receipt.max_difference < 1e-5
    assert work.training
    for domain in range(3):
        with in_domain(work.eval(), domain):
            torch.testing.assert_close(work(x), wanted)
        assert work[1].running_var[domain].equal(before["1.running_var"])
    assert work[5].num_batches_tracked.item() == 1
    assert work[1].weight.shape == ((4,) if shared else (3, 4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model[1]) is type(norm(4))


@pytest.mark.parametrize("shared", [True, False])
def test_training_is_a_batch_norm_for_each_part(shared):
    # the two domains' parts through torch's own batch norms, which share or copy weight and bias
    model = net()
    parts = [x[:6], x[6:] * 3 - 2]
    split = split_domains(model, 2, shared_affine=shared).model
    out = split(torch.cat(parts))
    for domain, part in enumerate(parts):
        alone = copy.deepcopy(model)
        torch.testing.assert_close(out[6 * domain : 6 * domain + 6], alone(part), rtol=1e-4, atol=1e-5)
        for i in (1, 5):
            for key in ("running_mean", "running_var"):
                torch.testing.assert_close(getattr(split[i], key)[domain], getattr(alone[i], key), rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    got = split[1].weight.grad
    want = [copy.deepcopy(model) for _ in parts]
    for alone, part in zip(want, parts, strict=True):
        alone(part).square().sum().backward()
    grads = torch.stack([alone[1].weight.grad for alone in want])
    torch.testing.assert_close(got, grads.sum(0) if shared else grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: twins.BatchNorm2d(c, act="relu")])
def test_join_gives_one_domain_back(norm, shared):
    model = net(norm)
    split = split_domains(model, 2, shared_affine=shared).model
    for _ in range(3):
        split(torch.cat([x, x * 3 - 2]))
    if not shared:
        nn.init.uniform_(split[1].weight)
    split = pickle.loads(pickle.dumps(split))
    for domain in range(2):
        receipt = join_domains(split, domain, inputs=x)
        joined = receipt.model
        assert [type(joined[i]) for i in (1, 5)] == [type(model[1]), nn.BatchNorm1d]
        assert joined.state_dict().keys() == model.state_dict().keys()
        assert receipt.max_difference < 1e-5
        with in_domain(split.eval(), domain):
            torch.testing.assert_close(joined.eval()(x), split(x))
        torch.testing.assert_close(joined[1].running_var, split[1].running_var[domain])
        assert joined[5].momentum is None
        assert vars(joined[1]).keys() == vars(model[1]).keys()
    with pytest.raises(ValueError, match="'1' has domains 0 to 1; got 2"):
        join_domains(split, 2)


def test_there_and_back_is_the_model():
    model = net()
    joined = join_domains(split_domains(model, 2).model, 1).model
    for (key, a), b in zip(model.state_dict().items(), joined.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert repr(joined) == repr(model)


def test_undo():
    for make in (lambda m: split_domains(m, 2), lambda m: join_domains(split_domains(m, 2).model, 0)):
        receipt = make(net())
        after = [type(m) for m in receipt.model.modules()]
        keys = list(receipt.model.state_dict())
        receipt.undo()
        assert [type(m) for m in receipt.model.modules()] != after
        assert list(receipt.model.state_dict()) == keys
        receipt.model(x)


def test_parameters_stay_what_they_were():
    model = net()
    model[1].weight.requires_grad_(False)
    model[1].bias = model[1].weight  # tied within the layer
    shared = split_domains(model, 2).model
    assert shared[1].bias is shared[1].weight
    receipt = split_domains(model, 2, shared_affine=False)
    assert list(receipt.edits) == ["5"]
    assert "shares its weight or bias" in receipt.skipped["1"]
    model = net()
    model[1].weight.requires_grad_(False)
    own = split_domains(model, 2, shared_affine=False).model[1]
    assert (own.weight.requires_grad, own.bias.requires_grad) == (False, True)
    half = split_domains(model.bfloat16(), 2, shared_affine=False).model[1]
    assert {tensor.dtype for tensor in (half.weight, half.running_mean)} == {torch.bfloat16}


class Own(nn.BatchNorm2d):
    pass


def test_what_is_left_alone_is_named():
    layers = {
        "own": Own(4),
        "sync": nn.SyncBatchNorm(4),
        "ghost": nw.GhostBatchNorm(4, 2),
        "stateless": nn.BatchNorm2d(4, track_running_stats=False),
        "frozen": nn.BatchNorm2d(4),
        "parametrized": nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), "weight", dim=0),
        "replaced": nn.BatchNorm2d(4),
        "plain": nn.BatchNorm2d(4, affine=False),
    }
    model = nn.ModuleDict(layers)
    model["again"] = model["plain"]
    nw.freeze(model["frozen"])
    model["replaced"].forward = torch.relu
    receipt = split_domains(model, 2)
    reasons = {
        "own": "Own is neither",
        "sync": "SyncBatchNorm is neither",
        "ghost": "GhostBatchNorm is neither",
        "stateless": "keeps no running",
        "frozen": "unfreeze it first",
        "parametrized": "parametrized",
        "replaced": "forward was replaced",
    }
    assert receipt.skipped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in receipt.skipped[name]
    assert receipt.edits["plain"].also == ("again",)
    assert receipt.model["again"] is receipt.model["plain"]
    assert not list(receipt.model["plain"].parameters())
    by_hand = nn.Sequential(nw.SplitBatchNorm(4, 2, act="relu"))
    assert "say which class" in join_domains(by_hand, 0).skipped["0"]
    assert type(join_domains(by_hand, 0, to=nn.BatchNorm2d).model[0]) is twins.BatchNorm2d
    for call in (lambda: split_domains(model, 0), lambda: split_domains(model, True)):
        with pytest.raises(ValueError, match="n is the number of domains"):
            call()
    with pytest.raises(ValueError, match="to is BatchNorm1d, 2d or 3d"):
        join_domains(by_hand, 0, to=nn.LayerNorm)
    with pytest.raises(RuntimeError, match="edits a copy"):
        split_domains(nn.LazyBatchNorm2d(), 2)
    with pytest.raises(TypeError, match="works on plain modules"):
        split_domains(nn.DataParallel(net()), 2)


def test_hooks_are_carried_and_recalibrate_knows_the_domains():
    model = net()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    split = split_domains(model, 2).model
    domains = [x, x * 3 - 2]
    nw.recalibrate(split, domains=domains)
    assert calls
    for domain, data in enumerate(domains):
        inner = split[0](data).detach().double()
        torch.testing.assert_close(split[1].running_var[domain].double(), inner.var((0, 2, 3)), rtol=1e-5, atol=0)
    assert split[1].split == 0
