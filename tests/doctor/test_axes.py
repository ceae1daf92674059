"""NW301 to NW304: axes that are taken for others, and padding; each beside what looks like it and is well."""

import math

import pytest
import torch
from torch import nn

import normwright as nw
from normwright.doctor.axes import FEATURES, PLACES, SEQUENCE, UNKNOWN, _reshaped, axes_at_norms
from normwright.doctor.checks.axes_padding import valid_positions
from normwright.doctor.probe import Subject


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def findings(model, inputs, **given):
    return nw.diagnose(model, inputs, select=("NW3",), **given).findings


def codes(model, inputs, **given):
    return sorted(finding.code for finding in findings(model, inputs, **given))


def one(model, inputs, **given):
    (finding,) = findings(model, inputs, **given)
    return finding


class Made(nn.Module):
    """A model of named parts and a function of them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.made = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.made(self, *args, **kwargs)


# --------------------------------------------------------------------------------------------- which axis is which


def test_roles_of_a_reshaped_tensor():
    b, f, p = UNKNOWN, FEATURES, PLACES
    assert _reshaped((b, f, p, p), (2, 8, 5, 5), (2, 8, 25)) == (b, f, p)
    assert _reshaped((b, p, f), (2, 9, 8), (2, 9, 2, 4)) == (b, p, f, f)
    assert _reshaped((b, p, f), (2, 9, 8), (18, 8)) == (UNKNOWN, f)
    assert _reshaped((b, f, p), (2, 8, 9), (2, 72)) == (b, UNKNOWN)
    assert _reshaped((b, f), (2, 1), (2,)) == (b,)
    assert _reshaped((f,), (3,), (1, 3, 1)) == (UNKNOWN, f, UNKNOWN)


def test_roles_are_followed_through_a_vision_transformer():
    def forward(self, x):
        t = self.patch(x).flatten(2).transpose(1, 2)
        n, length, c = t.shape
        q, k, v = self.qkv(self.first(t)).reshape(n, length, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        a = (q @ k.transpose(-2, -1) / math.sqrt(c // 2)).softmax(-1) @ v
        t = t + a.transpose(1, 2).reshape(n, length, c)
        t = t + nn.functional.gelu(self.up(self.second(t)))
        return self.head(self.third(t).mean(1))

    model = Made(
        forward,
        patch=nn.Conv2d(3, 16, 4, 4),
        qkv=nn.Linear(16, 48),
        up=nn.Linear(16, 16),
        head=nn.Linear(16, 2),
        first=nn.LayerNorm(16),
        second=nn.LayerNorm(16),
        third=nn.LayerNorm(16),
    )
    calls, raised = axes_at_norms(Subject(model, torch.randn(2, 3, 16, 16)))
    assert raised is None
    assert {call.name: call.roles for call in calls} == dict.fromkeys(
        ("first", "second", "third"), (UNKNOWN, PLACES, FEATURES)
    )
    reads = {call.name: call.reads for call in calls}
    assert reads == {"first": {("linear", 2)}, "second": {("linear", 2)}, "third": {("pooled", 1)}}


def test_places_that_attention_reads_are_a_sequence():
    def forward(self, x):
        t = self.patch(x).flatten(2).transpose(1, 2)
        return self.norm(t + self.attention(t, t, t)[0])

    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = Made(forward, patch=nn.Conv2d(3, 16, 4, 4), attention=attention, norm=nn.LayerNorm(16))
    calls, _ = axes_at_norms(Subject(model, torch.randn(2, 3, 16, 16)))
    assert [call.roles for call in calls] == [(UNKNOWN, SEQUENCE, FEATURES)]


def test_following_leaves_no_mark_on_the_models_own_tensors():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    axes_at_norms(Subject(model, torch.randn(8, 4)))
    for tensor in (*model.parameters(), *model.buffers()):
        assert not hasattr(tensor, "_nw_roles")


# ------------------------------------------------------------------------------------------------- NW301, sequences


def embedded(norm, **more):
    return Made(
        lambda self, x: self.head(self.rnn(self.norm(self.embed(x)))[0][:, -1]),
        embed=nn.Embedding(50, 16),
        norm=norm,
        rnn=nn.LSTM(16, 8, batch_first=True),
        head=nn.Linear(8, 2),
    )


def test_positions_normalized_before_a_recurrent_layer():
    ids = torch.randint(0, 50, (32, 12))
    finding = one(embedded(nn.BatchNorm1d(12)), ids)
    assert finding.code == "NW301"
    assert (finding.severity, finding.evidence, finding.where) == ("warning", "proved", ("norm",))
    assert finding.numbers["features_axis"] == 2
    assert finding.numbers["change_by_factor_on_a_feature"] > 1
    # as many features as positions: nothing in the sizes shows it
    assert codes(embedded(nn.BatchNorm1d(16)), torch.randint(0, 50, (32, 16))) == ["NW301"]


def test_positions_normalized_before_attention_and_pooling():
    def attending(self, x):
        y = self.norm(torch.relu(self.embed(x)))
        return self.attention(y, y, y)[0]

    parts = {"embed": nn.Linear(4, 16), "norm": nn.BatchNorm1d(10)}
    model = Made(attending, **parts, attention=nn.MultiheadAttention(16, 2, batch_first=True))
    assert codes(model, torch.randn(32, 10, 4)) == ["NW301"]
    pooling = Made(
        lambda self, x: self.head(torch.relu(self.norm(self.embed(x))).mean(1)), **parts, head=nn.Linear(16, 2)
    )
    assert codes(pooling, torch.randn(32, 10, 4)) == ["NW301"]
    assert codes(pooling.eval(), torch.randn(32, 10, 4)) == ["NW301"]


def test_a_norm_that_raises_and_would_run_transposed():
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU())
    finding = one(model, torch.randn(8, 10, 4))
    assert (finding.code, finding.severity) == ("NW301", "error")
    assert model[1](model[0](torch.randn(8, 10, 4)).transpose(1, 2)).shape == (8, 16, 10)
    # of another number of channels altogether: not this fault
    assert codes(nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(7)), torch.randn(8, 10, 4)) == []


def test_between_linear_maps_alone_it_is_advice():
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(16, 2))
    finding = one(model, torch.randn(32, 10, 4))
    assert (finding.code, finding.severity, finding.evidence) == ("NW301", "advice", "advice")


class TokenMixer(nn.Module):
    """Linear maps along the positions, of features that a convolution made: axis 1 is features, and so is the last."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 12, 4, 4), nn.BatchNorm1d(12)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        y = self.patch(x).flatten(2)
        return self.down(torch.relu(self.norm(self.up(y)))).mean(2)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (embedded(nn.LayerNorm(16)), torch.randint(0, 50, (32, 12))),
        (
            Made(
                lambda self, x: self.rnn(self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2))[0],
                embed=nn.Embedding(50, 16),
                norm=nn.BatchNorm1d(16),
                rnn=nn.GRU(16, 8, batch_first=True),
            ),
            torch.randint(0, 50, (32, 16)),
        ),
        (TokenMixer(), torch.randn(16, 3, 16, 16)),
        # whatever else reads it, a convolution takes axis 1 as channels
        (
            Made(
                lambda self, x: self.conv(y := self.norm(self.embed(x))).mean((1, 2)) + y.mean(1).mean(1),
                embed=nn.Embedding(50, 8),
                norm=nn.BatchNorm1d(12),
                conv=nn.Conv1d(12, 4, 3),
            ),
            torch.randint(0, 50, (32, 12)),
        ),
        # fields of a table, each with an embedding of its own scale, flattened
        (
            Made(
                lambda self, x: self.head(self.norm(self.embed(x)).flatten(1)),
                embed=nn.Embedding(50, 8),
                norm=nn.BatchNorm1d(6),
                head=nn.Linear(48, 2),
            ),
            torch.randint(0, 50, (32, 6)),
        ),
        (nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 3)), torch.randn(16, 4, 10)),
        (nn.Sequential(nn.BatchNorm1d(10), nn.Conv1d(10, 4, 3)), torch.randn(16, 10, 10)),
        (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), torch.randn(32, 4)),
    ],
)
def test_channels_on_axis_one_are_silent(model, inputs):
    for mode in (True, False):
        assert codes(model.train(mode), inputs) == []


