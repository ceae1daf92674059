"""Work on a GPU that becomes a CUDA graph, and when it may.

A graph replays kernels on the addresses that they were captured with. What Python decided meanwhile stays as it was:
a number that it counted up, a tensor that it put in another's place, a value that it read from the device, for which a
capture fails. A layer of an unknown kind may do any of these, and two of the three would train wrong without a word. So
two calls are watched first, operator by operator, and only work that does the same things to the same tensors twice is
captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

__all__ = ["Replayed", "Watch", "why_not_replayed"]

_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
    torch.ops.aten._unsafe_index.Tensor,
    torch.ops.aten._unsafe_index_put.default,
}


class Watch(TorchDispatchMode):
    """Records the operators that run under it: `calls`, and `waits`, those that make Python wait for the device.

    Kernels that stand aside for a dispatch mode, as this package's own do, are recorded as the operators in their
    place.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.calls: list[tuple[Any, ...]] = []
        self.waits: list[str] = []
        self._made: set[int] = set()
        # held, so that no address of theirs is used again and two watches can be compared
        self._outside: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given, _ = tree_flatten((args, kwargs))
        told = [self._told(value) for value in given]
        found = func(*args, **kwargs)
        made = [value for value in tree_flatten(found)[0] if isinstance(value, Tensor)]
        for value in made:
            storage = value.untyped_storage()
            if storage._cdata not in self._outside:
                self._made.add(storage._cdata)
        self.calls.append((str(func), *told))
        if (why := self._wait(func, [*given, *made])) is not None:
            self.waits.append(f"{func}: {why}")
        return found

    def _told(self, value: Any) -> Any:
        """An argument so that it can be compared: of a tensor from outside its address, of one made here its form."""
        if not isinstance(value, Tensor):
            return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
        storage = value.untyped_storage()
        where = None
        if storage._cdata not in self._made:
            self._outside[storage._cdata] = storage
            where = storage._cdata
        return where, tuple(value.shape), value.stride(), value.storage_offset(), value.dtype

    def _wait(self, func: Any, values: Sequence[Any]) -> str | None:
        tensors = [value for value in values if isinstance(value, Tensor)]
        if func in _INDEXED:
            if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:]):
                return "how many a mask chooses is read from the device"
        elif _READS & set(func.tags):
            return "its result is read from the device"
        if func is torch.ops.aten.lift_fresh.default:
            return "a tensor is made of Python's numbers"
        if any(isinstance(value, torch.Generator) for value in values):
            return "it draws from a generator of its own"
        if other := [tensor.device for tensor in tensors if tensor.device.type != self.device.type]:
            return f"it has a tensor on {other[0]}"
        return None


def why_not_replayed(first: Watch, second: Watch) -> str | None:
    """Why what two watches saw cannot be replayed, or None if it can: the same on the same tensors, without a wait."""
    if waits := [*first.waits, *second.waits]:
        return waits[0]
    if len(first.calls) != len(second.calls):
        return f"one call had {len(first.calls)} operators, the next {len(second.calls)}"
    for one, other in zip(first.calls, second.calls, strict=True):
        if repr(one) != repr(other):  # by text, as NaN is not itself
            return f"{one[0]} was called with other numbers or other tensors the next time"
    return None


def captures(device: torch.device) -> bool:
    """Whether work on this device becomes graphs."""
    return device.type == "cuda"


class Replayed:
    """`run`, of which on CUDA every call from the fourth on is one launch of a graph, if it may be one.

    The first call warms up and makes what is made once, two are watched, and the fourth is captured, all on the stream
    of the capture. `run` works on tensors that stay where they are. Elsewhere, and where a replay would differ, every
    call is `run` itself; `refused` is told why. This was written without a GPU at hand and has not been run on one; a
    recorder of operators that replays them in place of a graph proves it (`tests/lab/test_packed.py`).
    """

    def __init__(self, run: Callable[[], object], device: torch.device, refused: Callable[[str], object]) -> None:
        self.run, self.refused, self.device = run, refused, device
        self.stream = torch.cuda.Stream(device) if captures(device) else None
        self.warm = False
        self.watches: list[Watch] = []
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.replay is None and len(self.watches) == 2:
            why = why_not_replayed(*self.watches)
            self.watches.clear()
            if why is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream):
                    self.run()  # recorded, and not done
                self.replay = graph.replay
            else:
                self.stream = None
                self.refused(why)
        if self.replay is not None:
            self.replay()
        elif self.stream is None:
            self.run()
        else:
            self._before(self.stream)

    def prepare(self) -> None:
        """Make the calls that come before replays, if there will be any."""
        while self.stream is not None and self.replay is None:
            self()

    def _before(self, stream: torch.cuda.Stream) -> None:
        """The first call, and the two that are watched."""
        here = torch.cuda.current_stream(self.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            if self.warm:
                self.watches.append(Watch(self.device))
                with self.watches[-1]:
                    self.run()
            else:
                self.warm = True
                self.run()
        here.wait_stream(stream)
