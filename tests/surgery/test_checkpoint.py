"""`normwright surgery` on files: what is read and refused, what is written, and a study's network from end to end."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normwright as nw
from normwright import cli
from normwright.lab.journal import Journal
from normwright.surgery import checkpoint as files

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, features=4):
        super().__init__()
        self.conv = nn.Conv2d(1, features, 3)
        self.norm = nn.BatchNorm2d(features)
        self.act = nn.ReLU()
        self.head = nn.Linear(features, 10)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))

def build():
    return Net()

def wide():
    return Net(5)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.norm(self.one(x)))

def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 1, 8, 8, generator=generator) * 3 + 1 for n in (7, 5)]

rows = [torch.randn(6, 3, generator=torch.Generator().manual_seed(2))]
batch = batches()[0]
ready = Net()

def needs(x):
    return Net(x)

def none():
    return {"model": 1}

def ends():
    raise SystemExit("usage: train.py")
"""


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["normwright", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def net(tmp_path, monkeypatch):
    """The folder, with net.py and a trained network's state dict in it, as the current one; and that network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("net.py").write_text(SOURCE)
    torch.manual_seed(0)
    model = files.named_object("net.py:build", "--model")()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    model.norm.num_batches_tracked.fill_(40)
    torch.save(model.state_dict(), "net.pt")
    return model


def read(path):
    return torch.load(path, weights_only=True)["state_dict"]


def exact_statistics(model):
    """Mean and unbiased variance of what the norm is given over both batches, by NumPy in float64."""
    batches = files.named_object("net.py:batches", "--data")()
    weight, bias = model.conv.weight.detach().double(), model.conv.bias.detach().double()
    values = np.concatenate(
        [nn.functional.conv2d(x.double(), weight, bias).permute(0, 2, 3, 1).reshape(-1, 4).numpy() for x in batches]
    )
    return values.mean(0), values.var(0, ddof=1)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("layout", "sentences"),
    [
        (lambda state: state, ["in.pt is a state dict of 9 tensors."]),
        (lambda state: dict(state), ["in.pt is a state dict of 9 tensors."]),
        (
            lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
            ["in.pt holds its state dict of 9 tensors under 'state_dict'.", "Not carried over: 'epoch', 'optimizer'."],
        ),
        (
            lambda state: {"model": prefixed(state, "module."), "ema": state},
            [
                "in.pt holds its state dict of 9 tensors under 'model'.",
                "Not carried over: 'ema'.",
                "The prefix 'module.' of all keys, which the model has not, was taken off.",
            ],
        ),
        (
            lambda state: {"weights": prefixed(state, "_orig_mod.module.")},
            [
                "in.pt holds its state dict of 9 tensors under 'weights'.",
                "The prefix '_orig_mod.' of all keys, which the model has not, was taken off.",
                "The prefix 'module.' of all keys, which the model has not, was taken off.",
            ],
        ),
        (
            lambda state: {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
            [
                "in.pt is a state dict of 9 tensors.",
                "Tensors of torch.float16 were turned into the model's torch.float32.",
            ],
        ),
    ],
)
def test_what_is_found_in_a_file_is_stated(command, net, layout, sentences):
    torch.save(layout(net.state_dict()), "in.pt")
    given = ["--model", "net.py:build", "--data", "net.py:batches", "--out", "out/there.pt", "--json"]
    code, printed, error = command("surgery", "recalibrate", "in.pt", *given)
    assert (code, error) == (0, "")
    assert json.loads(printed)["found"] == sentences
    half = "torch.float16" in sentences[-1]
    mean, variance = exact_statistics(net.half().float() if half else net)
    found = read("out/there.pt")
    np.testing.assert_allclose(found["norm.running_mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["norm.running_var"], variance, rtol=1e-5)
    for name, value in net.state_dict().items():
        assert "norm.running" in name or "tracked" in name or torch.equal(found[name], value), name
    files.named_object("net.py:build", "--model")().load_state_dict(found, strict=True)


def test_the_receipt_is_printed_with_what_was_moved(command, net):
    given = ["--model", "net.py:build", "--data", "net.py:batches", "--inputs", "net.py:batch"]
    code, printed, _ = command("surgery", "recalibrate", "net.pt", *given, "--out", "out.pt")
    assert code == 0
    assert "recalibrate: 1 edited, 0 skipped, outputs moved by" in printed
    assert "Wrote out.pt: a state dict for build()." in printed
    code, printed, _ = command("surgery", "recalibrate", "net.pt", *given, "--out", "again.pt", "--json")
    found = json.loads(printed)
    batch = files.named_object("net.py:batch", "--inputs")
    after = files.restore("out.pt", "net.py:build").eval()
    largest = float((after(batch) - net.eval()(batch)).abs().max().detach())
    assert found["max_difference"] == pytest.approx(largest, rel=1e-4)
    assert found["edits"]["norm"]["after"]["num_batches_tracked"] == 2
    assert all(torch.equal(value, read("again.pt")[name]) for name, value in read("out.pt").items())


def test_numbers_that_json_has_not_are_names(command, net):
    state = net.state_dict()
    state["norm.running_var"] = torch.full((4,), torch.nan)
    torch.save(state, "nan.pt")
    given = ["--model", "net.py:build", "--data", "net.py:batches", "--out", "out.pt", "--json"]
    code, printed, _ = command("surgery", "recalibrate", "nan.pt", *given)
    assert code == 0
    found = json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["edits"]["norm"]["before"]["running_var"] == "nan"


def test_a_file_is_written_over_only_by_force(command, net):
    before = Path("net.pt").read_bytes()
    given = ["surgery", "recalibrate", "net.pt", "--model", "net.py:build", "--data", "net.py:batches"]
    for out in ("net.pt", "net.py", "."):
        code, printed, error = command(*given, "--out", out)
        assert (code, printed) == (2, "")
        assert "choose another --out" in error
    assert (Path("net.pt").read_bytes(), Path("net.py").read_text()) == (before, SOURCE)
    assert command(*given, "--out", "net.pt", "--force")[0] == 0
    np.testing.assert_allclose(read("net.pt")["norm.running_mean"], exact_statistics(net)[0], rtol=1e-5, atol=1e-6)


def test_a_write_that_fails_leaves_the_file_as_it_was(command, net, monkeypatch):
    before = Path("net.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("normwright.lab.files.os.replace", full)
    given = ["--model", "net.py:build", "--data", "net.py:batches", "--out", "net.pt", "--force"]
    code, _, error = command("surgery", "recalibrate", "net.pt", *given)
    assert code == 2
    assert "disk is full" in error
    assert Path("net.pt").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == ["net.pt", "net.py"]


def test_safetensors_in_and_out(command, net):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = files.named_object("net.py:Tied", "--model")()
    state = model.state_dict()
    del state["two.weight"]  # tied weights are kept once
    safetensors.save_file(state, "tied.safetensors")
    common = ["--model", "net.py:Tied", "--data", "net.py:rows"]
    code, printed, error = command(
        "surgery", "recalibrate", "tied.safetensors", *common, "--out", "out.safetensors", "--json"
    )
    assert (code, error) == (0, "")
    assert json.loads(printed)["found"] == [
        "tied.safetensors is a safetensors file of 8 tensors.",
        "Not in the file, but tied in the model to what is: two.weight.",
    ]
    found = safetensors.load_file("out.safetensors")
    x = files.named_object("net.py:rows", "--data")[0]
    expected = model.one(x).mean(0)
    torch.testing.assert_close(found["norm.running_mean"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found["two.weight"], model.one.weight)
    # and from there into a file of torch.save
    assert command("surgery", "recalibrate", "out.safetensors", *common, "--out", "out.pt")[0] == 0
    for name, value in found.items():
        torch.testing.assert_close(read("out.pt")[name], value, rtol=1e-6, atol=1e-6, msg=name)
    assert command("surgery", "recalibrate", "out.safetensors", *common, "--key", "model", "--out", "k.pt")[0] == 2


def test_without_safetensors_the_package_is_named_before_anything_runs(command, net, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for checkpoint, out in (("net.pt", "out.safetensors"), ("net.safetensors", "out.pt")):
        Path("net.safetensors").write_bytes(b"")
        code, _, error = command(
            "surgery", "recalibrate", checkpoint, "--model", "net.py:ends", "--data", "net.py:batches", "--out", out
        )
        assert code == 2
        assert "pip install safetensors" in error


class Runs:
    """A pickle that would write a file where it is read with all that pickle can do."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def write_files(net):
    torch.save(net, "whole.pt")
    torch.save({"state_dict": net.state_dict(), "hyper": Runs()}, "code.pt")
    Path("pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    Path("text.pt").write_text("these are no weights")
    Path("text.safetensors").write_text("these are no weights")
    Path("half.pt").write_bytes(Path("net.pt").read_bytes()[:-200])
    Path("empty.pt").write_bytes(b"")
    torch.save([1, 2], "list.pt")
    torch.save({"epoch": 1}, "none.pt")
    torch.save({"a": net.state_dict(), "b": net.state_dict()}, "two.pt")
    torch.save({"state_dict": net.state_dict(), "model": net.state_dict()}, "both.pt")
    state = net.state_dict()
    state["head.scale"] = state.pop("head.bias")
    torch.save(state, "renamed.pt")
    Path("broken.py").write_text("import no_such_module\n")
    Path("slip.py").write_text("def build(:\n")


@pytest.mark.parametrize(
    ("checkpoint", "model", "text"),
    [
        ("missing.pt", "net.py:build", "There is no file missing.pt"),
        ("whole.pt", "net.py:build", "whole.pt needs the class"),
        ("code.pt", "net.py:build", "save model.state_dict() in place of the whole object"),
        ("pickle.pt", "net.py:build", "pickle.pt is "),
        ("text.pt", "net.py:build", "no checkpoint of torch.save, or it is damaged"),
        ("text.safetensors", "net.py:build", "is no safetensors file, or it is damaged"),
        ("half.pt", "net.py:build", "no checkpoint of torch.save, or it is damaged"),
        ("empty.pt", "net.py:build", "no checkpoint of torch.save, or it is damaged"),
        ("list.pt", "net.py:build", "holds no state dict (a list)"),
        ("none.pt", "net.py:build", "holds no state dict ('epoch')"),
        ("two.pt", "net.py:build", "more than one state dict ('a', 'b'); name the entry to take by --key"),
        ("both.pt", "net.py:build", "more than one state dict ('state_dict', 'model')"),
        ("renamed.pt", "net.py:build", "missing head.bias; not in the model head.scale"),
        ("net.pt", "net.py:wide", "size mismatch for conv.weight"),
        ("net.pt", None, "does not say how its network is built"),
        ("net.pt", "build", "--model names what a file defines, as FILE.py:NAME"),
        ("net.pt", "other.py:build", "There is no file other.py"),
        ("net.pt", "net.py:biuld", "net.py has no 'biuld'; it defines: Net, build, wide, Tied and "),
        (
            "net.pt",
            "broken.py:build",
            "importing broken.py raised ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("net.pt", "slip.py:build", "importing slip.py raised SyntaxError"),
        ("net.pt", "no_such_package.module:build", "importing no_such_package.module raised ModuleNotFoundError"),
        ("net.pt", "net.py:needs", "net.py:needs, called without arguments, raised TypeError"),
        ("net.pt", "net.py:ends", "raised SystemExit: usage: train.py"),
        ("net.pt", "net.py:none", "net.py:none gave a dict, no nn.Module"),
        ("net.pt", "net.py:rows", "net.py:rows gave a list, no nn.Module"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(command, net, checkpoint, model, text):
    write_files(net)
    before = sorted(path.name for path in Path().iterdir())
    given = [] if model is None else ["--model", model]
    code, printed, error = command(
        "surgery", "recalibrate", checkpoint, *given, "--data", "net.py:batches", "--out", "o.pt"
    )
    assert (code, printed) == (2, "")
    assert text in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "recalibrate needs data"),
        (["--data", "net.py:batches", "--evaluate"], "--evaluate measures a test accuracy and needs --data"),
        (["--data", "net.py:batches", "--key", "ema"], "no state dict called 'ema'; it has: none"),
        (["--data", "net.py:batches", "--device", "quantum"], "--device quantum cannot be used here"),
        (["--data", "net.py:batches", "--method", "twice"], "recalibrate stopped: ValueError: method is one of"),
        (["--data", "net.py:rows"], "recalibrate stopped: RuntimeError"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_options_that_do_not_fit(command, net, arguments, text):
    code, printed, error = command(
        "surgery", "recalibrate", "net.pt", "--model", "net.py:build", "--out", "o.pt", *arguments
    )
    assert (code, printed) == (2, "")
    assert text in error
    assert error.count("\n") == 1
    assert not Path("o.pt").exists()


def test_the_key_chooses(command, net):
    other = {name: value + 1 for name, value in net.state_dict().items()}
    torch.save({"model": net.state_dict(), "model_ema": other}, "in.pt")
    given = ["--model", "net.py:ready", "--data", "net.py:batches", "--key", "model_ema", "--out", "out.pt"]
    assert command("surgery", "recalibrate", "in.pt", *given)[0] == 0
    assert torch.equal(read("out.pt")["conv.weight"], other["conv.weight"])


def test_an_installed_package_has_a_factory_too():
    torchvision = pytest.importorskip("torchvision")
    assert files.named_object("torchvision.models:resnet18", "--model") is torchvision.models.resnet18


def test_a_folder_of_the_file_is_on_the_import_path(net):
    Path("beside.py").write_text("value = 3\n")
    Path("uses.py").write_text("def build():\n    from beside import value\n    return value\n")
    assert files.named_object("uses.py:build", "--model")() == 3
    sys.modules.pop("beside")


# Operations that change the keys ------------------------------------------------------------------------------------


def largest_difference(model, other):
    batch = files.named_object("net.py:batch", "--inputs")
    with torch.no_grad():
        return float((model.eval()(batch) - other.eval()(batch)).abs().max())


@pytest.mark.parametrize("inputs", [[], ["--inputs", "net.py:batch"]])
def test_a_folded_state_dict_fits_the_folded_network(command, net, inputs):
    code, printed, error = command("surgery", "fold", "net.pt", "--model", "net.py:build", *inputs, "--out", "out.pt")
    assert (code, error) == (0, "")
    call = "normwright.fold(build(), inputs=inputs).model" if inputs else "normwright.fold(build()).model"
    assert f"Wrote out.pt: a state dict for {call}." in printed
    batch = files.named_object("net.py:batch", "--inputs")
    build = files.named_object("net.py:build", "--model")
    folded = nw.fold(build(), batch if inputs else None).model
    folded.load_state_dict(read("out.pt"), strict=True)
    assert sorted(read("out.pt")) == ["conv.bias", "conv.weight", "head.bias", "head.weight"]
    # scale and shift by hand, in float64
    scale = net.norm.weight.double() / (net.norm.running_var.double() + net.norm.eps).sqrt()
    bias = net.norm.bias + (net.conv.bias - net.norm.running_mean) * scale
    torch.testing.assert_close(folded.conv.bias.double(), bias.double(), rtol=1e-6, atol=1e-6)
    assert largest_difference(net, folded) < 1e-4
    # the file alone, with the factory, is enough
    assert largest_difference(folded, files.restore("out.pt", build, inputs=batch if inputs else None)) == 0
    code, printed, _ = command(
        "surgery", "fold", "out.pt", "--model", "net.py:build", *inputs, "--out", "again.pt", "--json"
    )
    assert code == 0
    found = json.loads(printed)
    assert found["edits"] == {}
    assert found["found"][-1] == "Its keys are those of a network after fold, which was done to this one first."
    if inputs:
        code, _, error = command("surgery", "fold", "out.pt", "--model", "net.py:build", "--out", "third.pt")
        assert code == 2
        assert "was made by fold with inputs, which decide what it changes; give inputs" in error


def test_a_converted_state_dict_fits_the_converted_network(command, net):
    given = ["--model", "net.py:build", "--inputs", "net.py:batch", "--to", "group", "--groups", 2, "--out", "out.pt"]
    code, printed, error = command("surgery", "convert", "net.pt", *given)
    assert (code, error) == (0, "")
    assert "a state dict for normwright.convert(build(), to='group', groups=2, inputs=inputs).model." in printed
    found = read("out.pt")
    assert sorted(name for name in found if name.startswith("norm.")) == ["norm.bias", "norm.weight"]
    # torch's own group norm in its place, with the same parameters, is the same function
    plain = files.named_object("net.py:build", "--model")()
    plain.norm = nn.GroupNorm(2, 4)
    plain.load_state_dict(found, strict=True)
    batch = files.named_object("net.py:batch", "--inputs")
    restored = files.restore("out.pt", "net.py:build", inputs=batch)
    assert largest_difference(plain, restored) < 1e-5
    # and a second operation goes on from there
    given = ["--model", "net.py:build", "--inputs", "net.py:batch", "--to", "torch", "--out", "torch.pt", "--json"]
    code, printed, error = command("surgery", "convert", "out.pt", *given)
    assert (code, error) == (0, "")
    last = json.loads(printed)
    assert last["max_difference"] < 1e-5
    assert last["how_to_load"].startswith("a state dict for normwright.convert(normwright.convert(build(), to='group'")
    plain.load_state_dict(read("torch.pt"), strict=True)
    code, _, error = command("surgery", "convert", "net.pt", *given[:4], "--to", "spectral", "--out", "no.pt")
    assert code == 2
    assert "convert stopped: ValueError: " in error
    assert error.count("\n") == 1


def test_biases_that_a_batch_norm_makes_idle_are_absorbed(command, net):
    given = ["--model", "net.py:build", "--inputs", "net.py:batch", "--out", "out.pt"]
    code, printed, error = command("surgery", "absorb-bias", "net.pt", *given)
    assert (code, error) == (0, "")
    assert "a state dict for normwright.absorb_bias(build(), inputs=inputs).model." in printed
    found = read("out.pt")
    assert "conv.bias" not in found
    # y = (w·x + b − mean) / sd: the bias goes into the mean, with its sign turned
    torch.testing.assert_close(found["norm.running_mean"], (net.norm.running_mean - net.conv.bias).detach())
    batch = files.named_object("net.py:batch", "--inputs")
    assert largest_difference(net, files.restore("out.pt", "net.py:build", inputs=batch)) < 1e-4


# A study's network -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_studys_lenet_is_recalibrated_from_the_command_line(command, tmp_path):
    """Trained at a high learning rate its running averages are stale; the exact ones give what the journal says."""
    run, network, mended = tmp_path / "run", tmp_path / "lenet.pt", tmp_path / "mended.safetensors"

    def call(*arguments):
        code, printed, error = command(*arguments)
        assert (code, error) == (0, "")
        return printed

    call("study", "lenet", "--norm", "bn", "--lr", 4, "--epochs", 2, "--seeds", 1, "--quiet", "--out", run)
    assert "lenet, arm bn, seed 0, after 2 epochs (finished)" in call("runs", run, "--export", 1, "--out", network)
    given = ["--data", "digits", "--evaluate", "--json"]
    found = json.loads(call("surgery", "recalibrate", network, *given, "--out", mended))
    with Journal(run / "journal.sqlite", mode="read") as journal:
        recorded = journal.runs()[0].results
    assert found["found"][1] == "Its network is that of the study lenet, arm bn."
    assert found["test_accuracy"]["before"] == recorded["test_acc"]
    assert found["test_accuracy"]["after"] == recorded["test_acc_recalibrated"]
    assert recorded["test_acc_recalibrated"] > recorded["test_acc"]
    # the file that was written is enough to go on with: folded, it classifies the same images
    folded = tmp_path / "folded.pt"
    found = json.loads(call("surgery", "fold", mended, *given, "--out", folded))
    assert found["test_accuracy"]["before"] == recorded["test_acc_recalibrated"]
    assert found["test_accuracy"]["after"] == pytest.approx(recorded["test_acc_recalibrated"], abs=0.003)
    assert sorted(found["edits"]) == ["norm1", "norm2", "norm3", "norm4"]
    network = files.restore(folded)
    assert not any("running_mean" in name for name in network.state_dict())
    assert found["how_to_load"] == f"normwright.surgery.checkpoint.restore({str(folded)!r}) is the network with it"


def test_export_names_what_it_cannot_do(command, tmp_path):
    with Journal(tmp_path / "journal.sqlite") as journal:
        study = journal.create_study("lenet", {"settings": {"data": "digits"}}, environment={})
        journal.add_run(study.id, "bn", 0, {"norm": "bn"})
    out = tmp_path / "o.pt"
    for arguments, text in (
        (("--export", 7, "--out", out), "has no run 7; its runs are 1 to 1"),
        (("--export", 1, "--out", out), "kept no network (it is pending)"),
        (("--export", 1), "--export RUN and --out FILE go together"),
        (("--export", 1, "--out", tmp_path / "journal.sqlite"), "exists already"),
    ):
        code, printed, error = command("runs", tmp_path, *arguments)
        assert (code, printed) == (2, "")
        assert text in error
    assert not out.exists()
