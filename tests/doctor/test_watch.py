"""The watch: what it sees, against counts made by hand; what it must stay silent about; that it leaves nothing."""

import copy
import io
import pickle
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normwright as nw
from normwright.doctor import WatchCallback
from normwright.doctor.check import all_checks


def mlp(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(8, 1))


def sgd(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.01, **options})


def step(model, optimizer, x=None, zero=True):
    if zero:
        optimizer.zero_grad()
    loss = (model(torch.randn(32, 4) if x is None else x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def codes(watch) -> list[str]:
    return [finding.code for finding in watch.report.findings]


def grave(watch) -> list[str]:
    """The findings that a healthy run must not have."""
    return [f.code for f in watch.report.findings if f.severity != "advice" or f.evidence != "advice"]


def hooks_of(model: nn.Module, optimizer=None) -> list:
    found = [
        dict(value)
        for module in model.modules()
        for key, value in vars(module).items()
        if "hooks" in key and isinstance(value, dict)
    ]
    for parameter in model.parameters():
        found.append(dict(parameter._backward_hooks or {}))
        found.append(dict(parameter._post_accumulate_grad_hooks or {}))
    if optimizer is not None:
        found.append(dict(optimizer._optimizer_step_post_hooks))
    return found


# ------------------------------------------------------------------------------------------------- what the log holds


def test_a_healthy_run_is_silent_and_counted():
    model = mlp(0.1)
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(4):
            model.train()
            for _ in range(10):
                step(model, optimizer)
            model.eval()
            with torch.no_grad():
                for _ in range(3):
                    model(torch.randn(32, 4))
    assert codes(watch) == []
    log = watch.log
    assert log.count == len(log.steps) == 40
    assert [s.index for s in log.looks] == [0, 1, 2, 3, 4, 5, 6, 7, 17, 34]
    assert all(s.backwards == 1 and s.forwards == 1 and s.training for s in log.steps)
    assert [s.evaluations for s in log.steps] == [3 if i in (10, 20, 30) else 0 for i in range(40)]
    assert log.now.evaluations == 3
    assert all(s.updates == {"1": 1} and (s.switching, s.active) == (2, 2) for s in log.looks)
    layer = log.layers["1"]
    assert (layer.forwards, layer.recomputed, layer.unrecorded, layer.values) == (40, 0, 0, 32)


def test_values_and_updates_are_those_of_the_batches():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 1))
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for n in (8, 5, 6):
            step(model, optimizer, torch.randn(n, 3, 6, 6))
    assert watch.log.layers["1"].values == 5 * 4 * 4


def test_the_size_of_an_update_is_the_optimizers():
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = sgd(model, lr=0.25)
    expected = []
    with nw.watch(model, optimizer) as watch:
        for _ in range(5):
            before = model[0].weight.detach().clone()
            step(model, optimizer)
            expected.append(float((0.25 * model[0].weight.grad).norm() / before.norm()))
    assert watch.log.ratios["0.weight"] == pytest.approx(expected, rel=1e-4)


def test_steps_are_told_by_hand_without_an_optimizer():
    model = mlp()
    optimizer = sgd(model)
    with nw.watch(model) as watch:
        for _ in range(5):
            step(model, optimizer)
            watch.step()
    assert watch.log.count == 5
    assert codes(watch) == []
    with nw.watch(model) as watch:
        step(model, optimizer)
    reasons = {entry.code: entry.why for entry in watch.report.not_run}
    assert "watch.step()" in reasons["NW806"]
    assert "watch.step()" in reasons["NW801"]


# --------------------------------------------------------------------------------------------------- nothing remains


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_afterwards(fails):
    model = mlp()
    model[1].register_forward_hook(lambda *a: None)
    optimizer = sgd(model)
    before = hooks_of(model, optimizer)
    try:
        with nw.watch(model, optimizer):
            assert hooks_of(model, optimizer) != before
            step(model, optimizer)
            if fails:
                model(torch.randn(3, 5))
    except RuntimeError:
        assert fails
    assert hooks_of(model, optimizer) == before


