"""Studies as objects: how settings are put together, what --norm does, and LeNet itself."""

import pytest
import torch
from torch import nn

from normwright.lab.errors import UserError
from normwright.lab.study import find, names, plan
from normwright.studies.lenet import NORMS, STUDY, build


def test_settings_go_from_fixed_by_data_and_arm_to_overrides():
    seeds, settings = plan(STUDY, "fashion-mnist", {})
    assert seeds == 3
    assert (settings["bn"]["lr"], settings["none"]["lr"]) == (1.0, 0.9)
    assert (settings["bn"]["batch_size"], settings["bn"]["epochs"]) == (256, 10)
    seeds, settings = plan(STUDY, "digits", {"lr": 0.5, "epochs": None})
    assert seeds == 6
    assert [s["lr"] for s in settings.values()] == [0.5, 0.5]
    assert settings["none"]["batch_size"] == 32


def test_another_optimizer_brings_its_own_learning_rate():
    assert plan(STUDY, "digits", {"optimizer": "adam"})[1]["bn"]["lr"] == 0.001
    assert plan(STUDY, "digits", {"optimizer": "adam", "lr": 0.1})[1]["bn"]["lr"] == 0.1
    assert plan(STUDY, "digits", {"optimizer": "sgd"})[1]["none"]["lr"] == 0.9


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
    study = STUDY.with_norms(["gn", "bn", "gn"])
    assert [arm.name for arm in study.arms] == ["gn", "bn", "none"]
    assert study.arms[0].label == "group norm (2 groups)"
    assert study.arms[0].settings == {"norm": "gn", "lr": 1.0}
    first = [(contrast.first, contrast.second) for contrast in study.contrasts]
    assert first[0] == (("gn", "test_acc"), ("none", "test_acc"))
    assert (("bn", "test_acc"), ("none", "test_acc")) in first
    assert "group norm (2 groups) against no norm" in study.contrasts[0].text
    assert [arm.name for arm in STUDY.with_norms(["none"]).arms] == ["none"]
    assert STUDY.with_norms(["none"]).contrasts == ()
    with pytest.raises(UserError, match=r"--norm takes .*got 'bogus'"):
        STUDY.with_norms(["bogus"])


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
