"""The plain engine against a loop written out by hand, its pairing, resuming, divergence and evaluations."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normwright.lab import engine
from normwright.lab.errors import UserError
from normwright.lab.executor import in_process
from normwright.lab.journal import Journal
from normwright.lab.study import Arm, Contrast, Moment, Study


def build(settings, shape, classes):
    if settings.get("raises"):
        raise RuntimeError("the factory fell over")
    torch.rand(settings.get("draws", 0))  # an arm whose other layers use up random numbers
    layers = {"flatten": nn.Flatten(), "one": nn.Linear(shape[0] * shape[1] * shape[2], 12)}
    if settings["norm"] == "bn":
        layers["norm"] = nn.BatchNorm1d(12)
    model = nn.Sequential()
    layers |= {"act": nn.Sigmoid(), "drop": nn.Dropout(0.2), "two": nn.Linear(12, classes)}
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


STUDY = Study(
    name="tiny",
    title="Tiny",
    question="?",
    claim="!",
    source="",
    arms=(Arm("bn", "with", {"norm": "bn"}), Arm("none", "without", {"norm": "none", "draws": 5})),
    build=build,
    contrasts=(Contrast("with against without", ("bn", "test_acc"), ("none", "test_acc")),),
    fixed={"epochs": 3, "batch_size": 16, "optimizer": "sgd"},
    nuisance={"lr": 0.5},
)


def job(data, study=STUDY, **overrides):
    settings = {arm.name: {**study.fixed, **study.nuisance, **arm.settings, **overrides} for arm in study.arms}
    return engine.Job(study, data, settings, torch.device("cpu"))


def initial(work, arm, seed):
    return engine.initial(work, engine.Start(0, arm, seed, work.settings[arm]))


def sgd(lr=0.5):
    return {"optimizer": "sgd", "lr": lr}


def sequential(work, journal, study, watcher):
    in_process(work, journal, study, "sequential", watcher)


class Watcher:
    def __init__(self, stop_after=None):
        self.images, self.epochs, self.ends, self.stop_after = 0, 0, [], stop_after

    def begin(self, runs): ...
    def say(self, text): ...
    def trained(self, images):
        self.images += images

    def epoch(self, run, epoch, metrics):
        self.epochs += 1
        if self.epochs == self.stop_after:
            raise KeyboardInterrupt

    def end(self, run, status, error):
        self.ends.append((run.arm, run.seed, status))


def journal_with(path, work, seeds=(0, 1)):
    journal = Journal(path)
    study = journal.create_study("tiny", {}, environment={})
    for seed in seeds:
        for arm in work.study.arms:
            journal.add_run(study.id, arm.name, seed, work.settings[arm.name])
    return journal, study.id


def recorded(journal):
    """All metrics of all runs but the times."""
    return [
        (
            run.arm,
            run.seed,
            run.status,
            [{k: v for k, v in m.items() if "seconds" not in k} for m in journal.epochs(run.id).values()],
        )
        for run in journal.runs()
    ]


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (10, 4, [(0, 4), (4, 8), (8, 10)]),
        (9, 4, [(0, 4), (4, 9)]),
        (8, 4, [(0, 4), (4, 8)]),
        (1, 4, [(0, 1)]),
        (3, 4, [(0, 3)]),
    ],
)
def test_batches_are_ragged_but_never_a_single_image(n, size, expected):
    assert engine.batches(n, size) == expected


@pytest.mark.parametrize("arm", ["bn", "none"])
def test_an_epoch_is_the_loop_written_by_hand(data, arm):
    work = job(data)
    model = initial(work, arm, 3)
    by_hand = copy.deepcopy(model)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(9))
    ticks = []
    torch.manual_seed(5)
    optimizer = engine.make_optimizer(model, sgd())
    loss, accuracy = engine.train_epoch(model, optimizer, data.x_train, data.y_train, order, 16, ticks.append)
    torch.manual_seed(5)
    total, right = 0.0, 0
    by_hand.train()
    for chosen in order.split(16):
        logits = by_hand(data.x_train[chosen])
        step_loss = F.cross_entropy(logits, data.y_train[chosen])
        gradients = torch.autograd.grad(step_loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
        total += step_loss.item() * len(chosen)
        right += int((logits.argmax(1) == data.y_train[chosen]).sum())
    for (key, ours), theirs in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=key)
    assert loss == pytest.approx(total / 100, rel=1e-5)
    assert accuracy == right / 100
    assert sum(ticks) == 100


def test_arms_share_their_initial_weights_and_their_order(data):
    work = job(data)
    first, second = initial(work, "bn", 0), initial(work, "none", 0)
    shared = dict(second.named_parameters())
    for key, value in first.named_parameters():
        if key in shared:
            assert torch.equal(value, shared[key]), key
    assert not torch.equal(first.one.weight, initial(work, "bn", 1).one.weight)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adadelta", "adam"])
def test_optimizers_are_torchs(name):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    classes = {"sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop", "adadelta": "Adadelta", "adam": "Adam"}
    optimizers = [
        engine.make_optimizer(ours, {"optimizer": name, "lr": 0.1}),
        getattr(torch.optim, classes[name])(theirs.parameters(), lr=0.1),
    ]
    for _ in range(3):
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_three_evaluations_by_hand_and_the_model_as_it_was(data):
    work = job(data, batch_size=25)
    model = initial(work, "bn", 0)
    engine.train_epoch(model, engine.make_optimizer(model, sgd()), data.x_train, data.y_train, torch.arange(100), 25)
    before = copy.deepcopy(model.state_dict())
    found = engine.three_ways(model, engine.parts(data, {}), {"batch_size": 25}, last=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def accuracy(mean, var, x, y):
        hidden = F.linear(x.flatten(1), model.one.weight, model.one.bias)
        if mean is None:
            mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
        normal = (hidden - mean) / (var + 1e-5).sqrt() * model.norm.weight + model.norm.bias
        return F.linear(normal.sigmoid(), model.two.weight, model.two.bias).argmax(1) == y

    x, y = data.x_test, data.y_test
    train = F.linear(data.x_train.flatten(1), model.one.weight, model.one.bias)
    with torch.no_grad():
        running = accuracy(model.norm.running_mean, model.norm.running_var, x, y)
        exact = accuracy(train.mean(0), train.var(0), x, y)
        batch = torch.cat([accuracy(None, None, x[i : i + 25], y[i : i + 25]) for i in (0, 25)])
    assert found["test_acc"] == int(running.sum()) / 50
    assert found["test_acc_recalibrated"] == int(exact.sum()) / 50
    assert found["test_acc_batch"] == int(batch.sum()) / 50
    assert "test_acc_batch" not in engine.three_ways(
        initial(work, "none", 0), engine.parts(data, {}), {"batch_size": 25}, last=True
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_equals_uninterrupted_exactly(data, tmp_path, optimizer):
    work = job(data, optimizer=optimizer, lr=0.05)
    whole, study = journal_with(tmp_path / "whole.sqlite", work)
    state = torch.get_rng_state()
    watcher = Watcher()
    sequential(work, whole, study, watcher)
    assert torch.equal(state, torch.get_rng_state())
    assert watcher.images == 4 * 3 * 100
    parts, study = journal_with(tmp_path / "parts.sqlite", work)
    for stop_after in (1, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            sequential(work, parts, study, Watcher(stop_after))
        assert [run.status for run in parts.runs()].count("interrupted") == 1
    sequential(work, parts, study, Watcher())
    assert recorded(parts) == recorded(whole)
    assert [status for _, _, status, _ in recorded(whole)] == ["finished"] * 4
    assert len(recorded(whole)[0][3]) == 3
    whole.close()
    parts.close()


def test_the_trained_network_is_kept_and_is_the_one_that_was_evaluated(data, tmp_path):
    work = job(data)
    journal, study = journal_with(tmp_path / "j.sqlite", work, seeds=(0,))
    with journal:
        sequential(work, journal, study, Watcher())
        for run in journal.runs():
            kept = journal.checkpoint(run.id)
            assert (sorted(kept), kept["shape"], kept["classes"]) == (["classes", "model", "shape"], [1, 4, 4], 3)
            model = build(run.config, tuple(kept["shape"]), kept["classes"])
            model.load_state_dict(kept["model"])
            with torch.no_grad():
                predicted = model.eval()(data.x_test).argmax(1)
            assert int((predicted == data.y_test).sum()) / 50 == run.results["test_acc"]


def test_a_run_that_diverges_is_recorded_and_the_study_goes_on(data, tmp_path):
    work = job(data)
    work.settings["bn"]["lr"] = 1e9
    journal, study = journal_with(tmp_path / "j.sqlite", work, seeds=(0,))
    watcher = Watcher()
    with journal:
        sequential(work, journal, study, watcher)
        first, second = journal.runs()
        assert (first.status, first.epochs) == ("diverged", 1)
        assert "train loss" in first.error
        assert second.status == "finished"
        assert watcher.ends == [("bn", 0, "diverged"), ("none", 0, "finished")]


def test_losses_that_are_not_finite_have_diverged():
    assert "nan" in engine.diverged({"train_loss": float("nan")}, 10)
    assert "inf" in engine.diverged({"train_loss": 1.0, "test_loss": float("inf")}, 10)
    assert engine.diverged({"train_loss": 229.0, "test_loss": 2.3}, 10) is None
    assert "100 times" in engine.diverged({"train_loss": 232.0, "test_loss": 2.3}, 10)


def test_a_factory_that_raises_fails_its_run_alone_and_is_tried_again(data, tmp_path):
    broken = [True]

    def sometimes(settings, shape, classes):
        return build({**settings, "raises": settings["norm"] == "none" and broken[0]}, shape, classes)

    arms = (Arm("bn", "with", {"norm": "bn"}), Arm("bad", "bad", {"norm": "none"}))
    work = job(data, replace(STUDY, arms=arms, build=sometimes))
    journal, study = journal_with(tmp_path / "j.sqlite", work, seeds=(0,))
    with journal:
        sequential(work, journal, study, Watcher())
        good, bad = journal.runs()
        assert (good.status, bad.status) == ("finished", "failed")
        assert bad.error == "RuntimeError: the factory fell over"
        broken[0] = False
        sequential(work, journal, study, Watcher())
        assert journal.runs()[1].status == "finished"


def test_mixing_is_fixed_and_keeps_images_with_their_labels(data):
    once, again = engine.mixed(data), engine.mixed(data)
    assert torch.equal(once.x_train, again.x_train)
    assert not torch.equal(once.y_train, data.y_train)
    back = {tuple(image.flatten().tolist()): int(label) for image, label in zip(data.x_test, data.y_test, strict=True)}
    for image, label in zip(once.x_test, once.y_test, strict=True):
        assert back[tuple(image.flatten().tolist())] == int(label)


def test_settings_of_the_optimizer_and_the_clip_by_hand(data):
    """Momentum, weight decay and a clipped gradient, two steps in plain arithmetic."""
    model, by_hand = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    by_hand.load_state_dict(model.state_dict())
    settings = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    x, y = torch.eye(3), torch.tensor([0, 1, 1])
    optimizer = engine.make_optimizer(model, settings)
    for _ in range(2):
        engine.train_epoch(model, optimizer, x, y, torch.arange(3), 3, clip=0.2)
    weight, velocity = by_hand.weight.detach().double(), torch.zeros(2, 3, dtype=torch.float64)
    for _ in range(2):
        p = (x.double() @ weight.T).softmax(1)
        gradient = (p - F.one_hot(y, 2)).T @ x.double() / 3
        assert float(gradient.norm()) > 0.2
        gradient = gradient * 0.2 / gradient.norm() + 0.3 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * velocity
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_parameters_that_are_frozen_stay(data):
    def frozen(settings, shape, classes):
        model = build(settings, shape, classes)
        model.one.weight.requires_grad_(False)
        return model

    work = job(data, replace(STUDY, build=frozen))
    start = engine.Start(0, "bn", 0, work.settings["bn"])
    before = engine.initial(work, start).state_dict()
    (*_, [end]) = list(engine.sequential(work, [start], lambda images: None))
    after = end.trained["model"]
    assert torch.equal(before["one.weight"], after["one.weight"])
    assert not torch.equal(before["two.weight"], after["two.weight"])


def test_images_are_held_out_and_left_out(data):
    part = engine.parts(data, {"validation": 30, "train_images": 50})
    assert torch.equal(part.x, data.x_train[:50])
    assert torch.equal(part.x_validation, data.x_train[70:])
    assert torch.equal(part.y_validation, data.y_train[70:])
    assert len(engine.parts(data, {"validation": 30}).x) == 70
    assert engine.parts(data, {}).x_validation is None
    with pytest.raises(UserError, match=r"validation=99 leaves 1 of 100 images"):
        engine.parts(data, {"validation": 99})
    work = job(data, validation=30)
    start = engine.Start(0, "none", 0, work.settings["none"])
    events = [event for events in engine.sequential(work, [start], lambda images: None) for event in events]
    model = build(work.settings["none"], (1, 4, 4), 3)
    model.load_state_dict(events[-1].trained["model"])
    with torch.no_grad():
        right = model.eval()(data.x_train[70:]).argmax(1) == data.y_train[70:]
    assert events[-1].metrics["val_acc"] == int(right.sum()) / 30


def test_the_order_is_the_seeds_or_shared():
    def order(seed, settings):
        return torch.randperm(50, generator=engine.order_generator(engine.Start(0, "bn", seed, settings)))

    assert not torch.equal(order(0, {}), order(1, {}))
    assert torch.equal(order(0, {"order": "shared"}), order(1, {"order": "shared"}))


def test_observations_see_every_epoch_and_change_no_training(data, tmp_path):
    seen = []

    def observe(moment: Moment):
        torch.rand(7)
        with torch.no_grad():
            moment.model.one.weight.zero_()  # it is a copy
        seen.append((moment.epoch, moment.last, moment.model.training))
        return {"twice": 2.0 * moment.epoch}

    plain, watched = job(data), job(data, replace(STUDY, observe=observe))
    numbers = []
    for name, work in (("plain", plain), ("watched", watched)):
        journal, study = journal_with(tmp_path / f"{name}.sqlite", work, seeds=(0,))
        with journal:
            sequential(work, journal, study, Watcher())
            numbers.append([(m["train_loss"], m["test_acc"]) for m in journal.epochs(1).values()])
            extra = [{k: v for k, v in m.items() if "twice" in k} for m in journal.epochs(1).values()]
    assert numbers[0] == numbers[1]
    assert seen[:4] == [(-1, False, False), (0, False, False), (1, False, False), (2, True, False)]
    assert extra == [{"start_twice": -2.0, "twice": 0.0}, {"twice": 2.0}, {"twice": 4.0}]


def test_a_procedure_takes_the_place_of_training(data, tmp_path):
    def procedure(experiment):
        if experiment.settings["norm"] == "none":
            raise FloatingPointError("the sum overflowed")
        return {"measured": experiment.seed + float(torch.rand(())), "list": [1.0, 2.0]}

    work = job(data, replace(STUDY, procedure=procedure))
    journal, study = journal_with(tmp_path / "j.sqlite", work, seeds=(0, 1))
    with journal:
        sequential(work, journal, study, Watcher())
        runs = journal.runs()
    assert [run.status for run in runs] == ["finished", "diverged"] * 2
    torch.manual_seed(1)
    assert runs[2].results["measured"] == 1 + float(torch.rand(()))
    assert runs[2].results["list"] == [1.0, 2.0]
    assert runs[1].error == "the sum overflowed"