# ---------------------------------------------------------------------------------------------- NW302, layer norms


def test_layer_norm_over_the_length_of_a_convolution():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.LayerNorm(18), nn.ReLU())
    finding = one(model, torch.randn(16, 4, 20))
    assert (finding.code, finding.severity, finding.evidence) == ("NW302", "warning", "proved")
    assert finding.numbers["output_change"] < 1e-3
    image = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nw.LayerNorm([6, 6]))
    assert one(image, torch.randn(4, 3, 8, 8)).where == ("2",)


def test_layer_norm_over_a_sequence_with_its_features():
    # the book's transformer once had LayerNorm([100, 24]) on (N, 100, 24)
    def forward(self, x):
        y = self.embed(x)
        return self.head(self.norm(y + self.attention(y, y, y)[0]))

    model = Made(
        forward,
        embed=nn.Embedding(50, 16),
        attention=nn.MultiheadAttention(16, 2, batch_first=True),
        norm=nn.LayerNorm([12, 16]),
        head=nn.Linear(16, 2),
    )
    finding = one(model, torch.randint(0, 50, (8, 12)))
    assert finding.code == "NW302"
    assert finding.numbers["change_at_other_positions"] > 0.01


def test_layer_norm_over_the_batch():
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm([8, 6]), nn.Linear(6, 2)).eval()
    finding = one(model, x)
    assert (finding.code, finding.severity) == ("NW302", "error")
    # the number, by hand
    other = x.clone()
    other[0] = 3 * x[1]
    with torch.no_grad():
        expected = (model(other) - model(x))[1:].abs().max() / model(x)[1:].abs().max()
    assert finding.numbers["change_of_other_samples"] == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(other[1:], x[1:])