def test_training_is_bit_for_bit_the_same():
    outcomes = []
    for watched in (False, True):
        model = mlp(0.2)
        optimizer = sgd(model, momentum=0.9)
        torch.manual_seed(1)
        with nw.watch(model, optimizer) if watched else nullcontext():
            losses = [step(model, optimizer).item() for _ in range(20)]
        outcomes.append((losses, {k: v.clone() for k, v in model.state_dict().items()}))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(outcomes[0][1][key], outcomes[1][1][key]) for key in outcomes[0][1])


def test_copies_and_pickles_hold_no_hook_and_leave_the_watch_alone():
    model = mlp()
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        step(model, optimizer)
        average = torch.optim.swa_utils.AveragedModel(model)
        twin = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
        torch.save(model, io.BytesIO())
        for other in (average, twin, loaded):
            other.train()
            with torch.no_grad():
                other(torch.randn(8, 4))
            other(torch.randn(8, 4)).sum().backward()
        average.update_parameters(model)
        step(model, optimizer)
    assert [s.forwards for s in watch.log.steps] == [1, 1]
    assert watch.log.layers["1"].forwards == 2
    assert watch.log.layers["1"].unrecorded == 0


def test_watches_nest_and_one_that_raises_takes_its_own():
    model = mlp()
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as outer:
        with nw.watch(model, optimizer) as inner:
            step(model, optimizer)
        step(model, optimizer)
    assert (inner.log.count, outer.log.count) == (1, 2)


def test_the_report_holds_the_model_and_says_which_checks_ran_and_which_broke(monkeypatch):
    def breaks(self, log):
        raise KeyError("a check")

    model = mlp()
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        step(model, optimizer)
    ran, missed = watch.report.ran, {entry.code for entry in watch.report.not_run}
    assert watch.report.model is model
    assert ran
    assert missed.isdisjoint(ran)
    broken = next(check for check in all_checks() if check.code == ran[0])
    monkeypatch.setattr(broken, "watched", breaks)
    assert watch.report.ran == ran[1:]
    (entry,) = [entry for entry in watch.report.not_run if entry.code == ran[0]]
    assert entry.why == "it raised KeyError: 'a check'"


def test_errors():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        nw.watch(mlp)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no check"):
        nw.watch(mlp(), select=["NW999"])


@pytest.mark.parametrize("how", ["wrapper", "inside", "function"])
def test_compiled_models_compile_whole_and_are_silent(how):
    model = mlp()
    optimizer = sgd(model)
    torch.compiler.reset()
    call, given = model, model
    if how == "wrapper":
        call = given = torch.compile(model, backend="eager", fullgraph=True)
    elif how == "inside":
        model.compile(backend="eager", fullgraph=True)
    else:
        call = torch.compile(lambda x: model(x), backend="eager", fullgraph=True)
    with nw.watch(given, optimizer) as watch:
        for _ in range(20):
            step(call, optimizer)
    assert codes(watch) == []
    assert all(s.updates == {"1": 1} and s.backwards == 1 and s.training for s in watch.log.looks)
    torch.compiler.reset()
    model.eval()
    with nw.watch(given, optimizer) as watch:
        for _ in range(5):
            step(call, optimizer)
    assert codes(watch) == ["NW801"]


def test_fused_blocks_stay_fused_between_the_looks():
    model = nw.accelerate(mlp()).model
    optimizer = sgd(model)
    hooked = []
    with nw.watch(model, optimizer) as watch:
        for _ in range(20):
            hooked.append(bool(model[1]._forward_pre_hooks))
            step(model, optimizer)
    assert hooked == [i < 8 or i == 17 for i in range(20)]
    assert codes(watch) == []


# ------------------------------------------------------------------------------------------------------- the findings


