"""Studies as objects: how settings are put together, what --norm does, and LeNet itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from normwright.lab.errors import UserError
from normwright.lab.study import Arm, Contrast, find, names, plan
from normwright.studies.lenet import NORMS, STUDY, build


def test_settings_go_from_fixed_by_data_and_arm_to_overrides():
    found = plan(STUDY, "fashion-mnist", {})
    settings = found.arms
    assert found.seeds == STUDY.seeds
    assert (settings["bn"]["lr"], settings["none"]["lr"]) == (1.0, 0.9)
    assert (settings["bn"]["batch_size"], settings["bn"]["epochs"]) == (256, 10)
    found = plan(STUDY, "digits", {"lr": 0.5, "epochs": None})
    assert found.seeds == STUDY.by_data["digits"]["seeds"]
    assert {s["lr"] for s in found.arms.values()} == {0.5}
    assert found.arms["none"]["batch_size"] == 32
    assert len(list(found.runs())) == found.seeds * len(found.arms)


def test_another_optimizer_brings_its_own_learning_rate():
    assert plan(STUDY, "digits", {"optimizer": "adam"}).arms["bn"]["lr"] == 0.001
    assert plan(STUDY, "digits", {"optimizer": "adam", "lr": 0.1}).arms["bn"]["lr"] == 0.1
    assert plan(STUDY, "digits", {"optimizer": "adam"}, ["lr=0.1"]).arms["bn"]["lr"] == 0.1
    assert plan(STUDY, "digits", {"optimizer": "sgd"}).arms["none"]["lr"] == 0.9


TWO = replace(
    STUDY,
    arms=(Arm("bn", "batch norm", {"norm": "bn", "lr": 1.0}), Arm("none", "no norm", {"norm": "none", "lr": 0.9})),
    contrasts=(Contrast("batch norm against no norm", ("bn", "test_acc"), ("none", "test_acc")),),
    by_data={},
)


def test_text_settings_choose_set_and_repeat_arms():
    assert list(plan(STUDY, "digits", {}, ["arm=none,bn"]).arms) == ["bn", "none"]
    found = plan(TWO, "digits", {}, ["epochs=3", "momentum=1", "clip=none", "norm=gn,ln"])
    assert list(found.arms) == ["gn", "ln", "none"]
    assert (found.arms["ln"]["epochs"], found.arms["ln"]["momentum"], found.arms["ln"]["clip"]) == (3, 1.0, None)
    found = plan(TWO, "digits", {}, ["lr=0.1,1"])
    assert {name: s["lr"] for name, s in found.arms.items()} == {
        "bn-lr-0.1": 0.1, "none-lr-0.1": 0.1, "bn-lr-1.0": 1.0, "none-lr-1.0": 1.0,
    }  # fmt: skip
    arms = found.study.arms
    assert [(arm.label, arm.series, arm.at) for arm in arms[:2]] == [
        ("batch norm, lr 0.1", "bn", 0.1), ("no norm, lr 0.1", "none", 0.1),
    ]  # fmt: skip
    assert [(c.text, c.first[0], c.second[0]) for c in found.study.contrasts] == [
        ("batch norm, lr 0.1 against no norm, lr 0.1", "bn-lr-0.1", "none-lr-0.1"),
        ("batch norm, lr 1.0 against no norm, lr 1.0", "bn-lr-1.0", "none-lr-1.0"),
    ]
    # A setting in which arms differ chooses among them.
    swept = replace(
        TWO,
        arms=tuple(
            Arm(f"w{w}", f"width {w}", {"norm": "bn", "lr": 1.0, "width": w}, series=f"s{w % 2}", at=w)
            for w in (1, 2, 3)
        ),
        contrasts=tuple(Contrast(name, (name, "test_acc"), 0.5) for name in ("w1", "w2", "s0", "s1")),
    )
    chosen = plan(swept, "digits", {}, ["width=1,3"])
    assert list(chosen.arms) == ["w1", "w3"]
    assert [contrast.text for contrast in chosen.study.contrasts] == ["w1", "s1"]
    with pytest.raises(UserError, match=r"width= chooses among the arms of lenet \(1, 2, 3\); got 4"):
        plan(swept, "digits", {}, ["width=4"])


def test_tuning_tries_every_value_for_every_arm_alike():
    tuned = replace(TWO, tune={"lr": (0.1, 1.0)})
    with pytest.raises(UserError, match="needs images held out"):
        plan(tuned, "digits", {})
    found = plan(tuned, "digits", {"seeds": 2}, ["validation=100"])
    tried = [(arm, seed, settings["lr"]) for arm, seed, settings in found.runs()]
    assert tried == [(arm, seed, lr) for seed in (0, 1) for arm in ("bn", "none") for lr in (0.1, 1.0)]
    assert {s["lr"] for _, _, s in plan(tuned, "digits", {}, ["validation=9", "lr=2,3"]).runs()} == {2.0, 3.0}
    assert plan(tuned, "digits", {"lr": 0.7}).study.tune == {}


def test_arms_must_differ_and_contrasts_must_name_them():
    same = replace(TWO, arms=(*TWO.arms, Arm("again", "again", {"norm": "none", "lr": 0.9})))
    with pytest.raises(UserError, match="arms none and again of lenet do not differ"):
        plan(same, "digits", {})
    with pytest.raises(UserError, match="names an arm 'gone' that there is not"):
        plan(replace(TWO, contrasts=(Contrast("x", ("bn", "test_acc"), ("gone", "test_acc")),)), "digits", {})
    with pytest.raises(UserError, match="same name"):
        plan(replace(TWO, arms=(TWO.arms[0], replace(TWO.arms[1], name="bn"))), "digits", {})


def test_a_study_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from normwright.studies.lenet import STUDY as S\nfrom dataclasses import replace\n"
                    "STUDY = replace(S, name='mine')\n")  # fmt: skip
    found, source = find(str(path))
    assert (found.name, source) == ("mine", path.read_text())
    path.write_text("raise ValueError('no luck')\n")
    with pytest.raises(UserError, match=r"raised ValueError: no luck; mend it there\.$"):
        find(str(path))
    path.write_text("study = 1\n")
    with pytest.raises(UserError, match="holds no study: it must define STUDY"):
        find(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        find(str(tmp_path / "none.py"))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"lr": -1.0}, "--lr is a finite number above 0; got -1.0"),
        ({"lr": float("nan")}, "--lr"),
        ({"lr": float("inf")}, "--lr"),
        ({"seeds": 0}, "--seeds is a whole number of at least 1; got 0"),
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 1}, "--batch-size"),
        ({"optimizer": "lion"}, "--optimizer is one of sgd, adagrad, rmsprop, adadelta, adam; got 'lion'"),
    ],
)
def test_wrong_settings_are_one_sentence(overrides, text):
    with pytest.raises(UserError) as error:
        plan(STUDY, "digits", overrides)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_norms_take_the_place_of_the_arm_and_its_contrasts():
    study = TWO.with_norms(["gn", "bn", "gn"])
    assert [arm.name for arm in study.arms] == ["gn", "bn", "none"]
    assert study.arms[0].label == "group norm (2 groups)"
    assert study.arms[0].settings == {"norm": "gn", "lr": 1.0}
    assert [(contrast.first, contrast.second) for contrast in study.contrasts] == [
        (("gn", "test_acc"), ("none", "test_acc")), (("bn", "test_acc"), ("none", "test_acc")),
    ]  # fmt: skip
    assert "group norm (2 groups) against no norm" in study.contrasts[0].text
    assert [arm.name for arm in TWO.with_norms(["none"]).arms] == ["none"]
    assert TWO.with_norms(["none"]).contrasts == ()
    with pytest.raises(UserError, match=r"--norm takes .*got 'bogus'"):
        TWO.with_norms(["bogus"])


def test_the_package_has_lenet_and_names_it_when_asked_for_another():
    assert "lenet" in names()
    found, source = find("lenet")
    assert found is STUDY
    assert source.startswith('"""Does batch norm make LeNet better?')
    with pytest.raises(UserError, match=r"no study 'resnet'.*lenet"):
        find("resnet")


