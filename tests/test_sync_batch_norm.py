"""SyncBatchNorm in 2 and 4 real processes against torch's batch norm on the whole batch in one, and virtual_sync.

This file is also the program that the processes run: `python test_sync_batch_norm.py RANK WORLD FOLDER` does every case
below with gloo on this machine and saves what it found. The truth treats a batch as rows (values, C): all valid places
of all ranks, normalized by `torch.nn.functional.batch_norm` in float64.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import normwright as nw

TIMEOUT = 120  # seconds for one run of all processes, whatever hangs
C = 3


@dataclass(frozen=True)
class Case:
    """One layer on the ranks' inputs, `shapes[rank % len(shapes)]`."""

    shapes: tuple[tuple[int, ...], ...]
    layer: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)  # of the input, by rank
    parameters: torch.dtype = torch.float64
    residual: bool = False
    mask: int = 0  # its dimensions: 1 for (b,), more for (b, s...)
    channels_last: bool = False
    input_gradient: bool = True
    mean: float = 1.0
    second: bool = False  # double backward
    steps: int = 2


CASES = {
    "unequal (N, C)": Case(((3, C), (6, C)), second=True),
    "empty rank": Case(((0, C, 4), (5, C, 4)), {"act": "silu"}, residual=True, second=True),
    "empty rank in the middle": Case(((2, C), (0, C), (1, C), (3, C)), {"act": "tanh"}),
    "only one rank has data": Case(((4, C, 2, 2), (0, C, 2, 2), (0, C, 2, 2), (0, C, 2, 2))),
    "all ranks empty": Case(((0, C, 2),)),
    "no places": Case(((2, C, 0), (2, C, 3))),
    "one value a rank": Case(((1, C),)),
    "channels_last": Case(((2, C, 4, 5), (3, C, 4, 5)), {"act": "relu"}, residual=True, channels_last=True),
    "(N, C, D, H, W)": Case(((2, C, 2, 3, 2), (1, C, 2, 3, 2)), {"act": "gelu", "eps": 0.1, "momentum": 0.3}),
    "channels_last_3d": Case(((2, C, 2, 3, 2), (1, C, 2, 3, 2)), channels_last=True),
    "different places": Case(((2, C, 5, 4), (1, C, 3, 7))),
    "mask of samples": Case(((4, C, 3), (5, C, 3)), residual=True, mask=1, second=True),
    "mask of places": Case(((4, C, 3), (0, C, 3)), {"act": "sigmoid"}, residual=True, mask=2),
    "mask of places, channels_last": Case(((4, C, 3, 2),), mask=3, channels_last=True),
    "no affine": Case(((3, C), (2, C)), {"affine": False}, second=True),
    "no bias": Case(((3, C), (2, C)), {"bias": False}),
    "momentum None": Case(((3, C), (2, C)), {"momentum": None}, steps=3),
    "momentum 0": Case(((3, C), (2, C)), {"momentum": 0.0}),
    "no running statistics": Case(((3, C), (2, C)), {"track_running_stats": False}),
    "first layer": Case(((3, C), (2, C)), input_gradient=False),
    "float32": Case(((30, C, 8), (20, C, 8)), {"act": "leaky_relu"}, (torch.float32,), torch.float32, residual=True),
    "kernels": Case(((16, C, 40, 40), (9, C, 40, 40)), {"act": "relu"}, (torch.float32,), torch.float32, residual=True),
    "kernels, mask": Case(((16, C, 40, 40), (9, C, 40, 40)), {"act": "relu"}, (torch.float32,), torch.float32, mask=3),
    "large mean": Case(((30, C, 8), (20, C, 8)), {}, (torch.float32,), torch.float32, mean=3000.0),
    "bfloat16 input": Case(((30, C, 8), (20, C, 8)), {"act": "relu"}, (torch.bfloat16,), torch.float32),
    "float16 input": Case(((30, C, 8), (0, C, 8)), {}, (torch.float16,), torch.float32),
    "bfloat16 parameters": Case(((30, C, 8), (20, C, 8)), {}, (torch.float32,), torch.bfloat16),
    "a type for each rank": Case(((30, C, 8), (20, C, 8)), {}, (torch.float32, torch.bfloat16), torch.float32),
}
WORLDS = (2, 4)


