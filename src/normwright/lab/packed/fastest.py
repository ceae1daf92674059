"""How a pack's convolutions run fastest, by measurement."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .graph import Replayed
from .leaves import Conv, channels_last
from .network import Packed

__all__ = ["fastest"]

# what was measured: whole steps by layout, and convolutions by way
_measured: dict[tuple[Any, ...], dict[Any, float]] = {}


def fastest(pack: Packed, batch: tuple[int, ...], shared: bool) -> None:
    """Measure how the pack's convolutions run fastest in training on such a batch, once a process, and set them so.

    First the whole step with channels first and with channels last, as what stands between convolutions depends on it
    as well; then each convolution, forward and backward, grouped, apart and unfolded. `batch` is (b, c, …).
    """
    convolutions = {name: leaf for name, leaf in pack.leaves.items() if isinstance(leaf, Conv)}
    if not convolutions or pack.K == 1:
        return
    pack.notes = []
    devices = [pack.flat.device] if pack.flat.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        size = batch if shared else (batch[0], pack.K * batch[1], *batch[2:])
        ways = _measure(pack, torch.randn(size, device=pack.flat.device, dtype=pack.flat.dtype))
    for name, leaf in convolutions.items():
        leaf.way, leaf.channels_last = ways[name]


def _measure(pack: Packed, x: Tensor) -> dict[str, tuple[str, bool]]:
    """The way and layout of each convolution."""
    network = copy.deepcopy(pack.network).train()
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, Conv)}
    circumstances = (pack.K, x.device, x.dtype, torch.get_num_threads())

    def step(layout: bool) -> None:
        for conv in convolutions.values():
            conv.channels_last = layout
        network(x).square().mean().backward()

    key = (*circumstances, repr(network), x.shape)
    if key not in _measured:
        _measured[key] = _times({False: lambda: step(False), True: lambda: step(True)}, x.device)
    first, last = _measured[key][False], _measured[key][True]
    layout = last < first
    pack.notes.append(f"a step takes {first * 1e3:.3g} ms with channels first, {last * 1e3:.3g} ms with them last")
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, given: inputs.update({name: given[0].detach()})

    hooks = [conv.register_forward_pre_hook(note(name)) for name, conv in convolutions.items()]
    network(x)
    for hook in hooks:
        hook.remove()
    ways: dict[str, tuple[str, bool]] = {}
    for name, conv in convolutions.items():
        ways[name] = ("grouped", layout)
        conv.channels_last = layout
        given = inputs[name]
        if conv.shared(given):
            continue

        def alone(way: str, conv: Conv = conv, given: Tensor = given) -> None:
            conv.way = way
            y = conv(given.requires_grad_())
            (channels_last(y) if layout else y).square().sum().backward()

        key = (*circumstances, repr(conv), given.shape, layout)
        if key not in _measured:
            _measured[key] = _times({way: (lambda way=way: alone(way)) for way in conv.ways()}, x.device)
        times = _measured[key]
        ways[name] = (min(times, key=times.__getitem__), layout)
        pack.notes.append(f"{name}: " + ", ".join(f"{way} {seconds * 1e3:.3g} ms" for way, seconds in times.items()))
    return ways


def _times(what: Mapping[Any, Callable[[], None]], device: torch.device, turns: int = 3) -> dict[Any, float]:
    """The least seconds that each takes, in turns; on CUDA as a graph, as which it is trained with.

    What took a tenth of a second and three times the best in the first turn, which warms up, is left at that.
    """
    found = dict.fromkeys(what, float("inf"))
    timed = {name: Replayed(run, device, lambda why: None) for name, run in what.items()}
    for run in timed.values():
        run.prepare()
    for turn in range(turns):
        for name, run in timed.items():
            if turn > 0 and found[name] > max(0.1, 3 * min(found.values())):
                continue
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found[name] = min(found[name], time.perf_counter() - began)
    return found