def test_layer_norm_over_an_unbatched_sequence_with_attention_is_not_proved():
    model = Made(
        lambda self, x: self.attention(self.norm(x), x, x)[0],
        norm=nn.LayerNorm([7, 8]),
        attention=nn.MultiheadAttention(8, 2),
    )
    assert codes(model, torch.randn(7, 8)) == []


class LayerNorm2d(nn.LayerNorm):
    """ConvNeXt's: the features are axis 1, whatever the class is called."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    """MLP-Mixer, token mixing by a transposed linear map and by a convolution of size 1 over tokens as channels."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.first, self.second, self.third = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.tokens, self.conv = nn.Linear(16, 16), nn.Conv1d(16, 16, 1)

    def forward(self, x):
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = y + self.tokens(self.first(y).transpose(1, 2)).transpose(1, 2)
        y = y + self.conv(self.second(y))
        return self.third(y).mean(1)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False), (9, 4, 16)),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (4, 16, 16)),
        (nn.TransformerDecoderLayer(16, 2, 32), (9, 4, 16)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm([8, 6, 6])), (4, 3, 8, 8)),
        (nn.Sequential(nn.Conv1d(4, 8, 3), nn.LayerNorm([8, 18])), (4, 4, 20)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), LayerNorm2d(8), nn.Conv2d(8, 8, 1)), (4, 3, 10, 10)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nw.ChannelNorm(8)), (4, 3, 10, 10)),
        (nn.Sequential(nn.LayerNorm(20), nn.Conv1d(4, 8, 3)), (4, 4, 20)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8)), (8, 3, 4)),
        (Mixer(), (4, 3, 16, 16)),
        # tokens as the channels of a convolution of size 1, without a residual
        (nn.Sequential(nn.Linear(4, 12), nn.Conv1d(16, 16, 1), nn.LayerNorm(12)), (4, 16, 4)),
    ],
)
def test_layer_norms_that_are_well(model, inputs):
    x = torch.randn(inputs)
    if isinstance(model, nn.TransformerDecoderLayer):
        report = nw.diagnose(model, x, select=("NW3",), forward=lambda m, batch: m(batch, batch))
        assert report.findings == []
        return
    for mode in (True, False):
        assert codes(model.train(mode), x) == []


