"""Surgery on checkpoints: read a state dict, build its network, operate, write the result; the command line's work.

What is written is `{"state_dict": …, "normwright": note}` by `torch.save`, or a flat safetensors file with the note in
its header. The note says which operations gave the state dict its keys (a folded network has others than the one that
the factory builds), so that `restore` and later operations can do the same to a freshly built network. A network of a
study needs no factory: its note names the study and the settings.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ..lab.errors import UserError
from ..lab.files import atomic_write
from .receipt import Receipt, evaluating

__all__ = ["Checkpoint", "Outcome", "Request", "named_object", "operate", "read", "refuse_existing", "restore", "write"]

# Only these change nothing that a state dict's keys or shapes show.
_SAME_KEYS = {"recalibrate"}
_NESTS = ("state_dict", "model", "model_state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_SHOWN = 4  # names listed in a message
_SAMPLES = 256  # of a data set, on which output differences are measured


@dataclass
class Checkpoint:
    """A state dict from a file, with what was found there in sentences, and the note if normwright wrote the file."""

    path: Path
    state: dict[str, Any]
    found: list[str] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def operations(self) -> list[dict[str, Any]]:
        """What gave the state dict its keys, oldest first; each with its arguments and whether it had inputs."""
        return list(self.note.get("operations", ()))


def read(path: str | Path, key: str | None = None) -> Checkpoint:
    """The state dict in a file of `torch.save` or, by its ending, of safetensors; no code in the file is run.

    A state dict may be the file itself or one of its entries; where several entries are state dicts, the one called
    `state_dict`, `model`, `model_state_dict` or `module` is taken if there is only one such, else `key` must name it.

    Errors: `UserError` for a missing or damaged file, one that needs more than `weights_only=True`, and one without a
    state dict or with several.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}; name a checkpoint that was saved.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, key)
    value = _unpickled(path)
    entries = value if isinstance(value, dict) else {}
    note = entries.get("normwright")
    note = note if isinstance(note, dict) else {}
    if key is None and _is_state(entries):
        return Checkpoint(path, entries, [f"{path} is a state dict of {len(entries)} tensors."], note)
    states = [name for name, entry in entries.items() if _is_state(entry)]
    if key is None:
        usual = [name for name in states if name in _NESTS]
        chosen = states if len(states) == 1 else usual
        if len(chosen) != 1:
            there = _listed(map(repr, states or entries)) or f"a {type(value).__name__}"
            problem = "more than one state dict" if states else "no state dict"
            raise UserError(f"{path} holds {problem} ({there}); name the entry to take by --key.")
        key = chosen[0]
    elif key not in states:
        raise UserError(f"{path} has no state dict called {key!r}; it has: {_listed(map(repr, states)) or 'none'}.")
    found = [f"{path} holds its state dict of {len(entries[key])} tensors under {key!r}."]
    if left := [repr(name) for name in entries if name not in (key, "normwright")]:
        found.append(f"Not carried over: {_listed(left)}.")
    return Checkpoint(path, entries[key], found, note)


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check its rights.") from error
    except Exception as error:  # damaged bytes fail in any of zip, pickle and torch
        text = str(error)
        unsafe = re.search(r"GLOBAL (\S+)", text)
        if unsafe or "TorchScript" in text:
            what = f"needs the class {unsafe[1]} to be read" if unsafe else "is a TorchScript archive"
            raise UserError(
                f"{path} {what}, and only tensors, numbers, strings, lists and dicts are read (weights_only=True); "
                "save model.state_dict() in place of the whole object."
            ) from error
        raise UserError(
            f"{path} is no checkpoint of torch.save, or it is damaged ({type(error).__name__}); save it again."
        ) from error