def test_evaluation_mode_from_the_first_step_and_after_a_validation():
    model = mlp(0.5).eval()
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(6):
            step(model, optimizer)
    (found,) = watch.report.findings
    assert (found.code, found.severity) == ("NW801", "warning")
    assert found.numbers == {"steps_in_evaluation_mode": 6, "steps": 6, "layers_that_depend_on_mode": 2}
    model.train()
    with nw.watch(model, optimizer) as watch:
        for i in range(20):
            if i == 12:
                model.eval()
            step(model, optimizer)
    (found,) = watch.report.findings
    assert found.numbers["steps_in_evaluation_mode"] == 8
    assert "after 12 in training mode" in found.message


def test_evaluation_mode_where_nothing_depends_on_it_is_silent():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 1)).eval()
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).eval()
    for each in (model, nn.Sequential(encoder)):
        optimizer = sgd(each)
        with nw.watch(each, optimizer) as watch:
            for _ in range(10):
                step(each, optimizer, torch.randn(8, 3, 4))
        assert codes(watch) == []


def test_frozen_statistics_are_no_evaluation_mode():
    model = mlp(0.5)
    optimizer = sgd(model)
    model[1].eval()
    with nw.watch(model, optimizer) as watch:
        for _ in range(10):
            step(model, optimizer)
    assert codes(watch) == []


def test_an_attack_in_evaluation_mode_before_each_step_is_silent():
    model = mlp(0.5)
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(10):
            x = torch.randn(32, 4, requires_grad=True)
            model.eval()
            model(x).square().mean().backward()
            model.train()
            step(model, optimizer, (x + 0.1 * x.grad.sign()).detach())
    assert codes(watch) == []


@pytest.mark.parametrize("grads_off", [torch.no_grad, torch.inference_mode])
def test_validation_without_eval_is_found(grads_off):
    model = mlp()
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(3):
            for _ in range(6):
                step(model, optimizer)
            with grads_off():
                for _ in range(2):
                    model(torch.randn(32, 4))
    (found,) = watch.report.findings
    assert (found.code, found.severity) == ("NW802", "warning")
    assert found.numbers == {"forwards": 6, "after_steps": 3, "steps": 18, "layers": 1}
    assert watch.log.layers["1"].moved_by_unrecorded == 6