def test_lstm_with_layer_norm():
    for batch_first in (True, False):
        rnn = nn.LSTM(4, 8, batch_first=batch_first)
        model = Made(
            lambda self, x: self.head(self.norm(self.rnn(x)[0])), rnn=rnn, norm=nn.LayerNorm(8), head=nn.Linear(8, 2)
        )
        assert codes(model, torch.randn(8, 8, 4)) == []


# ------------------------------------------------------------------------------------------------- NW303, padding

LENGTHS = torch.arange(5, 37)
VALID = torch.arange(36) < LENGTHS[:, None]


def padded(channels_last=False):
    x = (1 + torch.randn(32, 4, 36)) * VALID[:, None]
    return x.transpose(1, 2) if channels_last else x


def test_which_positions_are_padding():
    assert torch.equal(valid_positions(padded()), VALID)
    assert torch.equal(valid_positions(padded(True)), VALID)
    ids = torch.where(VALID, torch.randint(1, 90, (32, 36)), 0)
    assert torch.equal(valid_positions(ids), VALID)
    assert torch.equal(valid_positions((ids, torch.zeros(32))), VALID)
    free = torch.randint(1, 90, (32, 36))
    for mask in (VALID, VALID.long(), ~VALID, VALID.float()):
        assert torch.equal(valid_positions({"input_ids": free, "attention_mask": mask}), VALID)
    assert torch.equal(valid_positions({"x": padded(), "n": LENGTHS}), VALID)


def test_what_is_no_padding():
    assert valid_positions(torch.randn(8, 4, 12)) is None
    assert valid_positions(torch.randint(0, 5, (64, 12))) is None
    assert valid_positions(torch.randint(0, 2, (64, 12))) is None
    assert valid_positions(torch.randn(8, 3, 12, 12)) is None
    digits = torch.zeros(16, 28, 28)
    for n in range(16):
        digits[n, 3 + n % 4 : 20 + n % 5, 5:20] = 1.0  # rows of digits: borders on both ends
    assert valid_positions(digits) is None
    one_length = torch.randn(8, 4, 12)
    one_length[:, :, 9:] = 0
    assert valid_positions(one_length) is None
    labels = {"x": torch.randn(8, 4, 12), "labels": torch.randint(0, 12, (8,))}
    assert valid_positions(labels) is None
    assert valid_positions({"x": torch.randn(8, 4, 12), "mask": torch.ones(8, 12)}) is None


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.InstanceNorm1d(8), nw.BatchNorm1d(8)])
def test_padding_that_enters_the_statistics(norm):
    finding = one(nn.Sequential(nn.Conv1d(4, 8, 1), norm, nn.ReLU()), padded())
    assert (finding.code, finding.severity, finding.evidence) == ("NW303", "warning", "proved")
    assert finding.where == ("1",)
    assert finding.numbers["padded_share"] == pytest.approx(float((~VALID).double().mean()))


def test_the_number_is_that_of_a_longer_batch():
    model = nn.Sequential(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8, affine=False))
    x = padded()
    finding = one(model, x)
    longer = torch.cat((x, torch.zeros(32, 4, 36)), 2)
    with torch.no_grad():
        short, long = model(x), model(longer)[:, :, :36]
    where = VALID[:, None].expand_as(short)
    expected = ((long - short)[where].square().mean() / short[where].square().mean()).sqrt()
    assert finding.numbers["change_at_valid_positions"] == pytest.approx(float(expected), rel=1e-4)


def test_padding_of_flattened_tokens():
    def forward(self, x):
        y = self.embed(x)
        return self.norm(y.reshape(-1, 8)).view_as(y)

    model = Made(forward, embed=nn.Embedding(90, 8, padding_idx=0), norm=nn.BatchNorm1d(8))
    ids = torch.where(VALID, torch.randint(1, 90, (32, 36)), 0)
    assert codes(model, ids) == ["NW303"]

    def packed(self, x):
        y = self.embed(x)
        y[x != 0] = self.norm(y[x != 0])
        return y

    assert codes(Made(packed, embed=model.embed, norm=model.norm), ids) == []