def test_lenet_has_the_parameters_of_the_paper_network():
    with_norm, without = (build({"norm": norm}, (1, 28, 28), 10) for norm in ("bn", "none"))
    count = {key: p.numel() for key, p in without.named_parameters()}
    assert sum(count.values()) == 156 + 2416 + 30840 + 10164 + 850
    assert sum(p.numel() for p in with_norm.parameters()) == sum(count.values()) + 2 * (6 + 16 + 120 + 84)
    bound = (6 / (256 + 120)) ** 0.5
    assert bound * 0.99 < float(without.layer3.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 16, 20)])
def test_every_norm_is_made_of_torchs_layers(norm, shape):
    """The same network from torch's modules alone, with the same weights, gives the same logits and gradients."""
    torch.manual_seed(0)
    model = build({"norm": norm}, shape, 7)
    layers: list[nn.Module] = []
    for name, module in model.named_children():
        features = getattr(module, "num_features", getattr(module, "num_channels", None))
        if name.startswith("norm"):
            two = name in ("norm1", "norm2")
            kinds = {
                "bn": nn.BatchNorm2d if two else nn.BatchNorm1d,
                "nn": nn.BatchNorm2d if two else nn.BatchNorm1d,
                "gn": lambda f: nn.GroupNorm(2, f),
                "ln": lambda f: nn.GroupNorm(1, f),
                "in": lambda f: nn.InstanceNorm2d(f, affine=True),
            }
            layers.append(kinds[norm](features))
            if norm != "nn":
                layers.append(nn.Sigmoid())
        else:
            layers.append(module)
    plain = nn.Sequential(*layers)
    x = torch.rand(8, *shape)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    expected = ["norm" + str(i) for i in range(1, 5)] if norm in ("bn", "nn", "gn", "ln") else []
    if norm == "in":
        expected = ["norm1", "norm2"]
    assert [name for name, _ in model.named_children() if name.startswith("norm")] == expected


def test_images_too_small_for_lenet():
    with pytest.raises(UserError, match="at least 16×16"):
        build({"norm": "bn"}, (1, 8, 8), 10)