def inputs(name: str, rank: int, step: int) -> dict[str, Any]:
    """x, residual, mask, the gradient of y, and the gradient of dx for double backward."""
    case = CASES[name]
    random = torch.Generator().manual_seed(sum(map(ord, name)) * 1000 + rank * 10 + step)
    shape, dtype = case.shapes[rank % len(case.shapes)], case.dtypes[rank % len(case.dtypes)]

    def draw(mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
        t = (mean + deviation * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)
        if case.channels_last:
            t = t.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
        return t

    x, dy, ddx = draw(case.mean + rank, 1.0 + rank / 2), draw(), draw()
    residual = draw() if case.residual else None
    mask = None
    if case.mask:
        mask = torch.rand((shape[0], *shape[2:])[: case.mask], generator=random) < 0.6
    return {"x": x, "dy": dy, "ddx": ddx, "residual": residual, "mask": mask}


def randomize(layer: Any) -> None:
    for value, tensors in ((0.7, (layer.weight, layer.running_var)), (-0.4, (layer.bias, layer.running_mean))):
        for tensor in tensors:
            if tensor is not None:
                with torch.no_grad():
                    tensor.copy_(value + torch.arange(C) / 4)  # exact in all types


def buffers(layer: Any) -> dict[str, torch.Tensor]:
    return {key: buffer.clone() for key, buffer in layer.named_buffers()}


# ---------------------------------------------------------------------------------------------- what each process runs


def run_case(name: str, rank: int) -> list[dict[str, Any]]:
    case = CASES[name]
    layer = nw.SyncBatchNorm(C, **case.layer, dtype=case.parameters)
    randomize(layer)
    found = []
    for step in range(case.steps):
        given = inputs(name, rank, step)
        leaves = {"x": given["x"], "residual": given["residual"], "dy": given["dy"]}
        for key, leaf in leaves.items():
            if leaf is not None:
                leaf.requires_grad_(case.input_gradient if key == "x" else key == "residual" or case.second)
        y = layer(given["x"], given["residual"], given["mask"])
        out = {"y": y.detach(), "strides": y.stride(), **buffers(layer)}
        wanted = {"x": given["x"], "residual": given["residual"], "weight": layer.weight, "bias": layer.bias}
        wanted = {key: t for key, t in wanted.items() if t is not None and t.requires_grad}
        gradients = {}
        if wanted:
            gradients = dict(
                zip(wanted, torch.autograd.grad(y, wanted.values(), given["dy"], create_graph=case.second), strict=True)
            )
        out |= {f"d{key}": t.detach() for key, t in gradients.items()}
        if "x" in gradients:
            out["dx strides"] = gradients["x"].stride()
        if case.second:
            wanted = {"x": given["x"], "dy": given["dy"], "weight": layer.weight}
            wanted = {key: t for key, t in wanted.items() if t is not None}
            second = torch.autograd.grad(gradients["x"], wanted.values(), given["ddx"])
            out |= {f"dd{key}": t for key, t in zip(wanted, second, strict=True)}
        found.append(out)
    return found


def message(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def errors(rank: int) -> dict[str, str]:
    """Every failure is followed by a forward pass that works: no rank is left waiting, or out of step."""
    layer = nw.SyncBatchNorm(C)
    good = torch.randn(4, C)
    attempts = {
        "one value": lambda: layer(torch.randn(1 if rank == 1 else 0, C)),
        "channels on rank 1": lambda: layer(torch.randn(4, C + (rank == 1))),
        "integers on rank 1": lambda: layer(torch.ones(4, C, dtype=torch.long) if rank == 1 else good),
        "residual on rank 1": lambda: layer(good, residual=good[: 1 if rank == 1 else 4]),
        "mask on rank 1": lambda: layer(good, mask=torch.ones(3 if rank == 1 else 4, dtype=torch.bool)),
        "gradient on rank 1": lambda: layer(good.clone().requires_grad_(rank == 1)),
        "vmap": lambda: torch.func.vmap(layer)(torch.randn(2, 4, C)),
    }
    found = {}
    for name, attempt in attempts.items():
        found[name] = message(attempt)
        assert layer(good).shape == good.shape
    return found


def collectives(rank: int) -> dict[str, int]:
    counts = {"all_gather": 0, "all_reduce": 0}
    real = {name: getattr(dist, name) for name in counts}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real[name](*args, **kwargs)

        call.__name__ = name
        return call

    for name in counts:
        setattr(dist, name, counted(name))
    try:
        layer = nw.SyncBatchNorm(C, act="relu")
        x = torch.randn(4, C, 2, requires_grad=True)
        layer(x, residual=x).sum().backward()
        layer.eval()(x).sum().backward()
        if rank == 0:
            layer.eval()(x)  # evaluation needs nobody else
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    return counts


def groups(rank: int, world: int) -> dict[str, Any]:
    """Pairs of ranks share statistics; a deep copy shares the group."""
    pairs = [dist.new_group([i, i + 1]) for i in range(0, world, 2)]
    layer = copy.deepcopy(nn.Sequential(nw.SyncBatchNorm(C, process_group=pairs[rank // 2], dtype=torch.float64)))
    return {"y": layer(inputs("unequal (N, C)", rank, 0)["x"]).detach(), **buffers(layer[0])}


def quiet_modes(rank: int) -> dict[str, Any]:
    """Running statistics move without gradients too."""
    found = {}
    for name, mode in (("no_grad", torch.no_grad), ("inference", torch.inference_mode)):
        layer = nw.SyncBatchNorm(C, dtype=torch.float64)
        with mode():
            layer(inputs("unequal (N, C)", rank, 0)["x"])
        found[name] = buffers(layer)
    return found


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nw.SyncBatchNorm(4, act="relu"), nw.SyncBatchNorm(3)
    return nn.Sequential(nn.Conv2d(2, 4, 3), first, nn.Conv2d(4, 3, 3), second, nn.Flatten(), nn.Linear(27, 5)).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(16, 2, 7, 7, generator=random, dtype=torch.float64), torch.arange(16) % 5


# 16 images over the ranks, one of which gets none
SHARES = {2: (11, 5), 4: (6, 1, 9, 0)}
STEPS = 3


def train_distributed(rank: int, world: int) -> dict[str, Any]:
    model = nw.distributed_data_parallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, label = (t.split(SHARES[world])[rank] for t in data())
    for _ in range(STEPS):
        optimizer.zero_grad()
        # DDP averages over ranks
        (F.cross_entropy(model(x), label, reduction="sum") / 16 * world).backward()
        optimizer.step()
    return {key: t.clone() for key, t in model.module.state_dict().items()}


def both_syncs(rank: int, world: int) -> dict[str, Any]:
    """Two micro-batches in each process: statistics of them all."""
    model = network()
    x, label = (t.split(SHARES[world])[rank] for t in data())

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        y = model(batch[0])
        (F.cross_entropy(y, batch[1], reduction="sum") / 16).backward()
        return y.detach()

    y = nw.virtual_sync(model, step, zip(x.tensor_split(2), label.tensor_split(2), strict=True))
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return {"y": torch.cat(y), **{key: p.grad for key, p in model.named_parameters()}, **buffers(model)}


def compiled(rank: int) -> dict[str, Any]:
    x = torch.randn(4, C, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    model = nn.Sequential(nn.Tanh(), nw.SyncBatchNorm(C), nn.Tanh()).double()
    eager = copy.deepcopy(model)(x)
    fullgraph = message(lambda: torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)(x))
    return {"same": torch.equal(torch.compile(model, backend="eager")(x), eager), "fullgraph": fullgraph}


def plain_ddp(_: int) -> str:
    return message(lambda: nw.distributed_data_parallel(nn.Sequential(nn.SyncBatchNorm(C))))


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found: dict[str, Any] = {name: run_case(name, rank) for name in CASES}
    found["torch's"] = message(lambda: nn.SyncBatchNorm(C)(torch.randn(4, C)))
    found["errors"] = errors(rank)
    found["collectives"] = collectives(rank)
    found["groups"] = groups(rank, world)
    found["quiet modes"] = quiet_modes(rank)
    found["ddp"] = train_distributed(rank, world)
    found["torch's in ddp"] = plain_ddp(rank)
    found["both syncs"] = both_syncs(rank, world)
    if world == 2:  # importing the compiler takes seconds
        found["compile"] = compiled(rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ and its checks


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} processes")
def ran(request, tmp_path_factory):
    """What every rank found, in one run of all cases."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks{world}")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(world)]
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder)],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(child.poll() is None for child in children) and time.monotonic() < deadline:
            if any(child.returncode for child in children):
                break  # the others wait for it in vain
            time.sleep(0.05)
    finally:
        codes = [child.poll() for child in children]
        for child in children:
            child.kill()
            child.wait()
        said = []
        for log in logs:
            log.seek(0)
            said.append(log.read())
            log.close()
    assert codes == [0] * world, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def rows(t: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The valid places of t as (places, C)."""
    t = t.movedim(1, -1)
    return t.reshape(-1, C) if mask is None else t[mask].reshape(-1, C)


def unrows(r: torch.Tensor, like: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    t = like.new_zeros(like.movedim(1, -1).shape, dtype=torch.float64)
    t = r.reshape(t.shape) if mask is None else t.index_put((mask,), r.reshape(t[mask].shape))
    return t.movedim(-1, 1)


ACT = {**nw.ACTIVATIONS, None: lambda t: t}


def truth(name: str, world: int) -> list[list[dict[str, Any]]]:
    """By step and rank; parameter gradients are the sum over ranks, as a whole batch gives them."""
    case = CASES[name]
    options = {key: value for key, value in case.layer.items() if key != "act"}
    layer = nn.BatchNorm1d(C, **options, dtype=torch.float64)
    randomize(layer)
    found = []
    for step in range(case.steps):
        given = [inputs(name, rank, step) for rank in range(world)]
        for g in given:
            for key in ("x", "dy", "ddx", "residual"):
                if g[key] is not None:
                    g[key] = g[key].double().requires_grad_(key != "ddx")
        parts = [rows(g["x"], g["mask"]) for g in given]
        whole = torch.cat(parts)
        if len(whole):
            normalized = layer(whole)
        else:
            layer.num_batches_tracked += 1
            normalized = whole + 0 * (layer.weight + layer.bias)
        ys = []
        for g, part in zip(given, normalized.split([len(p) for p in parts]), strict=True):
            y = unrows(part, g["x"], g["mask"])
            if g["residual"] is not None:
                y = y + g["residual"]
            y = ACT[case.layer.get("act")](y)
            if g["mask"] is not None:
                y = y * unrows(torch.ones_like(part), g["x"], g["mask"])
            ys.append(y)
        loss = sum((y * g["dy"]).sum() for y, g in zip(ys, given, strict=True))
        parameters = {f"d{k}": p for k, p in layer.named_parameters()}
        leaves = [*(g["x"] for g in given), *(g["residual"] for g in given if g["residual"] is not None)]
        gradients = torch.autograd.grad(loss, [*leaves, *parameters.values()], create_graph=True)
        dx = gradients[:world]
        dresidual = gradients[world : len(leaves)]
        shared = {
            **buffers(layer),
            **{k: t.detach() for k, t in zip(parameters, gradients[len(leaves) :], strict=True)},
        }
        second = []
        if case.second:
            total = sum((d * g["ddx"]).sum() for d, g in zip(dx, given, strict=True))
            weight = [] if layer.weight is None else [layer.weight]
            second = torch.autograd.grad(total, [*(g["x"] for g in given), *(g["dy"] for g in given), *weight])
            if weight:
                shared["ddweight"] = second[-1]
        per_rank = []
        for rank in range(world):
            out = {**shared, "y": ys[rank].detach(), "dx": dx[rank].detach(), "values": len(whole)}
            if dresidual:
                out["dresidual"] = dresidual[rank].detach()
            if second:
                out |= {"ddx": second[rank], "ddy": second[world + rank]}
            per_rank.append(out)
        found.append(per_rank)
    return found


@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_batch(ran, name):
    case, world = CASES[name], len(ran)
    expected = truth(name, world)
    lowest = max((*case.dtypes, case.parameters), key=lambda dtype: torch.finfo(dtype).eps)
    for step in range(case.steps):
        results, truths = [r[name][step] for r in ran], expected[step]
        n = max(truths[0]["values"], 1)
        options: dict[str, Any] = {"dtype": lowest, "condition": case.mean}
        for rank, (got, want) in enumerate(zip(results, truths, strict=True)):
            given = inputs(name, rank, step)
            dtype = case.dtypes[rank % len(case.dtypes)]
            for key in ("y", "dx", "dresidual", "ddx", "ddy"):
                if key == "dx" and not case.input_gradient:
                    assert key not in got
                elif key in got:
                    # dx is a difference of terms of the size of weight · dy / deviation, here 5 at most
                    scale = max([5.0, *(float(t[key].abs().max()) for t in truths if t[key].numel())])
                    assert_close(got[key], want[key], n, scale=scale, what=f"{key}, rank {rank}", **options)
                    assert got[key].dtype == dtype
                else:
                    assert key not in want or key.startswith("dd")
            if given["x"].numel():
                assert got["strides"] == given["x"].stride()
                assert got.get("dx strides", got["strides"]) == given["x"].stride()
            for key, buffer in buffers_of(got).items():
                assert torch.equal(buffer, results[0][key]), f"{key} differs between ranks"
                same(buffer, want[key], n, what=f"{key}, rank {rank}", **options)
                assert buffer.dtype == (torch.int64 if key == "num_batches_tracked" else case.parameters)
            assert ("running_mean" in got) == case.layer.get("track_running_stats", True)
            if not given["x"].numel():
                assert not any(got[key].any() for key in ("dweight", "dbias") if key in got)
        for key in ("dweight", "dbias", "ddweight"):
            assert (key in results[0]) == (key in truths[0] and (key != "ddweight" or case.second)), key
            if key in results[0]:
                assert all(r[key].dtype == case.parameters for r in results)
                size = sum(r[key].abs().max().item() for r in results)
                local = sum(r[key].double() for r in results)
                assert_close(local, truths[0][key], n, scale=size, what=key, **options)


def same(actual: torch.Tensor, truth: torch.Tensor, n: int = 1000, **options: Any) -> None:
    """`assert_close`, and counters exactly."""
    if actual.is_floating_point():
        assert_close(actual, truth, n, **options)
    else:
        assert torch.equal(actual, truth), options


def buffers_of(got: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in got.items() if k in ("running_mean", "running_var", "num_batches_tracked")}


def test_torch_refuses_the_cpu(ran):
    assert all("expected input tensor to be on GPU" in r["torch's"] for r in ran)
    assert all("SyncBatchNorm layers only work with GPU modules" in r["torch's in ddp"] for r in ran)


def test_errors_are_raised_on_all_ranks(ran):
    others = [r["errors"] for rank, r in enumerate(ran) if rank != 1]
    culprit = ran[1]["errors"]
    for found in (*others, culprit):
        assert (
            f"Expected more than 1 value per channel when training, got 1 over all {len(ran)} ranks"
            in found["one value"]
        )
        assert f"1 of {len(ran)} want a gradient of its input" in found["gradient on rank 1"]
        assert "torch.func's transforms cannot follow" in found["vmap"]
    own = {
        "channels on rank 1": "RuntimeError: SyncBatchNorm takes an input of shape (N, 3, …)",
        "integers on rank 1": "TypeError: A normalization divides and takes floating-point tensors",
        "residual on rank 1": "ValueError: A residual is added element by element",
        "mask on rank 1": "ValueError: A mask marks valid positions",
    }
    for name, text in own.items():
        assert text in culprit[name]
        assert all(f"could not take its input on 1 of {len(ran)} ranks" in found[name] for found in others)


def test_one_exchange_forward_and_one_backward(ran):
    assert all(r["collectives"] == {"all_gather": 1, "all_reduce": 1} for r in ran)


def test_groups(ran):
    for first in range(0, len(ran), 2):
        layer = nn.BatchNorm1d(C, dtype=torch.float64)
        y = layer(torch.cat([inputs("unequal (N, C)", rank, 0)["x"] for rank in (first, first + 1)]))
        assert_close(torch.cat([r["groups"]["y"] for r in ran[first : first + 2]]), y, len(y))
        for r in ran[first : first + 2]:
            assert_close(r["groups"]["running_var"], layer.running_var, len(y))


def test_running_statistics_move_without_gradients(ran):
    layer = nn.BatchNorm1d(C, dtype=torch.float64)
    layer(torch.cat([inputs("unequal (N, C)", rank, 0)["x"] for rank in range(len(ran))]))
    for r, mode in itertools.product(ran, ("no_grad", "inference")):
        for key, buffer in layer.named_buffers():
            same(r["quiet modes"][mode][key], buffer, what=f"{mode}, {key}")


def test_distributed_training_is_training_on_the_whole_batch(ran):
    model = plain(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, label = data()
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), label).backward()
        optimizer.step()
    for r in ran:
        for key, tensor in ours(model).items():
            same(r["ddp"][key], tensor, what=key)


def test_micro_batches_of_several_processes(ran):
    model = plain(network())
    x, label = data()
    y = model(x)
    F.cross_entropy(y, label).backward()
    assert_close(torch.cat([r["both syncs"]["y"] for r in ran]), y, 1000)
    for r in ran:
        for key, tensor in ours(model, gradients=True).items():
            same(r["both syncs"][key], tensor, what=key, scale=0.1)


def test_compile(ran):
    if len(ran) == 2:
        assert all(r["compile"]["same"] for r in ran)
        assert all("SyncBatchNorm communicates" in r["compile"]["fullgraph"] for r in ran)


class _Relu(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


def plain(model: nn.Sequential) -> nn.Sequential:
    """The same network of torch's own batch norms."""
    for i, layer in enumerate(model):
        if isinstance(layer, nw.SyncBatchNorm):
            new = (_Relu if layer.act else nn.BatchNorm2d)(layer.num_features).double()
            new.load_state_dict(layer.state_dict())
            model[i] = new
    return model


def ours(model: nn.Module, gradients: bool = False) -> dict[str, torch.Tensor]:
    return {
        **{k: p.grad if gradients else p.detach() for k, p in model.named_parameters()},
        **dict(model.named_buffers()),
    }


# ------------------------------------------------------------------------------------------------------ in one process


@pytest.mark.parametrize(
    ("shape", "twin"),
    [
        ((4, C), nw.BatchNorm1d),
        ((4, C, 5), nw.BatchNorm1d),
        ((2, C, 4, 5), nw.BatchNorm2d),
        ((2, C, 2, 3, 2), nw.BatchNorm3d),
    ],
)
def test_alone_it_is_the_twin(shape, twin):
    x, residual = torch.randn(2, *shape)
    mask = torch.rand(shape[0], *shape[2:]) < 0.7
    ours, theirs = nw.SyncBatchNorm(C, momentum=None, act="silu"), twin(C, momentum=None, act="silu")
    for training in (True, True, False):
        for arguments in ({}, {"residual": residual}, {"mask": mask}):
            ours.train(training)
            theirs.train(training)
            assert torch.equal(ours(x, **arguments), theirs(x, **arguments))
    assert all(torch.equal(b, theirs.state_dict()[key]) for key, b in ours.state_dict().items())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours.train()(torch.randn(1, C))


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 0.1}]
)
def test_construction_is_torchs(options):
    ours, theirs = nw.SyncBatchNorm(C, **options), nn.SyncBatchNorm(C, **options)
    assert isinstance(ours, nn.SyncBatchNorm)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(t, ours.state_dict()[key]) for key, t in theirs.state_dict().items())
    assert {**vars(theirs), "act": ours.act}.keys() == {**vars(ours), "act": ours.act}.keys()
    ours.load_state_dict(theirs.state_dict())
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is nw.SyncBatchNorm
    assert again.process_group is None
    signature = inspect.signature(nw.SyncBatchNorm).parameters
    assert list(signature) == [*inspect.signature(nn.SyncBatchNorm).parameters, "act"]
    for name, parameter in inspect.signature(nn.SyncBatchNorm).parameters.items():
        assert (signature[name].default, signature[name].kind) == (parameter.default, parameter.kind)


def test_act_is_in_repr_pickle_and_copy():
    layer = nw.SyncBatchNorm(C, act="gelu")
    assert repr(layer).endswith("act='gelu')")
    assert pickle.loads(pickle.dumps(layer)).act == copy.deepcopy(layer).act == "gelu"
    with pytest.raises(ValueError, match="act is None or one of"):
        nw.SyncBatchNorm(C, act="swish")


@pytest.mark.slow
def test_compiles_whole_where_there_is_nothing_to_synchronize():
    layer, x = nw.SyncBatchNorm(C, act="relu"), torch.randn(4, C)
    assert_close(torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)(x), layer(x), len(x))


def test_symbolic_traces_keep_it_whole():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(C, C), nw.SyncBatchNorm(C)))
    assert type(traced.get_submodule("1")) is nw.SyncBatchNorm