def test_padding_traps():
    x = padded()
    conv = nn.Conv1d(4, 8, 1)
    assert codes(nn.Sequential(conv, nn.BatchNorm1d(8)).eval(), x) == []
    frozen = nn.Sequential(conv, nn.BatchNorm1d(8))
    nw.freeze(frozen)
    assert codes(frozen, x) == []
    assert codes(nn.Sequential(conv, nw.ChannelNorm(8)), x) == []
    assert codes(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), padded(True)) == []
    masked = Made(lambda self, x: self.norm(self.conv(x), mask=(x != 0).any(1)), conv=conv, norm=nw.BatchNorm1d(8))
    assert codes(masked, x) == []
    assert codes(nn.Sequential(conv, nn.BatchNorm1d(8)), torch.randn(32, 4, 36)) == []
    # one sequence of the batch a little shorter is not worth a word
    hardly = torch.randn(32, 4, 36)
    hardly[0, :, 30:] = 0
    assert codes(nn.Sequential(conv, nn.BatchNorm1d(8)), hardly) == []


# ------------------------------------------------------------------------------------------------- NW304, images


def test_rows_of_an_image_taken_for_channels():
    def forward(self, x):
        y = self.conv(x).permute(0, 2, 3, 1)
        return self.mix(torch.relu(self.norm(y))).mean((1, 2))

    parts = {"conv": nn.Conv2d(3, 8, 3, padding=1), "norm": nn.BatchNorm2d(8), "mix": nn.Linear(8, 2)}
    finding = one(Made(forward, **parts), torch.randn(8, 3, 8, 8))
    assert (finding.code, finding.severity, finding.where) == ("NW304", "warning", ("norm",))
    assert finding.numbers["features_axis"] == 3
    # of another height it raises
    raising = one(Made(forward, **parts), torch.randn(8, 3, 6, 6))
    assert (raising.code, raising.severity) == ("NW304", "error")


def test_what_is_read_behind_a_linear_map_of_the_features():
    def forward(self, x):
        return torch.relu(self.mix(torch.relu(self.norm(self.embed(x))))).mean((1, 2))

    parts = {"embed": nn.Linear(3, 8), "norm": nn.BatchNorm2d(6), "mix": nn.Linear(8, 2)}
    finding = one(Made(forward, **parts), torch.randn(8, 6, 5, 3))
    assert (finding.code, finding.severity, finding.where) == ("NW304", "warning", ("norm",))

    # a linear map of the frequencies, and a convolution that says what axis 1 is
    def convolved(self, x):
        y = torch.relu(self.mix(torch.relu(self.norm(self.embed(x)))))
        return y.mean((1, 2)) + self.conv(y).mean((1, 2))

    assert codes(Made(convolved, **parts, conv=nn.Conv2d(6, 4, 1)), torch.randn(8, 6, 5, 3)) == []


def test_images_that_are_well():
    x = torch.randn(8, 3, 8, 8)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    assert codes(plain, x) == []
    assert codes(plain.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)) == []

    # attention's weights, a channel a head
    def scores(self, x):
        q, k = (part(x).view(8, 6, 2, 4).transpose(1, 2) for part in (self.q, self.k))
        return self.norm(q @ k.transpose(-2, -1))

    heads = Made(scores, q=nn.Linear(4, 8), k=nn.Linear(4, 8), norm=nn.BatchNorm2d(2))
    assert codes(heads, torch.randn(8, 6, 4)) == []
    # a linear map along the width of channels that a convolution made
    axial = Made(
        lambda self, x: self.norm(self.mix(self.conv(x))).mean((2, 3)),
        conv=nn.Conv2d(3, 8, 3, padding=1),
        mix=nn.Linear(8, 8),
        norm=nn.BatchNorm2d(8),
    )
    assert codes(axial, x) == []