def test_reestimated_statistics_a_momentum_encoder_and_layer_norm_are_no_validation():
    class MomentumContrast(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = mlp(), mlp()

        def forward(self, x):
            with torch.no_grad():
                key = self.key(x)
            return self.query(x) - key

    model = MomentumContrast()
    optimizer = sgd(model.query)
    with nw.watch(model, optimizer) as watch:
        for _ in range(10):
            step(model, optimizer)
    assert codes(watch) == []
    assert [watch.log.layers[name].unrecorded for name in ("query.1", "key.1")] == [0, 0]

    model = mlp()
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(10):
            step(model, optimizer)
        nw.recalibrate(model, [torch.randn(32, 4) for _ in range(3)])
    assert codes(watch) == []

    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(3):
            for _ in range(4):
                step(model, optimizer)
            with torch.no_grad():
                model(torch.randn(4, 4))
    assert codes(watch) == []


def test_a_generator_sampled_in_every_step_is_advice_only():
    generator, critic = mlp(), nn.Sequential(nn.Linear(1, 4), nn.LeakyReLU(), nn.Linear(4, 1))
    g, d = sgd(generator), sgd(critic)
    with nw.watch(generator, g) as watch_g, nw.watch(critic, d) as watch_d:
        for _ in range(20):
            with torch.no_grad():
                fake = generator(torch.randn(32, 4))
            d.zero_grad()
            (critic(fake).mean() - critic(torch.randn(32, 1)).mean()).backward()
            d.step()
            g.zero_grad()
            critic(generator(torch.randn(32, 4))).mean().backward()
            g.step()
    assert grave(watch_g) == []
    assert codes(watch_d) == []
    # the generator's loss adds to the critic's gradient, which is zeroed before it is used
    assert not any(s.carried for s in watch_d.log.looks)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_statistics_are_updated_twice_and_are_advice(reentrant):
    block = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
    head = nn.Linear(8, 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = block, head

        def forward(self, x):
            return self.head(checkpoint(self.block, x.requires_grad_(), use_reentrant=reentrant))

    model = Model()
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(6):
            step(model, optimizer)
    (found,) = watch.report.findings
    assert (found.code, found.severity, found.evidence) == ("NW803", "advice", "advice")
    assert watch.log.layers["block.1"].recomputed == watch.log.layers["block.1"].moved_by_recomputed == 6
    assert watch.log.looks[2].updates == {"block.1": 2}
    assert "0.19" in found.message


def test_accumulation_with_small_micro_batches_is_advice_and_with_large_ones_silent():
    for size, expected in ((8, ["NW803"]), (64, [])):
        model = mlp()
        optimizer = sgd(model)
        with nw.watch(model, optimizer) as watch:
            for _ in range(9):
                optimizer.zero_grad()
                for _ in range(4):
                    (model(torch.randn(size, 4)).square().mean() / 4).backward()
                optimizer.step()
        assert codes(watch) == expected
        assert all(s.backwards == 4 and not s.carried for s in watch.log.looks)


def test_a_siamese_network_is_no_accumulation():
    model = mlp()
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(10):
            optimizer.zero_grad()
            (model(torch.randn(8, 4)) - model(torch.randn(8, 4))).square().mean().backward()
            optimizer.step()
    assert codes(watch) == []


@pytest.mark.parametrize("way", ["none", "zeros", "data", "after"])
def test_gradients_zeroed_in_any_way_are_silent(way):
    model = mlp()
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(12):
            if way == "none":
                optimizer.zero_grad(set_to_none=True)
            elif way == "zeros":
                optimizer.zero_grad(set_to_none=False)
            elif way == "data":
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.data.zero_()
            step(model, optimizer, zero=False)
            if way == "after":
                model.zero_grad()
    assert codes(watch) == []


@pytest.mark.parametrize("every", [0, 2, 5])
def test_gradients_that_are_not_zeroed_are_found(every):
    model = mlp()
    optimizer = sgd(model, lr=1e-3)
    with nw.watch(model, optimizer) as watch:
        for i in range(20):
            step(model, optimizer, zero=bool(every) and i % every == 0)
    found = [f for f in watch.report.findings if f.code == "NW806"]
    assert len(found) == 1
    assert found[0].severity == "error"
    looked = [1, 2, 3, 4, 5, 6, 7, 17]
    carried = [i for i in looked if not every or i % every]
    assert found[0].numbers == {"steps_with_carried_gradient": len(carried), "steps_looked_at": len(looked)}


def test_gradients_carried_by_watch_step_without_an_optimizer():
    model = mlp()
    optimizer = sgd(model, lr=1e-3)
    with nw.watch(model) as watch:
        for _ in range(8):
            step(model, optimizer, zero=False)
            watch.step()
    assert codes(watch) == ["NW806"]


def test_a_scaler_that_skips_steps_is_silent():
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with nw.watch(model, optimizer) as watch:
        for i in range(20):
            optimizer.zero_grad()
            loss = model(torch.randn(32, 4)).square().mean()
            scaler.scale(loss * (float("inf") if i in (0, 1, 6) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert watch.log.count == 17
    assert codes(watch) == []


def test_second_order_steps_within_a_step_are_silent():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=1.0), nn.ReLU(), nn.Linear(8, 1))
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for _ in range(10):
            optimizer.zero_grad()
            for _ in range(3):
                names = dict(model.named_parameters())
                loss = model(torch.randn(32, 4)).square().mean()
                grads = torch.autograd.grad(loss, list(names.values()), create_graph=True)
                fast = {name: p - 0.1 * g for (name, p), g in zip(names.items(), grads, strict=True)}
                torch.func.functional_call(model, fast, (torch.randn(32, 4),)).square().mean().backward()
            optimizer.step()
    assert grave(watch) == []


def test_nonfinite_statistics_name_the_step_and_the_layer():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = sgd(model)
    with nw.watch(model, optimizer) as watch:
        for i in range(8):
            x = torch.randn(32, 4)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if i == 5:
                model[2].running_var[3] = float("nan")
            optimizer.step()
    (found,) = watch.report.findings
    assert (found.code, found.severity, found.where) == ("NW804", "error", ("2",))
    assert found.numbers["seen_at_step"] == 5


def test_stagnant_statistics_and_an_average_that_has_arrived():
    torch.manual_seed(0)
    x = 5 * torch.randn(64, 4) + 200
    # bfloat16 has steps of 1 at 196, so that a tenth of the way to 200 is rounded away; the variance has arrived
    low = nn.Sequential(nn.BatchNorm1d(4).bfloat16(), nn.Linear(4, 1).bfloat16())
    low[0].running_mean.fill_(196)
    low[0].running_var.copy_(x.var(0))
    arrived = nn.Sequential(nn.BatchNorm1d(4, momentum=1.0), nn.Linear(4, 1))
    for model, inputs, expected in ((low, x.bfloat16(), ["NW805"]), (arrived, x, [])):
        optimizer = sgd(model)
        with nw.watch(model, optimizer) as watch:
            for _ in range(8):
                step(model, optimizer, inputs)
        assert [code for code in codes(watch) if code != "NW809"] == expected
        assert watch.log.layers["0"].unmoved >= 4
    distance = ((x.bfloat16().double().mean(0) - 196).abs() / x.bfloat16().double().std(0, correction=0)).max()
    with nw.watch(low, optimizer := sgd(low)) as watch:
        for _ in range(8):
            step(low, optimizer, x.bfloat16())
    assert watch.log.layers["0"].distance == pytest.approx(float(distance))


def test_gamma_that_dies_is_found_with_its_decay_and_a_zero_start_is_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    nn.init.zeros_(model[2].weight)
    optimizer = sgd(model, lr=0.1, weight_decay=3.0)
    with nw.watch(model, optimizer, ignore=["NW809"]) as watch:
        for _ in range(40):
            step(model, optimizer)
    (found,) = [f for f in watch.report.findings if f.code == "NW807"]
    assert found.where == ("1",)
    assert found.numbers["weight_decay"] == 3.0
    assert found.numbers["share_of_channels"] == float((model[1].weight.abs() < 0.01).float().mean())


def test_dead_units_need_many_looks_and_saturation_is_not_the_outputs():
    def bad() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
        with torch.no_grad():
            model[0].bias[:60] = -100.0
        return model

    for steps, expected in ((5, []), (10, ["NW808"])):
        model = bad()
        optimizer = sgd(model)
        with nw.watch(model, optimizer) as watch:
            for _ in range(steps):
                step(model, optimizer)
        assert codes(watch) == expected
    assert watch.report.findings[0].numbers == {"dead_units": 60, "units": 64, "looks": 8}

    wide = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2), nn.Sigmoid())
    with torch.no_grad():
        wide[0].weight.mul_(1000)
        wide[2].weight.mul_(1000)
    optimizer = sgd(wide)
    with nw.watch(wide, optimizer, ignore=["NW809"]) as watch:
        for _ in range(10):
            step(wide, optimizer)
    assert [(f.code, f.where) for f in watch.report.findings if "saturated" in f.message] == [("NW808", ("1",))]