def test_convert():
    """Parameters, buffers and hooks are the old ones; a module used twice stays one; a stranger is refused whole."""
    shared = nw.BatchNorm2d(C, eps=0.1, momentum=None, act="relu")
    seen = []
    handle = shared.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(shared, nn.Sequential(nn.BatchNorm1d(C, affine=False).eval(), nn.SyncBatchNorm(C)), shared)
    model.requires_grad_(False)
    state = model.state_dict(keep_vars=True)
    new = nw.SyncBatchNorm.convert_sync_batchnorm(model)
    assert new is model
    norms = [model[0], *model[1]]
    assert all(type(norm) is nw.SyncBatchNorm for norm in norms)
    assert model[2] is model[0]
    assert [norm.act for norm in norms] == ["relu", None, None]
    assert [norm.training for norm in norms] == [True, False, True]
    assert (model[0].eps, model[0].momentum, model[1][0].affine) == (0.1, None, False)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == state.keys()
    assert all(after[key] is tensor for key, tensor in state.items())
    model[0](torch.randn(4, C, 2, 2))
    handle.remove()
    model[0](torch.randn(4, C, 2, 2))
    assert seen == [1]
    assert type(nw.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm3d(C))) is nw.SyncBatchNorm

    mixed = nn.Sequential(nn.BatchNorm2d(C), nn.Sequential(_Relu(C)))
    with pytest.raises(TypeError, match=r"'1\.0' is a _Relu, whose own behaviour would be lost"):
        nw.SyncBatchNorm.convert_sync_batchnorm(mixed)
    assert type(mixed[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("sizes", [[16], [5, 11], [4, 4, 4, 4], [1, 0, 9, 1, 5]], ids=str)
def test_micro_batches_are_one_batch(sizes):
    model, x, label = network(), *data()
    whole = plain(copy.deepcopy(model))
    y = whole(x)
    F.cross_entropy(y, label).backward()

    def step(batch):
        y = model(batch[0])
        (F.cross_entropy(y, batch[1], reduction="sum") / 16).backward()
        return y.detach()

    ys = nw.virtual_sync(model, step, zip(x.split(sizes), label.split(sizes), strict=True))
    assert [len(part) for part in ys] == sizes
    assert_close(torch.cat(ys), y, 1000)
    for key, tensor in ours(whole, gradients=True).items():
        # biases before a norm have no gradient but rounding
        same(ours(model, gradients=True)[key], tensor, what=key, scale=0.1)
    assert not [thread for thread in threading.enumerate() if "(run)" in thread.name]


def test_micro_batches_that_no_tensor_holds():
    """Images of different sizes share statistics; a layer used twice meets twice; no gradients are needed."""
    layer = nw.SyncBatchNorm(C).double()
    images = [torch.randn(2, C, 4, 5).double(), torch.randn(1, C, 3, 7).double()]
    with torch.no_grad():
        ys = nw.virtual_sync(layer, lambda x: layer(layer(x) * 2), images)
    expected = nn.BatchNorm1d(C).double()
    both = torch.cat([rows(x, None) for x in images])
    truth = expected(expected(both) * 2)
    assert_close(torch.cat([rows(y, None) for y in ys]), truth, len(both))
    for key, buffer in expected.named_buffers():
        same(layer.state_dict()[key], buffer)
    assert not ys[0].requires_grad


def test_second_derivatives_of_micro_batches():
    """A gradient penalty, whose graph goes through both exchanges."""
    model = nn.Sequential(nn.Linear(2, C), nw.SyncBatchNorm(C, act="tanh"), nn.Linear(C, 1)).double()
    whole = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm1d(C).double(), nn.Tanh(), copy.deepcopy(model[2]))
    x = torch.randn(9, 2).double()

    def penalty(network, x):
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(network(x).exp().sum(), x, create_graph=True)
        loss = dx.square().sum()
        loss.backward()
        return loss.item()

    losses = nw.virtual_sync(model, lambda x: penalty(model, x), x.split([2, 7]))
    assert sum(losses) == pytest.approx(penalty(whole, x), rel=1e-12)
    for got, want in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close(got.grad, want.grad, 1000, scale=0.1)


def test_checkpointing_draws_the_same_random_numbers_again():
    """The segment that is computed again has a dropout behind its batch norm: its mask must be the first one."""
    block = nn.Sequential(nn.Linear(C, C), nn.Dropout(0.5), nw.SyncBatchNorm(C), nn.Dropout(0.5)).double()
    x = torch.randn(12, C).double()
    grads = []
    for again in (False, True):
        torch.manual_seed(3)
        block.zero_grad()

        def step(x, again=again):
            y = checkpoint(block, x, use_reentrant=False) if again else block(x)
            y.square().sum().backward()
            return y.detach()

        ys = nw.virtual_sync(block, step, x.split([5, 4, 3]))
        grads.append([*(p.grad.clone() for p in block.parameters()), *ys])
    for first, second in zip(*grads, strict=True):
        assert_close(second, first, 100)


def test_random_numbers_of_micro_batches():
    """From the caller's seed, different for each micro-batch and call; the caller's stream goes on as if none drew."""
    model = nn.Sequential(nw.SyncBatchNorm(C))

    def draw(_):
        model(torch.randn(4, C))
        return torch.rand(1).item()

    torch.manual_seed(0)
    first, after = [nw.virtual_sync(model, draw, range(3)) for _ in range(2)], torch.rand(1).item()
    torch.manual_seed(0)
    second = [nw.virtual_sync(model, draw, range(3)) for _ in range(2)]
    assert first == second
    assert after == torch.rand(1).item()
    assert len({value for values in first for value in values}) == 6
    torch.manual_seed(0)
    for _ in range(2):
        nw.virtual_sync(model, lambda i: (draw(i), torch.rand(100)), range(3))
    assert after == torch.rand(1).item()


def test_grad_mode_and_autocast_are_the_callers():
    model = nn.Sequential(nn.Linear(C, C), nw.SyncBatchNorm(C))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        ys = nw.virtual_sync(model, model, torch.randn(6, C).split(3))
    assert all(y.dtype == torch.bfloat16 and y.is_inference() for y in ys)


@pytest.mark.parametrize("at", ["forward", "between", "backward"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_step_that_raises_stops_all(at, which):
    model = nn.Sequential(nn.Linear(C, C), nw.SyncBatchNorm(C), nn.Linear(C, C), nw.SyncBatchNorm(C))

    def hook(_):
        raise ZeroDivisionError("in backward")

    def step(index):
        if at == "forward" and index == which:
            raise ZeroDivisionError("before the first")
        y = model[1](model[0](torch.randn(4, C)))
        if at == "between" and index == which:
            raise ZeroDivisionError("after the first")
        if at == "backward" and index == which:
            y.register_hook(hook)
        model[3](model[2](y)).square().sum().backward()

    with pytest.raises(ZeroDivisionError):
        nw.virtual_sync(model, step, range(3))
    assert not [thread for thread in threading.enumerate() if "(run)" in thread.name]
    assert nw.virtual_sync(model, lambda x: len(model(x)), torch.randn(6, C).split(2)) == [2, 2, 2]


def test_a_step_that_catches_errors_is_stopped_all_the_same():
    model, caught = nn.Sequential(nw.SyncBatchNorm(C)), []

    def step(index):
        if index == 1:
            raise ZeroDivisionError
        try:
            model(torch.randn(4, C))
        except Exception as error:
            caught.append(error)

    with pytest.raises(ZeroDivisionError):
        nw.virtual_sync(model, step, range(3))
    assert not caught


def test_micro_batches_that_part_ways_are_named():
    model = nn.Sequential(nw.SyncBatchNorm(C), nw.SyncBatchNorm(C))
    x = torch.randn(4, C, requires_grad=True)
    with pytest.raises(RuntimeError, match="micro-batch 0 is in the forward pass of '1' and 1 at the end of its step"):
        nw.virtual_sync(model, lambda i: model(x) if i == 0 else model[0](x), range(2))
    with pytest.raises(RuntimeError, match="micro-batch 1 is in the forward pass of '1' and 0 at the end of its step"):
        nw.virtual_sync(model, lambda i: model(x) if i == 1 else model[0](x), range(2))
    with pytest.raises(RuntimeError, match="0 is in the forward pass of '0' and 1 in the forward pass of '1'"):
        nw.virtual_sync(model, lambda i: model[i](x), range(2))
    with pytest.raises(RuntimeError, match="call backward in the step"):
        nw.virtual_sync(model, lambda i: model(x), range(2))[0].sum().backward()
    with pytest.raises(ValueError, match="more than 1 value per channel when training, got 1 over all 2"):
        nw.virtual_sync(model, lambda x: model(x), [x[:1], x[:0]])


def test_other_batch_norms_are_refused_in_training():
    model = nn.Sequential(nw.SyncBatchNorm(C), nn.Sequential(nn.BatchNorm1d(C)))
    with pytest.raises(ValueError, match=r"'1\.0' is a BatchNorm1d in training mode"):
        nw.virtual_sync(model, model, [torch.randn(2, C)])
    model[1].eval()
    assert len(nw.virtual_sync(model, model, torch.randn(4, C).split(2))) == 2
    assert nw.virtual_sync(model, model, []) == []


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
