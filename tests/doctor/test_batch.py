"""NW201 to NW208: what the batch does to the statistics, and what it must not be blamed for."""

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import normwright as nw
from normwright.doctor.checks.batch_correlated import _ratio


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def found(model, inputs=None, select="NW2", **given):
    report = nw.diagnose(model, inputs, select=(select,), **given)
    return {finding.code: finding for finding in report.findings}


def codes(model, inputs=None, **given):
    return sorted(found(model, inputs, **given))


def mlp(width=8, norm=nn.BatchNorm1d):
    return nn.Sequential(nn.Linear(4, width), norm(width), nn.ReLU(), nn.Linear(width, 2))


def cnn(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# ----------------------------------------------------------------------------------------------------- NW201, one value


def test_a_single_sample_makes_torchs_batch_norm_raise():
    finding = found(mlp(), torch.randn(1, 4))["NW201"]
    assert finding.severity == "error"
    assert finding.evidence == "proved"
    assert finding.where == ("1",)
    assert finding.numbers["values_per_statistic"] == 1
    assert "raises ValueError" in finding.message


def test_a_norm_that_does_not_raise_is_seen_to_ignore_its_input():
    class Quiet(nn.BatchNorm1d):
        def forward(self, x):
            mean, var = x.mean(0), x.var(0, correction=0)
            return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias

    finding = found(mlp(norm=Quiet), torch.randn(1, 4))["NW201"]
    assert "puts out its bias" in finding.message
    assert finding.numbers["output_change_per_input_change"] == 0.0


def test_instance_norm_of_one_place_and_layer_norm_of_one_feature():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.InstanceNorm2d(3))
    assert "NW201" in codes(model.eval(), torch.randn(8, 3, 4, 4))
    assert "NW201" in codes(nn.Sequential(nn.Linear(4, 1), nn.LayerNorm(1)).eval(), torch.randn(8, 4))


def test_pooled_branch_of_one_sample_with_batch_norm():
    # the image pooling of DeepLab: H·W is 1 there, and nowhere else
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x):
            y = self.stem(x)
            return y + self.pool(y)

    assert found(Pooling(), torch.randn(1, 3, 16, 16))["NW201"].where == ("pool.2",)
    assert codes(Pooling().eval(), torch.randn(1, 3, 16, 16)) == []
    assert codes(Pooling(), torch.randn(32, 3, 16, 16)) == []