def _read_safetensors(path: Path, key: str | None) -> Checkpoint:
    safetensors = _safetensors()
    if key is not None:
        raise UserError(f"--key names an entry of a torch.save file, and {path} has tensors only; leave it away.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        note = json.loads(header.get("normwright", "{}"))
    except Exception as error:  # SafetensorError is no class of its own in every version
        raise UserError(f"{path} is no safetensors file, or it is damaged ({type(error).__name__}).") from error
    return Checkpoint(path, state, [f"{path} is a safetensors file of {len(state)} tensors."], note)


def _safetensors() -> ModuleType:
    try:
        importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise UserError("Files that end in .safetensors need that package: pip install safetensors.") from error
    return importlib.import_module("safetensors")


def _is_state(value: Any) -> bool:
    """Whether this is a state dict: names and tensors, and what a module adds as `_extra_state`."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(entry, Tensor) for entry in value.values())
        and all(
            isinstance(name, str) and (isinstance(entry, Tensor) or name.endswith("_extra_state"))
            for name, entry in value.items()
        )
    )


def _listed(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def refuse_existing(out: Path, force: bool) -> None:
    """`UserError` if `out` exists, the input included, unless `force`."""
    if out.is_dir():
        raise UserError(f"--out names a file, and {out} is a folder; choose another --out.")
    if out.exists() and not force:
        raise UserError(f"{out} exists already; choose another --out, or write over it by --force.")


def write(path: Path, state: Mapping[str, Any], note: Mapping[str, Any]) -> None:
    """Write a state dict and its note, whole or not at all, in the format that the file's ending says."""
    buffer = io.BytesIO()
    if path.suffix == ".safetensors":
        _safetensors()
        from safetensors.torch import save

        if extra := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise UserError(f"A safetensors file holds tensors only, and {_listed(extra)} is none; end --out in .pt.")
        # clones, because safetensors refuses tensors that share memory, as tied ones do
        tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        buffer.write(save(tensors, metadata={"normwright": json.dumps(note)}))
    else:
        torch.save({"state_dict": state, "normwright": dict(note)}, buffer)
    atomic_write(path, [buffer.getvalue()])


def named_object(text: str, option: str) -> Any:
    """What `FILE.py:NAME` or `package.module:NAME` names, as the command line gives it to `option`.

    The file's folder is put on the import path, as Python does for a script.

    Errors: `UserError` if it is not written so, is not there, or raises when imported.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise UserError(
            f"{option} names what a file defines, as FILE.py:NAME or package.module:NAME, for example train.py:build; "
            f"got {text!r}."
        )
    path = Path(where)
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"There is no file {path}, which {option} {text} names.")
    try:
        module = _module(path) if path.suffix == ".py" else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise UserError(f"{option}: importing {where} raised {_said(error)}.") from error
    if not hasattr(module, name):
        defined = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UserError(f"{option}: {where} has no {name!r}; it defines: {_listed(defined) or 'nothing'}.")
    return getattr(module, name)


def _module(path: Path) -> ModuleType:
    path = path.resolve()
    # no other module's name, whatever the file is called; a file named twice is run once
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}".replace(".", "_")
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _said(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _made(text: str, option: str, is_done: Callable[[Any], bool]) -> Any:
    """The named object, or what it returns when called without arguments."""
    value = named_object(text, option)
    if is_done(value) or not callable(value):
        return value
    try:
        return value()
    except (Exception, SystemExit) as error:
        raise UserError(f"{option}: {text}, called without arguments, raised {_said(error)}.") from error


def _built(checkpoint: Checkpoint, model: str | Callable[[], nn.Module] | None) -> nn.Module:
    """The network before any operation, with fresh weights."""
    if callable(model):
        return model()
    if model is not None:
        built = _made(model, "--model", lambda value: isinstance(value, nn.Module))
        if not isinstance(built, nn.Module):
            raise UserError(f"--model makes the network, and {model} gave a {type(built).__name__}, no nn.Module.")
        return built
    network = checkpoint.note.get("network")
    if not isinstance(network, Mapping):
        raise UserError(
            f"{checkpoint.path} does not say how its network is built; name a function that returns it, "
            "as --model FILE.py:NAME."
        )
    from ..lab.study import find

    study, _ = find(network["study"])
    if study.build is None:
        raise UserError(
            f"The study {study.name} trains no network; name a function that returns it, --model FILE.py:NAME."
        )
    checkpoint.found.append(f"Its network is that of the study {network['study']}, arm {network['arm']}.")
    return study.build(network["settings"], tuple(network["shape"]), network["classes"])


def _apply(model: nn.Module, operation: str, arguments: Mapping[str, Any], inputs: Any, batches: Any = None) -> Receipt:
    function = getattr(importlib.import_module("normwright.surgery"), operation)
    given = (batches,) if operation == "recalibrate" else ()
    try:
        return function(model, *given, inputs=inputs, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{operation} stopped: {_said(error)}.") from error


def _loaded(checkpoint: Checkpoint, model: str | Callable[[], nn.Module] | None, inputs: Any) -> nn.Module:
    """The network that the state dict belongs to, with it."""
    network = _built(checkpoint, model)
    if inputs is None and model is None:
        # as the study's images are, so that a file exported from it needs nothing else
        generator = torch.Generator().manual_seed(0)
        inputs = torch.rand(8, *checkpoint.note["network"]["shape"], generator=generator)
    for step in checkpoint.operations:
        operation = step["operation"]
        if step["inputs"] and inputs is None:
            raise UserError(
                f"{checkpoint.path} was made by {operation} with inputs, which decide what it changes; give inputs of "
                "the same shape, as --inputs FILE.py:NAME."
            )
        checkpoint.found.append(f"Its keys are those of a network after {operation}, which was done to this one first.")
        network = _apply(network, operation, step["arguments"], inputs if step["inputs"] else None).model
    _load(network, checkpoint)
    return network


def _load(model: nn.Module, checkpoint: Checkpoint) -> None:
    """`load_state_dict`, strict; adds what it did to `checkpoint.found`."""
    state, expected = checkpoint.state, model.state_dict(keep_vars=True)
    for prefix in _PREFIXES * 2:  # one may stand inside the other
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in expected):
            consume_prefix_in_state_dict_if_present(state, prefix)
            checkpoint.found.append(f"The prefix {prefix!r} of all keys, which the model has not, was taken off.")
    present = {id(tensor): name for name, tensor in expected.items() if name in state}
    tied = [name for name, tensor in expected.items() if name not in state and id(tensor) in present]
    for name in tied:
        state[name] = state[present[id(expected[name])]]
    if tied:
        checkpoint.found.append(f"Not in the file, but tied in the model to what is: {_listed(tied)}.")
    other = {
        (str(value.dtype), str(expected[name].dtype))
        for name, value in state.items()
        if name in expected and isinstance(value, Tensor) and value.dtype != expected[name].dtype
    }
    for theirs, ours in sorted(other):
        checkpoint.found.append(f"Tensors of {theirs} were turned into the model's {ours}.")
    differ = []
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
        differ += [f"missing {_listed(missing)}"] if missing else []
        differ += [f"not in the model {_listed(unexpected)}"] if unexpected else []
    except RuntimeError as error:
        lines = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
        differ = lines[:_SHOWN] or [str(error)]
    if differ:
        raise UserError(
            f"{checkpoint.path} does not fit the model: {'; '.join(differ)}. Build the network that was saved."
        )


def restore(path: str | Path, model: str | Callable[[], nn.Module] | None = None, *, inputs: Any = None) -> nn.Module:
    """The network in a checkpoint: built, changed by the operations that the file names, and given its state dict.

    Arguments:
        path: a file of `torch.save` or safetensors.
        model: a function that returns the network as it was before any operation, or its name as `"FILE.py:NAME"`;
            None for a file that `normwright runs --export` wrote, or that surgery made of one.
        inputs: a batch, where the operations were given one; None makes one up for a study's network.

    Errors: `UserError` where the file, the function or their keys are at fault.
    """
    return _loaded(read(path), model, inputs)


@dataclass(frozen=True)
class Request:
    """What is asked of `operate`, in the command line's words.

    Arguments:
        operation: a name in `normwright.surgery`: `fold`, `recalibrate`, `convert`, `absorb_bias`.
        arguments: the operation's own, by name.
        checkpoint, out: files; `out` is not written over unless `force`.
        model: `FILE.py:NAME` of a function without arguments that returns the network.
        inputs: `FILE.py:NAME` of a batch or a function that returns one.
        data: `FILE.py:NAME` of batches, or a data set of the laboratory: `digits`, `fashion-mnist` or a path.
        data_dir: folder with Fashion-MNIST's files.
        evaluate: measure the test accuracy before and after; needs a data set.
        key: the entry of the file that is the state dict.
        batch_size: samples in a batch of a data set.
    """

    operation: str
    checkpoint: Path
    out: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    inputs: str | None = None
    data: str | None = None
    data_dir: Path | None = None
    evaluate: bool = False
    key: str | None = None
    force: bool = False
    device: str = "cpu"
    batch_size: int = 256


@dataclass(frozen=True)
class Outcome:
    """What `operate` did: the receipt, what was found in the file, and the test accuracies if asked for."""

    request: Request
    receipt: Receipt
    found: tuple[str, ...]
    how_to_load: str
    accuracy: tuple[float, float] | None

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        receipt = self.receipt
        parts = {name: vars(edit) for name, edit in receipt.edits.items()}
        return _plain(
            {
                "operation": receipt.operation,
                "checkpoint": str(self.request.checkpoint),
                "out": str(self.request.out),
                "found": self.found,
                "how_to_load": self.how_to_load,
                "edits": parts,
                "skipped": receipt.skipped,
                "facts": receipt.facts,
                "max_difference": receipt.max_difference,
                "rms_difference": receipt.rms_difference,
                "test_accuracy": self.accuracy and dict(zip(("before", "after"), self.accuracy, strict=True)),
            }
        )

    def __str__(self) -> str:
        lines = [*self.found, str(self.receipt)]
        if self.accuracy is not None:
            lines.append(f"Test accuracy: {self.accuracy[0]:.4f} before, {self.accuracy[1]:.4f} after.")
        lines.append(f"Wrote {self.request.out}: {self.how_to_load}.")
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """As JSON can say it; nan and the infinities become their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def operate(request: Request) -> Outcome:
    """Read a checkpoint, operate on its network, write the result; everything is checked before anything is written.

    Errors: `UserError` for what the user can mend.
    """
    refuse_existing(request.out, request.force)
    if request.out.suffix == ".safetensors":
        _safetensors()
    from ..lab.run import choose_device

    device = choose_device(request.device)
    checkpoint = read(request.checkpoint, request.key)
    dataset, batches = _data(request)
    inputs = None
    if request.inputs is not None:
        inputs = _made(request.inputs, "--inputs", lambda value: isinstance(value, (Tensor, Mapping)))
    elif dataset is not None:
        inputs = dataset.x_train[:_SAMPLES]
    model = _loaded(checkpoint, request.model, inputs).to(device)
    before = _accuracy(model, dataset, device) if request.evaluate else None
    receipt = _apply(model, request.operation, request.arguments, inputs, batches)
    after = _accuracy(receipt.model, dataset, device) if request.evaluate else None
    operations = checkpoint.operations
    if request.operation not in _SAME_KEYS:
        step = {"operation": request.operation, "arguments": dict(request.arguments), "inputs": inputs is not None}
        operations.append(step)
    write(request.out, receipt.model.cpu().state_dict(), {**checkpoint.note, "operations": operations})
    accuracy = None if before is None or after is None else (before, after)
    return Outcome(request, receipt, tuple(checkpoint.found), _how_to_load(request, operations), accuracy)


def _how_to_load(request: Request, operations: list[dict[str, Any]]) -> str:
    """The network whose `load_state_dict` takes what was written, as Python says it."""
    if request.model is None:
        return f"normwright.surgery.checkpoint.restore({str(request.out)!r}) is the network with it"
    text = f"{request.model.rpartition(':')[2]}()"
    for step in operations:
        given = [f"{name}={value!r}" for name, value in step["arguments"].items()]
        given += ["inputs=inputs"] if step["inputs"] else []
        text = f"normwright.{step['operation']}({', '.join([text, *given])}).model"
    return f"a state dict for {text}"


def _data(request: Request) -> tuple[Any, Any]:
    """The laboratory's data set, if one is named, and the batches to recalibrate on."""
    named = request.data is not None and ":" in request.data and not Path(request.data).exists()
    if request.data is None or named:
        if request.evaluate:
            raise UserError("--evaluate measures a test accuracy and needs --data digits, fashion-mnist or a PATH.")
        if request.data is None and request.operation == "recalibrate":
            raise UserError("recalibrate needs data: --data digits, fashion-mnist, a PATH, or FILE.py:NAME of batches.")
        if request.data is None:
            return None, None
        return None, _made(request.data, "--data", lambda value: isinstance(value, Iterable))
    from ..lab import engine
    from ..lab.data import load

    dataset = engine.mixed(load(request.data, request.data_dir, progress=False))
    bounds = engine.batches(len(dataset.x_train), request.batch_size)
    return dataset, [dataset.x_train[start:stop] for start, stop in bounds]


def _accuracy(model: nn.Module, dataset: Any, device: torch.device) -> float:
    """The share of the test images that the network classifies rightly, in evaluation mode."""
    from ..lab import engine

    try:
        with evaluating(model):
            return engine.evaluate(model, dataset.x_test.to(device), dataset.y_test.to(device))[1]
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise UserError(f"The model does not classify the images of --data ({_said(error)}).") from error
