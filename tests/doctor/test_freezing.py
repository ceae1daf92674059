"""NW401 to NW403: what is frozen, and what only seems so."""

import copy

import pytest
import torch
from torch import nn

import normwright as nw


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def codes(model, inputs=None, select="NW4", **given):
    return sorted(finding.code for finding in nw.diagnose(model, inputs, select=(select,), **given).findings)


def only(model, inputs, code):
    (finding,) = nw.diagnose(model, inputs, select=(code,)).findings
    return finding


X = torch.randn(16, 3, 8, 8)


def backbone():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()
    )


class Classifier(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
        self.head(body.eval()(X))
        body.train()

    def forward(self, x):
        return self.head(self.body(x))


class KeepsEval(Classifier):
    """A `train` of its own, as torchvision's detection backbones and many others have."""

    def train(self, mode=True):
        super().train(mode)
        self.body.eval()
        return self


def frozen_classifier(cls=Classifier):
    model = cls(backbone())
    model.body.requires_grad_(False)
    return model.train()


def test_frozen_parameters_with_live_statistics():
    model = frozen_classifier()
    finding = only(model, X, "NW401")
    assert finding.severity == "warning"
    assert set(finding.where) == {"body.1", "body.4"}
    # the number, by hand: the first step moves statistics that were 0 and 1, of momentum 0.1
    with torch.no_grad():
        x = model.body[0](X)
    moved = [(0.1 * x.mean((0, 2, 3))).abs().max(), (0.1 * (x.var((0, 2, 3)) - 1)).abs().max()]
    second = model.body[2](torch.nn.functional.batch_norm(x, None, None, training=True))
    second = model.body[3](second)
    moved += [(0.1 * second.mean((0, 2, 3))).abs().max(), (0.1 * (second.var((0, 2, 3)) - 1)).abs().max()]
    assert finding.numbers["largest_move_in_deviations"] == pytest.approx(float(torch.stack(moved).max()), rel=1e-4)


def test_the_repair_freezes_the_named_layers_and_no_others():
    model = frozen_classifier()
    before = copy.deepcopy(model.state_dict())
    receipt = only(model, X, "NW401").fix()
    assert set(receipt.edits) == {"body.1", "body.4"}
    model.train()
    model(X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert codes(model, X) == []


def test_a_frozen_teacher_in_training_mode():
    teacher = backbone().requires_grad_(False)
    assert codes(teacher.train(), X) == ["NW401"]
    assert codes(teacher.eval(), X) == []


def test_part_of_the_backbone_frozen():
    model = Classifier(backbone()).train()
    model.body[0].requires_grad_(False)
    model.body[1].requires_grad_(False)
    assert only(model, X, "NW401").where == ("body.1",)


def test_frozen_affine_after_weights_that_learn_must_follow_them():
    model = Classifier(backbone()).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    assert codes(model, X) == []


def test_frozen_backbones_done_right():
    model = frozen_classifier()
    nw.freeze(model)
    assert codes(model, X) == []
    assert codes(frozen_classifier(KeepsEval), X) == []
    # a batch norm without parameters that standardizes the inputs has nothing to freeze
    assert codes(nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 3)).train(), X) == []
    # layer norms have no statistics
    layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    layers[0].requires_grad_(False)
    layers[1].requires_grad_(False)
    assert codes(layers, torch.randn(4, 4)) == []
    assert codes(Classifier(backbone()).train(), X) == []
    assert codes(Classifier(backbone()).eval(), X) == []


class Momentum(nn.Module):
    """Two networks, one the average of the other: MoCo, BYOL, a target network."""

    def __init__(self):
        super().__init__()
        self.online = backbone()
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            target = self.target(x)
        return self.online(x) - target


def test_a_momentum_encoder_normalizes_by_its_batch_on_purpose():
    assert codes(Momentum().train(), X) == []


def test_a_gan_whose_generator_is_frozen_for_the_discriminators_step_and_learns_otherwise():
    class Gan(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
            self.critic = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 1))

        def forward(self, z):
            return self.critic(self.generator(z).detach())

    assert codes(Gan().train(), torch.randn(32, 4)) == []


def test_momentum_zero_moves_nothing():
    model = frozen_classifier()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    assert "NW401" not in codes(model, X)


# ---------------------------------------------------------------------------------------------------------------- NW402


def test_evaluation_mode_that_train_undoes():
    model = Classifier(backbone()).train()
    model.body[1].eval()
    model.body[4].eval()
    finding = only(model, X, "NW402")
    assert finding.severity == "advice"
    assert finding.evidence == "proved"
    assert set(finding.where) == {"body.1", "body.4"}
    assert not model.body[1].training  # the experiment left it
    finding.fix()
    model.train()
    assert not model.body[1].training
    assert codes(model, X) == []


def test_evaluation_mode_that_stays():
    assert codes(frozen_classifier(KeepsEval)) == []
    model = Classifier(backbone()).train()
    nw.freeze(model, "statistics")
    assert codes(model) == []
    assert codes(model.eval()) == []
    # dropout at rest is no norm's matter
    other = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout()).train()
    other[2].eval()
    assert codes(other) == []


# ---------------------------------------------------------------------------------------------------------------- NW403


def test_everything_frozen_but_the_norm():
    model = Classifier(backbone()).train()
    model.body[0].requires_grad_(False)
    model.body[3].requires_grad_(False)
    finding = only(model, None, "NW403")
    assert finding.severity == finding.evidence == "advice"
    assert finding.where == ("body.1", "body.4")
    assert finding.numbers == {"layers": 2, "parameters": 24}
    assert not finding.safe
    receipt = finding.fix()
    assert set(receipt.edits) == {"body.1", "body.4"}
    # (the frozen part now rests, so no other check of freezing has anything to say either)
    assert codes(model, X) == []


def test_one_norm_in_each_block_and_layer_norms():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lin = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.lin(self.norm(x))

    model = nn.Sequential(Block(), Block(), nn.Linear(8, 2))
    for block in model[:2]:
        block.lin.requires_grad_(False)
    finding = only(model, None, "NW403")
    assert finding.where == ("0.norm", "1.norm")
    assert finding.repair is None
    nw.intended("NW403", "training the norms alone")(model)
    assert codes(model) == []


def test_trainable_or_wholly_frozen_parts_are_silent():
    assert codes(Classifier(backbone()).train()) == []
    model = Classifier(backbone()).train()
    model.body.requires_grad_(False)
    assert codes(model, select="NW403") == []
    # adapters beside frozen weights: something other than the norm learns there
    lora = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2), nn.Linear(2, 8))
    lora[0].requires_grad_(False)
    assert codes(lora) == []
    assert codes(nn.Sequential(nn.LayerNorm(4))) == []