def test_gradients_zeroed_before_watch_step_make_no_dead_units():
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = sgd(model)
    with nw.watch(model) as watch:
        for _ in range(12):
            step(model, optimizer)
            optimizer.zero_grad(set_to_none=False)
            watch.step()
    assert codes(watch) == []


def test_intended_and_ignored_findings_are_not_listed():
    for ignore, marked in ((["NW801"], False), ((), True)):
        model = mlp().eval()
        if marked:
            nw.intended("NW801", "a policy is trained in evaluation mode")(model)
        optimizer = sgd(model)
        with nw.watch(model, optimizer, ignore=ignore) as watch:
            for _ in range(5):
                step(model, optimizer)
        assert codes(watch) == []
        assert [i.finding.code for i in watch.report.intended] == (["NW801"] if marked else [])


# ---------------------------------------------------------------------------------------------------------- lightning


class FakeTrainer:
    """The part of Lightning's Trainer that a callback meets: hooks by name, the optimizers, an exception."""

    def __init__(self, optimizer, callback):
        self.optimizers, self.callback = [optimizer], callback

    def call(self, name, model, *args):
        getattr(self.callback, name)(self, model, *args)

    def fit(self, model, steps):
        self.call("on_train_start", model)
        try:
            for _ in range(steps):
                step(model, self.optimizers[0])
        except Exception as error:
            self.call("on_exception", model, error)
            raise
        self.call("on_train_end", model)