class ByHand(nn.Module):
    """The book's: statistics in buffers, the mode by the flag."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.randn(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x):
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.var = 0.9 * self.var + 0.1 * var.detach()
        return (x - mean) / (var + 1e-5).sqrt() * self.gamma + self.beta


def test_norms_written_by_hand():
    model = mlp(norm=ByHand)
    single = found(model, torch.randn(1, 4))["NW201"]
    assert single.where == ("1",)
    assert single.numbers["output_change_per_input_change"] == 0.0
    few = found(model, torch.randn(5, 4))["NW202"]
    assert few.where == ("1",)
    assert few.numbers["values_per_statistic"] == 5
    assert codes(model, torch.randn(64, 4)) == []
    assert codes(model.eval(), torch.randn(1, 4)) == []
    assert codes(model.eval(), torch.randn(5, 4)) == []


def test_an_inner_error_of_another_kind_is_not_blamed_on_the_norm():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x) @ torch.ones(5)

    assert codes(Fails(), torch.randn(32, 4)) == []
    report = nw.diagnose(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), torch.randn(32, 4), select=("NW201",))
    assert report.not_run
    assert report.not_run[0].why.startswith("the model raised RuntimeError before any normalization")


def test_one_value_is_silent_where_running_statistics_are_used():
    x = torch.randn(1, 4)
    assert codes(mlp().eval(), x) == []
    frozen = mlp()
    nw.freeze(frozen)
    assert codes(frozen, x) == []
    rest = mlp()
    rest[1].eval()
    assert codes(rest, x) == []
    assert codes(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), x) == []


def test_a_layer_norm_over_one_column_of_places_is_not_one_value():
    class LayerNorm2d(nn.LayerNorm):  # as in ConvNeXt: channels on axis 1
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    assert codes(nn.Sequential(nn.Conv2d(3, 8, 3), LayerNorm2d(8)), torch.randn(4, 3, 5, 3)) == []


def test_the_norm_before_the_fault_is_not_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    finding = found(model, torch.randn(1, 3, 9, 9))["NW201"]
    assert finding.where == ("3",)


# ---------------------------------------------------------------------------------------------------- NW202, few values


def test_few_values_are_counted_with_places_and_over_the_layers():
    finding = found(mlp(), torch.randn(9, 4))["NW202"]
    assert finding.numbers["values_per_statistic"] == 9
    assert finding.numbers["error_of_mean_in_deviations"] == pytest.approx(1 / 3)
    deep = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8)
    )
    # 9 x 9 becomes 4 x 4 and then 1 x 1
    few = found(deep, torch.randn(6, 3, 9, 9))["NW202"]
    assert few.where == ("3",)
    assert few.numbers["values_per_statistic"] == 6


def test_the_loaders_batch_counts_and_not_the_probe():
    loader = [torch.randn(64, 4) for _ in range(4)]
    assert codes(mlp(), torch.randn(3, 4), loader=loader) == []
    small = [torch.randn(4, 4) for _ in range(4)]
    assert found(mlp(), torch.randn(64, 4), loader=small)["NW202"].numbers["values_per_statistic"] == 4


@pytest.mark.parametrize("norm", [nn.GroupNorm, nw.BatchRenorm, "frozen", "eval", "intended"])
def test_few_values_traps(norm):
    x = torch.randn(4, 4)
    if norm is nn.GroupNorm:
        model = mlp(norm=lambda width: nn.GroupNorm(2, width))
    elif norm is nw.BatchRenorm:
        model = mlp(norm=nw.BatchRenorm)
    else:
        model = mlp()
    if norm == "frozen":
        nw.freeze(model)
    if norm == "eval":
        model.eval()
    if norm == "intended":
        nw.intended("NW202", "a GAN's small batch")(model)
    assert codes(model, x) == []


def test_style_transfer_on_one_large_image_is_silent():
    assert codes(cnn(), torch.randn(1, 3, 32, 32)) == []


def test_an_evaluated_model_is_trained_where_its_loader_shows_it():
    model = mlp().eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    small = [torch.randn(4, 4) for _ in range(4)]
    assert codes(model, loader=small, optimizer=optimizer) == ["NW202"]
    assert codes(model, loader=loader_of(64, 4, shuffle=True)) == ["NW202"]
    # a small probe, or a loader for evaluation, says nothing
    assert codes(model, torch.randn(1, 4), optimizer=optimizer) == []
    assert codes(model, loader=loader_of(64, 4)) == []


def test_a_mark_hides_its_own_layer_only():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    nw.intended("NW202", "on purpose")(model[1])
    report = nw.diagnose(model, torch.randn(4, 4), select=("NW202",))
    assert [finding.where for finding in report.findings] == [("3",)]
    assert [one.finding.where for one in report.intended] == [("1",)]


def test_ghost_chunks_are_chosen():
    model = nn.Sequential(nn.Linear(4, 8), nw.GhostBatchNorm(8, 8))
    assert codes(model, torch.randn(64, 4)) == []


# --------------------------------------------------------------------------------------------- NW203, last batch of one


def loader_of(samples, size, **given):
    return DataLoader(TensorDataset(torch.randn(samples, 4)), batch_size=size, **given)


def test_last_batch_of_one_raises():
    finding = found(mlp(), loader=loader_of(65, 32))["NW203"]
    assert finding.severity == "error"
    assert finding.numbers == {"samples": 65, "batch_size": 32, "last_batch": 1, "values_per_statistic": 1}
    sampler = RandomSampler(range(10), num_samples=33)
    assert "NW203" in codes(mlp(), loader=loader_of(10, 16, sampler=sampler))
    assert "NW203" in codes(mlp(), loader=[torch.randn(32, 4), torch.randn(1, 4)])
    # in evaluation mode now, but shuffled: the training's loader
    assert "NW203" in codes(mlp().eval(), loader=loader_of(65, 32, shuffle=True))


def test_last_batch_of_one_traps():
    assert "NW203" not in codes(mlp(), loader=loader_of(64, 32))
    assert "NW203" not in codes(mlp(), loader=loader_of(66, 32))
    assert "NW203" not in codes(mlp(), loader=loader_of(65, 32, drop_last=True))
    assert "NW203" not in codes(mlp(norm=nn.LayerNorm), loader=loader_of(65, 32))
    assert "NW203" not in codes(mlp().eval(), loader=loader_of(65, 32))
    frozen = mlp()
    nw.freeze(frozen)
    assert "NW203" not in codes(frozen, loader=loader_of(65, 32))
    images = DataLoader(TensorDataset(torch.randn(17, 3, 8, 8)), batch_size=16)
    assert "NW203" not in codes(cnn(), loader=images)  # 64 places make a statistic


def test_reading_the_last_batch_draws_nothing():
    generator = torch.Generator().manual_seed(3)
    loader = loader_of(65, 32, shuffle=True, generator=generator)
    state = generator.get_state()
    from normwright.doctor.checks.batch_last_of_one import _last
    from normwright.doctor.probe import Subject

    assert _last(Subject(mlp(), loader=loader)) is not None
    assert torch.equal(generator.get_state(), state)


# -------------------------------------------------------------------------------------------- NW205, correlated batches


def classes(samples=512, kinds=8):
    labels = torch.arange(samples) * kinds // samples
    return TensorDataset(torch.randn(samples, 4) + 2 * torch.randn(kinds, 4)[labels], labels)


def test_the_F_ratio_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    groups = [torch.randn(n, 1, dtype=torch.float64) + n / 10 for n in (7, 12, 9)]
    expected = stats.f_oneway(*(g[:, 0].numpy() for g in groups)).statistic
    assert _ratio(groups) == pytest.approx(expected, rel=1e-9)


def test_data_sorted_by_class():
    finding = found(mlp(), loader=DataLoader(classes(), batch_size=32))["NW205"]
    assert finding.where == ("1",)
    assert finding.numbers["F_ratio"] > 10 * finding.numbers["largest_F_of_shuffles"]
    assert finding.numbers["labels_per_batch"] == 1
    assert finding.numbers["labels"] == 8


def test_images_sorted_by_brightness_of_their_source():
    images = torch.randn(160, 3, 6, 6) + torch.linspace(-1, 1, 160)[:, None, None, None]
    assert "NW205" in codes(cnn(), loader=DataLoader(TensorDataset(images), batch_size=16))


@pytest.mark.parametrize("seed", range(10))
def test_shuffled_and_random_data_are_silent(seed):
    torch.manual_seed(seed)
    assert codes(mlp(), loader=DataLoader(classes(), batch_size=32, shuffle=True)) == []
    assert codes(mlp(), loader=DataLoader(TensorDataset(torch.randn(512, 4)), batch_size=32)) == []


def test_what_chance_makes_and_what_is_too_little_to_matter():
    # few samples of one channel: F above 2 is nothing rare
    ratios = []
    for seed in range(40):
        torch.manual_seed(seed)
        loader = DataLoader(TensorDataset(torch.randn(12, 1)), batch_size=3)
        ratios.append(_ratio([x for (x,) in loader]))
        assert codes(nn.Sequential(nn.BatchNorm1d(1)), loader=loader, ignore=("NW202",)) == []
    assert sum(ratio > 2 for ratio in ratios) > 2
    # beyond chance, and yet less than sampling itself
    torch.manual_seed(0)
    x = torch.randn(4096, 4) + 0.045 * (torch.arange(4096) // 256 % 2 * 2 - 1).unsqueeze(1)
    assert 1.3 < _ratio(list(x.split(256))) < 2
    loader = DataLoader(TensorDataset(x), batch_size=256)
    assert codes(nn.Sequential(nn.BatchNorm1d(4)), loader=loader) == []


def test_correlated_traps():
    data = classes()
    assert codes(mlp().eval(), loader=DataLoader(data, batch_size=32)) == []
    assert codes(mlp(norm=nn.LayerNorm), loader=DataLoader(data, batch_size=32)) == []

    class Chosen(BatchSampler):
        """Batches of chosen classes, as metric learning has them."""

    chosen = Chosen(range(512), 32, False)
    assert codes(mlp(), loader=DataLoader(data, batch_sampler=chosen)) == []
    # balanced batches differ less than random ones
    balanced = torch.arange(512).view(8, 64).T.reshape(-1)
    assert codes(mlp(), loader=DataLoader(torch.utils.data.Subset(data, balanced.tolist()), batch_size=32)) == []
    frozen = mlp()
    nw.freeze(frozen)
    assert codes(frozen, loader=DataLoader(data, batch_size=32)) == []


# --------------------------------------------------------------------------------------------- NW206, several processes


@pytest.fixture
def four_processes():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_processes_without_sync(four_processes):
    finding = found(mlp(), torch.randn(6, 4), select="NW206")["NW206"]
    assert finding.numbers == {"values_per_statistic": 6, "processes": 4, "threshold": 16}
    # 24 in all are enough for the other check
    assert codes(mlp(), torch.randn(6, 4)) == ["NW206"]
    wrapped = nn.parallel.DistributedDataParallel(mlp())
    assert codes(wrapped, torch.randn(6, 4)) == ["NW206"]


def test_processes_traps(four_processes):
    assert codes(mlp(), torch.randn(32, 4)) == []
    assert codes(mlp().eval(), torch.randn(6, 4)) == []
    assert codes(mlp(norm=nn.LayerNorm), torch.randn(6, 4)) == []
    assert codes(cnn(), torch.randn(2, 3, 8, 8)) == []
    assert "NW206" not in codes(mlp(norm=nw.SyncBatchNorm), torch.randn(6, 4))


# ------------------------------------------------------------------------------------------ NW207 and NW208, group norm


def test_one_element_a_group():
    model = mlp(norm=lambda width: nn.GroupNorm(width, width))
    finding = found(model, torch.randn(64, 4))["NW207"]
    assert finding.severity == "error"
    assert finding.numbers["output_change_per_input_change"] < 1e-3
    with torch.no_grad():
        out = model.eval()(torch.randn(5, 4))
    assert torch.allclose(out, out[:1].expand_as(out), atol=1e-4)  # it is true: the network knows nothing of its input
    assert codes(model, torch.randn(64, 4)) == ["NW207"]
    single = found(model, torch.randn(1, 4))["NW207"]
    assert "puts out its bias" in single.message or "raises" in single.message
    squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(3, 3))
    assert codes(squeeze, torch.randn(8, 3, 4, 4)) == ["NW207"]


def test_group_norms_that_are_well():
    assert codes(mlp(norm=lambda width: nn.GroupNorm(4, width)), torch.randn(64, 4)) == []
    assert codes(cnn(norm=lambda width: nn.GroupNorm(2, width)), torch.randn(1, 3, 8, 8)) == []
    # a scale of zero, as at the end of a residual branch, is no proof
    zero = cnn(norm=lambda width: nn.GroupNorm(2, width))
    nn.init.zeros_(zero[1].weight)
    assert codes(zero, torch.randn(2, 3, 8, 8)) == []


def test_group_norm_is_instance_norm_is_advice():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.Conv2d(8, 16, 3), nn.GroupNorm(8, 16))
    finding = found(model, torch.randn(4, 3, 9, 9))["NW208"]
    assert finding.severity == finding.evidence == "advice"
    assert finding.where == ("1",)
    assert "as many as other layers have for more channels" in finding.message
    alone = nn.Sequential(nn.Conv1d(1, 8, 5), nn.GroupNorm(8, 8))  # wav2vec 2.0's first layer
    assert nw.diagnose(alone, torch.randn(4, 1, 50), select=("NW2",)).ok


# ----------------------------------------------------------------------------------------------------- healthy models


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        self.decode = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, x):
        mean, log_var = self.encode(x).chunk(2, 1)
        return self.decode(mean + torch.randn_like(mean) * (log_var / 2).exp()), mean, log_var


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = cnn()

    def forward(self, pair):
        return (self.net(pair[:, 0]) - self.net(pair[:, 1])).norm(dim=1)


def test_healthy_models_are_silent_and_left_as_they_were():
    generator = nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()
    )
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)  # (L, N, D)
    for model, inputs in (
        (Vae(), torch.randn(32, 12)),
        (Siamese(), torch.randn(16, 2, 3, 8, 8)),
        (generator, torch.randn(16, 8, 1, 1)),
        (nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(7, 1, 16)),
        (cnn().bfloat16(), torch.randn(8, 3, 8, 8, dtype=torch.bfloat16)),
    ):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        for mode in (True, False):
            assert codes(model.train(mode), inputs) == [], type(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
