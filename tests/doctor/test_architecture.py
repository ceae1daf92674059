"""The checks of the architecture: what fires, with numbers by hand, and the traps at which they are silent."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normwright as nw
from normwright.doctor.checks.architecture_penalty_critic import _share


def found(code: str, model: nn.Module, *args, **kwargs) -> list:
    """The findings of one check, and that it could look."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = nw.diagnose(model, *args, select=[code], **kwargs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return report.findings


class Net(nn.Module):
    """A module of the given forward, with layers by name."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


# ------------------------------------------------------------------------------------------------------------- NW701


def test_biases_before_batch_norm_by_the_flow_of_data():
    x = torch.randn(8, 3, 8, 8)
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "head": nn.Conv2d(4, 4, 1)}
    # declared first and last: the order says nothing
    model = Net(
        lambda m, x: m.head(m.norm(m.conv(x)).relu()), head=layers["head"], norm=layers["norm"], conv=layers["conv"]
    )
    (finding,) = found("NW701", model, x)
    assert finding.where == ("conv",)
    assert finding.severity == finding.evidence == "advice"
    assert finding.numbers == {"layers": 1, "parameters": 4}
    receipt = finding.fix()
    assert receipt.model.conv.bias is None
    assert receipt.max_difference < 1e-5


@pytest.mark.parametrize("inputs", [True, False])
def test_biases_that_do_something_are_left_alone(inputs):
    x = torch.randn(8, 3, 8, 8)
    given = (x,) if inputs else ()
    frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    frozen[0].bias.requires_grad_(False)
    read_twice = Net(lambda m, x: m.norm(y := m.conv(x)) + y, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    held = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    held[1].eval()
    kinked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    others = [nn.GroupNorm(2, 4), nn.GroupNorm(1, 4), nn.InstanceNorm2d(4), nn.LayerNorm(6)]
    models = [frozen, read_twice, held, kinked, *(nn.Sequential(nn.Conv2d(3, 4, 3), norm) for norm in others)]
    for model in models:
        assert found("NW701", model, *given) == []


# ------------------------------------------------------------------------------------------------------------- NW702


def block(norm: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(4, 4, 3, padding=1, bias=False), norm, nn.ReLU()]


def test_a_norm_that_is_missing_in_one_block():
    x = torch.randn(4, 4, 8, 8)
    (finding,) = found("NW702", nn.Sequential(*block(nn.BatchNorm2d(4)), *block(nn.Identity())), x)
    assert finding.where == ("3",)
    usual = [*block(nn.BatchNorm2d(4)), *block(nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1, bias=False), nn.ReLU()]
    (finding,) = found("NW702", nn.Sequential(*usual), x)
    assert finding.where == ("6",)
    assert finding.numbers == {"layers": 1, "layers_without_bias": 3, "read_by_a_norm": 2}


def test_layers_without_bias_that_are_meant_so():
    x = torch.randn(4, 4, 8, 8)
    free = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    assert found("NW702", free, torch.randn(8, 4)) == []
    gate = [
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(4, 2, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(2, 4, 1, bias=False),
        nn.Sigmoid(),
    ]
    gated = Net(
        lambda m, x: (y := m.body(x)) * m.gate(y),
        body=nn.Sequential(*block(nn.BatchNorm2d(4)) * 3),
        gate=nn.Sequential(*gate),
    )
    assert found("NW702", gated, x) == []
    residual = Net(
        lambda m, x: (m.a(x) + m.norm(m.b(x))).relu(),
        a=nn.Conv2d(4, 4, 1, bias=False),
        b=nn.Conv2d(4, 4, 1, bias=False),
        norm=nn.BatchNorm2d(4),
    )
    assert found("NW702", residual, x) == []
    assert (
        found("NW702", nn.Sequential(*block(nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(256, 2, bias=False)), x) == []
    )


# ------------------------------------------------------------------------------------------------------------- NW703


def test_weight_decay_on_norms_and_groups_without_it():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    (finding,) = found("NW703", model, optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0.02))
    assert finding.where == ("1",)
    assert finding.numbers == {"weight_decay": 0.02, "norms": 1, "parameters": 16}
    assert found("NW703", model, optimizer=torch.optim.AdamW(nw.param_groups(model, 0.02))) == []
    assert found("NW703", model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) == []
    model[1].requires_grad_(False)
    assert found("NW703", model, optimizer=torch.optim.AdamW(model.parameters())) == []


# ------------------------------------------------------------------------------------------------------------- NW704


def test_batch_norm_on_the_scores_and_on_an_embedding():
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    last = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Identity())
    (finding,) = found("NW704", last, x, targets=y, loss=F.cross_entropy)
    assert (finding.where, finding.evidence) == (("1",), "advice")
    assert found("NW704", last, x) == []  # an embedding: no classes are given
    assert found("NW704", last, x, targets=torch.randn(32, 3), loss=F.mse_loss) == []
    assert found("NW704", nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), x, targets=y, loss=F.cross_entropy) == []
    assert found("NW704", nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), x, targets=y, loss=F.cross_entropy) == []


# ------------------------------------------------------------------------------------------------------------- NW705


def test_the_ratio_of_variances_is_that_of_the_formula():
    torch.manual_seed(0)
    x = torch.randn(4096, 16) + 2
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 1))
    for _ in range(100):
        model(x)
    targets = 3 * (x - 2).sum(1, keepdim=True)
    with torch.no_grad():
        model[2].weight.fill_(3.0)
        model[2].bias.zero_()
    (finding,) = found("NW705", model, x, targets=targets, loss=F.mse_loss)
    # p / (1 − p) · E[x²] on top of Var x, with p = 0.5, Var x = 1, E[x²] = 5
    assert finding.numbers["variance_ratio"] == pytest.approx(6.0, rel=0.05)
    # the norm's output is 1/√6 of what it should be: (1 − 1/√6)² · 9 · 16 is lost
    assert finding.numbers["loss_with_statistics_of_training"] == pytest.approx(144 * (1 - 6**-0.5) ** 2, rel=0.1)
    assert finding.numbers["loss_without_dropouts_share"] < 0.1


def test_dropout_that_shifts_nothing_or_that_has_taught_nothing():
    x, y = torch.randn(256, 8), torch.randint(3, (256,))
    behind = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.8), nn.Linear(8, 3))
    for _ in range(50):
        behind(x)
    assert found("NW705", behind, x, targets=y, loss=F.cross_entropy) == []
    fresh = nn.Sequential(nn.Dropout(0.8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert found("NW705", fresh, x, targets=y, loss=F.cross_entropy) == []
    layered = nn.Sequential(nn.Dropout(0.8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert found("NW705", layered, x, targets=y, loss=F.cross_entropy) == []


# ------------------------------------------------------------------------------------------------------------- NW706


def critic(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16, bias=False), norm, nn.LeakyReLU(0.2), nn.Linear(16, 1))


def penalty(model, x):
    x = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def test_a_gradient_penalty_through_batch_norm_is_proved_and_through_layer_norm_is_fine():
    x = torch.randn(32, 4)
    for norm, expected in ((nn.BatchNorm1d(16), 1), (nn.LayerNorm(16), 0), (nn.BatchNorm1d(16).eval(), 0)):
        model = critic(norm)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        with nw.watch(model, optimizer) as watch:
            for _ in range(4):
                optimizer.zero_grad()
                (model(x).mean() + penalty(model, x)).backward()
                optimizer.step()
        findings = [f for f in watch.report.findings if f.code == "NW706"]
        assert len(findings) == expected
        if findings:
            assert (findings[0].where, findings[0].evidence) == (("1",), "proved")
            assert findings[0].numbers["share_on_other_samples"] > 0.02


def test_the_share_on_other_samples_is_that_of_the_jacobian():
    x = torch.randn(8, 1, dtype=torch.float64)
    y = (x - x.mean()) / x.std(correction=0)
    # ∂y₀/∂x_j = (δ₀ⱼ − (1 + y₀ yⱼ) / n) / σ
    row = torch.eye(8, dtype=torch.float64)[0] - (1 + y[0] * y[:, 0]) / 8
    share = _share(nn.BatchNorm1d(1, eps=1e-15, dtype=torch.float64), x)
    assert share == pytest.approx(float(row[1:].norm() / row.norm()), rel=1e-9)
    assert _share(nn.LayerNorm(1, dtype=torch.float64), x) == 0


def test_the_penalty_in_the_loss_that_is_given():
    model, x = critic(nn.BatchNorm1d(16)), torch.randn(32, 4)
    assert len(found("NW706", model, x, loss=lambda y: y.mean() + penalty(model, x))) == 1
    assert found("NW706", model, x, loss=lambda y: y.mean()) == []


def test_second_order_gradients_of_weights_are_no_penalty():
    model = critic(nn.BatchNorm1d(16, momentum=1.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with nw.watch(model, optimizer, select=["NW706"]) as watch:
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(32, 4)).square().mean()
            grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            sum(g.square().sum() for g in grads).backward()
            optimizer.step()
    assert watch.report.findings == []


# ------------------------------------------------------------------------------------------------------------- NW707


def test_softmax_twice_is_proved_with_the_floor_of_the_loss():
    x, y = torch.randn(16, 4), torch.randint(10, (16,))
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy, lambda out, t: 2 * F.nll_loss(out.log_softmax(1), t)):
        (finding,) = found("NW707", nn.Sequential(nn.Linear(4, 10), nn.Softmax(1)), x, targets=y, loss=loss)
        assert finding.severity == "error"
        scale = float(loss(torch.zeros(16, 10), y)) / math.log(10)
        expected = scale * -math.log(math.e / (math.e + 9))
        assert finding.numbers["loss_of_a_perfect_answer"] == pytest.approx(expected, rel=1e-4)
    pixels = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Softmax(dim=1))
    images, labels = torch.randn(2, 3, 4, 4), torch.randint(5, (2, 4, 4))
    labels[0, 0, 0] = -100
    assert len(found("NW707", pixels, images, targets=labels, loss=F.cross_entropy)) == 1
    twice = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    binary = torch.randint(2, (16, 1)).float()
    (finding,) = found("NW707", twice, x, targets=binary, loss=F.binary_cross_entropy_with_logits)
    ones = float(binary.mean())
    perfect = ones * math.log(1 + math.exp(-1)) + (1 - ones) * math.log(2)
    assert finding.numbers["loss_of_a_perfect_answer"] == pytest.approx(perfect, rel=1e-4)


def test_losses_that_take_what_the_model_gives():
    x, y = torch.randn(16, 4), torch.randint(10, (16,))
    line = nn.Linear(4, 10)
    soft, log_soft = nn.Sequential(line, nn.Softmax(1)), nn.Sequential(line, nn.LogSoftmax(1))
    assert found("NW707", line, x, targets=y, loss=F.cross_entropy) == []
    assert found("NW707", log_soft, x, targets=y, loss=F.cross_entropy) == []  # log_softmax repeated changes nothing
    assert found("NW707", log_soft, x, targets=y, loss=F.nll_loss) == []
    assert found("NW707", soft, x, targets=y, loss=lambda p, t: F.nll_loss(p.clamp_min(1e-8).log(), t)) == []
    assert found("NW707", soft, x, targets=F.one_hot(y, 10).float(), loss=F.mse_loss) == []
    binary = torch.randint(2, (16, 1)).float()
    one = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    assert found("NW707", one, x, targets=binary, loss=F.binary_cross_entropy) == []
    assert found("NW707", one, x, targets=binary, loss=F.mse_loss) == []
    near = nn.Sequential(nn.Linear(4, 1), nn.ReLU())
    with torch.no_grad():
        near[0].weight.mul_(0.01)
    assert found("NW707", near, x, targets=binary, loss=F.binary_cross_entropy_with_logits) == []


# ------------------------------------------------------------------------------------------------------------- NW708


@pytest.mark.parametrize("rectify", [nn.ReLU(), lambda x: F.relu(x), lambda x: x.relu(), lambda x: torch.relu_(x + 0)])
def test_dead_units_by_module_function_and_method(rectify):
    torch.manual_seed(0)
    model = Net(lambda m, x: m.b(rectify(m.a(x))), a=nn.Linear(4, 100), b=nn.Linear(100, 1))
    with torch.no_grad():
        model.a.bias[:80] = -50.0
    loader = [torch.randn(16, 4) for _ in range(8)]
    (finding,) = found("NW708", model, loader=loader)
    alive = torch.relu(torch.cat([model.a(x) for x in loader])).amax(0) > 0
    assert finding.numbers == {"dead_units": int((~alive).sum()), "units": 100, "samples": 128, "batches": 8}
    assert finding.numbers["dead_units"] == 80


def test_one_batch_chance_and_rare_units_are_no_dead_units():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    with torch.no_grad():  # each unit answers to one input only: seven of eight batches do not turn it on
        model[0].weight.copy_(torch.eye(8).repeat(8, 1))
        model[0].bias.fill_(-0.5)
    batches = [F.one_hot(torch.full((16,), i), 8).float() for i in range(8)]
    report = nw.diagnose(model, loader=batches[:1], select=["NW708"])
    assert report.findings == []
    assert "4 batches" in report.not_run[0].why
    assert found("NW708", model, loader=batches) == []
    # squeeze and excitation: what is pooled hardly varies, and half of the units are off by chance
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 64, 1), nn.ReLU(), nn.Conv2d(64, 16, 1), nn.Sigmoid())
    images = [1 + 0.01 * torch.randn(8, 16, 8, 8) for _ in range(8)]
    assert found("NW708", gate, loader=images) == []


def test_saturation_but_not_of_the_output():
    torch.manual_seed(0)
    model = Net(lambda m, x: torch.sigmoid(m.b(torch.tanh(m.a(x)))).flatten(), a=nn.Linear(4, 16), b=nn.Linear(16, 1))
    loader = [torch.randn(16, 4) for _ in range(8)]
    assert found("NW708", model, loader=loader) == []
    with torch.no_grad():
        model.a.weight.mul_(1000)
        model.b.weight.mul_(1000)
    (finding,) = found("NW708", model, loader=loader)
    share = (torch.cat([torch.tanh(model.a(x)) for x in loader]).abs() > 0.98).float().mean()
    assert finding.numbers["saturated_share"] == pytest.approx(float(share), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- NW709


def test_an_optimizer_of_parameters_that_were_replaced():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    converted = nw.convert(model, "group", groups=2).model
    (finding,) = found("NW709", converted, optimizer=optimizer)
    assert finding.severity == "error"
    assert finding.numbers["parameters_not_held"] == 6
    model[1] = nn.GroupNorm(2, 8)
    (finding,) = found("NW709", model, optimizer=optimizer)
    assert finding.where == ("1",)


def pruned(first):
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)]
    smaller = {0: nn.Linear(3, 8)} if first else {2: nn.Linear(8, 6), 3: nn.BatchNorm1d(6), 4: nn.Linear(6, 2)}
    model = nn.Sequential(*layers)
    before = dict(model.named_parameters())
    for at, layer in smaller.items():
        model[at] = layer
    return model, before, {str(at) for at in smaller}


@pytest.mark.parametrize("first", [False, True])
def test_layers_replaced_by_ones_of_another_size(first):
    model, before, replaced = pruned(first)
    matrices, vectors = ([p for p in before.values() if p.dim() == axes] for axes in (2, 1))
    head = [before.pop("4.weight"), before.pop("4.bias")]
    for groups in (
        [*before.values(), *head],
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        [{"params": before.values()}, {"params": head, "lr": 0.01}],
    ):
        (finding,) = found("NW709", model, optimizer=torch.optim.SGD(groups, lr=0.1))
        assert set(finding.where) == replaced
        assert finding.numbers["tensors_not_in_the_model"] == finding.numbers["parameters_not_held"]


def test_a_part_of_the_model_beside_another_model_is_fine():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    other = nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7), nn.Linear(7, 5))
    head, its = [*model[2].parameters()], [*other.parameters()]
    groups = [its, [*head, *its], [{"params": head}, {"params": its}], [{"params": its}, {"params": head}]]
    for group in groups:
        assert found("NW709", model, optimizer=torch.optim.SGD(group, lr=0.1)) == []
    # a loss with parameters of its own takes the place of the classifier
    loss = nn.Bilinear(2, 2, 5)
    body = [*model[0].parameters(), *model[1].parameters(), *loss.parameters()]
    assert found("NW709", model, optimizer=torch.optim.SGD(body, lr=0.1), loss=loss) == []
    loss = nn.Linear(8, 5)
    body = [*model[0].parameters(), *model[1].parameters(), *loss.parameters()]
    assert found("NW709", model, optimizer=torch.optim.SGD(body, lr=0.1), loss=loss) == []


def test_optimizers_of_a_part_or_of_more_are_fine():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    other = nn.Linear(3, 7)
    assert found("NW709", model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) == []
    assert found("NW709", model, optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1)) == []
    both = [*model.parameters(), *other.parameters()]
    assert found("NW709", model, optimizer=torch.optim.SGD(both, lr=0.1)) == []
    assert (
        found("NW709", torch.compile(model, backend="eager"), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        == []
    )


# ------------------------------------------------------------------------------------------------------ healthy models


def networks():
    vae = Net(lambda m, x: (m.decode((y := m.encode(x))[:, :2]), y), encode=nn.Linear(8, 4), decode=nn.Linear(2, 8))
    return {
        "transformer": (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32, batch_first=True), 2), (8, 5, 8)),
        "vae": (vae, (32, 8)),
        "convolutions": (nn.Sequential(*block(nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(256, 3)), (16, 4, 8, 8)),
    }


@pytest.mark.parametrize("name", ["transformer", "vae", "convolutions"])
def test_healthy_networks_are_silent(name):
    torch.manual_seed(0)
    model, shape = networks()[name]
    loader = [torch.randn(shape) for _ in range(8)]
    optimizer = torch.optim.AdamW(model.parameters())
    report = nw.diagnose(model, loader[0], loader=loader, optimizer=optimizer, select=["NW7"])
    assert [(f.code, f.message) for f in report.findings if f.severity != "advice" or f.evidence != "advice"] == []


TIMM = ("resnet18", "efficientnet_b0", "mobilenetv3_small_100", "regnety_002", "vit_tiny_patch16_224", "convnext_atto")


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_healthy_timm_networks_are_silent(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 64} if "vit" in name else {}
    model = timm.create_model(name, num_classes=10, **options)
    loader = [torch.randn(16, 3, 64, 64) for _ in range(4)]
    targets = torch.randint(10, (16,))
    optimizer = torch.optim.AdamW(model.parameters())
    report = nw.diagnose(
        model, loader[0], targets=targets, loss=F.cross_entropy, loader=loader, optimizer=optimizer, select=["NW7"]
    )
    assert [(f.code, f.message) for f in report.findings if f.severity != "advice" or f.evidence != "advice"] == []
    assert "NW702" not in [f.code for f in report.findings]