def test_the_callback_watches_a_fit(capsys):
    model = mlp().eval()
    optimizer = sgd(model)
    before = hooks_of(model, optimizer)
    callback = WatchCallback()
    with pytest.raises(RuntimeError, match="fit"):
        callback.report  # noqa: B018
    FakeTrainer(optimizer, callback).fit(model, 6)
    assert [f.code for f in callback.report.findings] == ["NW801"]
    assert "NW801" in capsys.readouterr().out
    assert hooks_of(model, optimizer) == before
    with pytest.raises(RuntimeError):
        FakeTrainer(optimizer, callback).fit(nn.Linear(5, 1), 2)
    assert hooks_of(model, optimizer) == before


def test_the_callback_is_lightnings_where_lightning_is(monkeypatch):
    class Callback:
        def on_train_batch_end(self):
            return "lightning's"

    module = types.ModuleType("lightning.pytorch.callbacks")
    module.Callback = Callback
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", module)
    callback = WatchCallback(show=False)
    assert isinstance(callback, Callback)
    assert isinstance(callback, WatchCallback)
    assert (callback.on_train_batch_end(), callback.show) == ("lightning's", False)


def test_alternating_optimizers_of_a_gan_are_silent():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh())
    critic = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    g, d = (torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.5, 0.999)) for m in (generator, critic))
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    score = nn.functional.binary_cross_entropy_with_logits
    with nw.watch(generator, g) as of_g, nw.watch(critic, d) as of_d, nw.watch(both, [g, d]) as of_both:
        for _ in range(40):
            critic.zero_grad()
            score(critic(torch.randn(64, 8)), torch.ones(64, 1)).backward()
            fake = generator(torch.randn(64, 4))
            score(critic(fake.detach()), torch.zeros(64, 1)).backward()
            d.step()
            generator.zero_grad()
            score(critic(fake), torch.ones(64, 1)).backward()
            g.step()
    assert codes(of_g) == codes(of_d) == codes(of_both) == []
    assert (of_g.log.count, of_d.log.count, of_both.log.count) == (40, 40, 80)
    # each weight is measured at the steps of its own optimizer: 0, 2, 4, 6, 34, 68 and 1, 3, 5, 7, 17, 51
    assert {name: len(ratios) for name, ratios in of_both.log.ratios.items()} == {
        f"{part}.{layer}.weight": 6 for part in ("generator", "critic") for layer in (0, 3)
    }


def test_a_closure_with_several_passes_in_a_step_is_silent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1]).square().mean()
        loss.backward()
        return loss

    with nw.watch(model, optimizer) as watch:
        for _ in range(10):
            optimizer.step(closure)
    assert codes(watch) == []
    assert max(s.backwards for s in watch.log.steps) > 1
