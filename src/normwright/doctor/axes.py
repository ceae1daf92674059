"""What the axes of a tensor are: features, places, positions of a sequence. Known from what the model does with them.

A linear map, a convolution, an embedding, a recurrent layer or an attention says of its output which axis holds the
features; what follows (elementwise functions, permutations, reshapes) carries that along. Nothing is read off names or
sizes, and where two answers meet the axis is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .probe import Subject

__all__ = ["FEATURES", "PLACES", "SEQUENCE", "UNKNOWN", "NormAxes", "axes_at_norms"]

FEATURES, PLACES, SEQUENCE, UNKNOWN = "features", "places", "sequence", "unknown"

Roles = tuple[str, ...]
# calls of norms that a tensor comes from, each with the axes of the norm's output in the order of the tensor's
Origin = tuple[tuple["NormAxes", tuple[int, ...]], ...]

_CONVOLUTIONS = {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "squeeze_"}
_PERMUTATIONS = {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "T", "mT", "transpose_"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "logsumexp", "std", "var", "nanmean", "median"}
_MATMULS = {"matmul", "bmm", "mm", "__matmul__"}
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)
# of another size, but each axis stays what it is
_KEEP = {
    *("pad", "interpolate", "upsample", "chunk", "split", "narrow", "cat", "concat", "concatenate", "index_select"),
    *("roll", "flip", "select_scatter", "repeat_interleave", "_pad_circular", "split_with_sizes", "tensor_split"),
    *(f"{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)),
}
# of the same shape, and yet not elementwise
_MIXES = {"einsum", "cdist", "outer", "tensordot", "bilinear", "addmm", "baddbmm", "linalg_solve", "kron"}


@dataclass
class NormAxes:
    """One call of a norm, and what the axes of its input are.

    Arguments:
        name, module, x: the layer and its input; `finished` whether it gave an output, and did not raise.
        roles: for each axis of `x` what it is.
        reads: what is done with which axis of the output: `("linear", d)` a linear map of axis d, `("channels", d)` a
            convolution with channels there, `("sequence", d)` recurrence or attention along it, `("pooled", d)` a
            reduction.
    """

    name: str
    module: nn.Module
    x: Tensor
    roles: Roles
    finished: bool = False
    reads: set[tuple[str, int]] = field(default_factory=set)


def axes_at_norms(subject: Subject) -> tuple[list[NormAxes], Exception | None]:
    """Every norm's calls in one run, in the modes as they are, with the roles of their axes; what the model raised."""
    if "axes" not in subject._runs:
        subject._runs["axes"] = _axes_at_norms(subject)  # type: ignore[assignment]
    return subject._runs["axes"]  # type: ignore[return-value]


def _axes_at_norms(subject: Subject) -> tuple[list[NormAxes], Exception | None]:
    calls: list[NormAxes] = []
    raised: Exception | None = None
    names = {module: name for name, module in subject.norms().items()}
    if not names:
        return [], None

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        if isinstance(x, Tensor):
            calls.append(NormAxes(names[module], module, x.detach().clone(), _roles(x)))

    def left(module: nn.Module, args: Any, y: Any) -> None:
        call = next((call for call in reversed(calls) if call.module is module and not call.finished), None)
        if call is not None and isinstance(y, Tensor):
            call.finished = True
            y._nw_from = ((call, tuple(range(y.dim()))),)  # type: ignore[attr-defined]
            if y.shape == call.x.shape:
                y._nw_roles = call.roles  # type: ignore[attr-defined]

    def ran(module: Any, args: Any, output: Any) -> None:
        y = output[0]
        if isinstance(y, Tensor) and isinstance(args[0], Tensor):
            roles = [UNKNOWN] * (y.dim() - 1) + [FEATURES]
            roles[1 if module.batch_first and y.dim() == 3 else 0] = SEQUENCE
            _read(args[0], "sequence", roles.index(SEQUENCE))
            y._nw_roles = tuple(roles)  # type: ignore[attr-defined]

    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl for m in subject.model.modules())
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    # with gradients, or a transformer layer at evaluation becomes one function
    with subject.experiment() as model, eager, torch.enable_grad():
        for module in names:
            module.register_forward_pre_hook(entered, with_kwargs=True)
            module.register_forward_hook(left)
        for module in model.modules():
            if isinstance(module, _RECURRENT):
                module.register_forward_hook(ran)
        try:
            with _Following(model):
                subject.run()
        except Exception as error:
            raised = error
    return calls, raised


def _roles(tensor: Tensor) -> Roles:
    roles = getattr(tensor, "_nw_roles", None)
    return roles if roles is not None and len(roles) == tensor.dim() else (UNKNOWN,) * tensor.dim()


def _read(tensor: Any, how: str, axis: int) -> None:
    """Tell the norms from which this tensor came what is done with one of its axes."""
    for call, order in getattr(tensor, "_nw_from", ()):
        call.reads.add((how, order[axis]))


class _Following(TorchFunctionMode):
    """Carries the roles of axes through the functions that are called, on all tensors but the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {id(t) for t in (*model.parameters(), *model.buffers())}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        given = [t for t in _tensors((args, kwargs)) if t.is_floating_point() or name == "embedding"]
        # before the call, as it may write in place
        roles = {id(t): _roles(t) for t in given}
        shapes = {id(t): t.shape for t in given}
        origins = {id(t): getattr(t, "_nw_from", ()) for t in given}
        out = func(*args, **kwargs)
        if not given:
            return out
        outputs = [t for t in _tensors(out) if t.is_floating_point() and id(t) not in self.own]
        _Rule(name, args, kwargs, given, roles, shapes, origins).mark(outputs)
        return out


@dataclass
class _Rule:
    """What one function makes of the roles."""

    name: str
    args: Any
    kwargs: Any
    given: list[Tensor]
    roles: dict[int, Roles]
    shapes: dict[int, torch.Size]
    origins: dict[int, Origin]

    @property
    def origin(self) -> Origin:
        return self.origins[id(self.given[0])]

    def mark(self, outputs: list[Any]) -> None:
        # the second output of an attention is its weights
        marked = outputs[:1] if "multi_head_attention" in self.name else outputs
        for y in marked:
            try:
                found = self._made(y)
            except (IndexError, TypeError, ValueError, AttributeError):
                found = None  # called in another way than usual, and then nothing is known
            y._nw_roles, y._nw_from = found or (None, ())

    def _made(self, y: Tensor) -> tuple[Roles, Origin] | None:
        name, x = self.name, self.given[0]
        of_x, shape = self.roles[id(x)], tuple(self.shapes[id(x)])
        if name == "linear":
            _read(x, "linear", -1)
            # the other axes are still those of the norm's output, and are read as such behind it
            return (*of_x[:-1], FEATURES), self.origin
        if name in _CONVOLUTIONS:
            return self._convolved(x, of_x, y)
        if name == "embedding":
            return (*(UNKNOWN if d == 0 else SEQUENCE for d in range(y.dim() - 1)), FEATURES), ()
        if name == "multi_head_attention_forward":
            for t in self.given[:3]:
                _read(t, "sequence", 0)
            return (SEQUENCE, *(UNKNOWN,) * (y.dim() - 2), FEATURES), ()
        if name == "_native_multi_head_attention":
            _read(x, "sequence", 1)
            return (UNKNOWN, SEQUENCE, FEATURES), ()
        if name == "scaled_dot_product_attention":
            for t in self.given[:3]:
                _read(t, "sequence", t.dim() - 2)
            return (*of_x[:-2], SEQUENCE, FEATURES), ()
        if name in _MATMULS:
            return self._multiplied(y)
        if name in _RESHAPES:
            return _reshaped(of_x, shape, tuple(y.shape)), self.origin if tuple(y.shape) == shape else ()
        if name in _PERMUTATIONS:
            order = self._order(len(shape))
            origin = tuple((call, tuple(axes[d] for d in order)) for call, axes in self.origin)
            return tuple(of_x[d] for d in order), origin
        if name in _REDUCTIONS and y.numel() < math.prod(shape):
            return self._reduced(x, of_x, y)
        if name == "stack":
            at = self.kwargs.get("dim", self.args[1] if len(self.args) > 1 else 0) % y.dim()
            return (*of_x[:at], UNKNOWN, *of_x[at:]), ()
        if name == "unbind" or (name == "__getitem__" and y.dim() != len(shape)):
            return self._indexed(x, of_x, y), ()
        if name in _MIXES:
            return None
        if name in _KEEP or name == "__getitem__":
            return (of_x, self.origin) if y.dim() == len(shape) else None
        return self._elementwise(y)

    def _convolved(self, x: Tensor, of_x: Roles, y: Tensor) -> tuple[Roles, Origin] | None:
        weight = self.given[1]
        places = weight.dim() - 2
        if y.dim() != places + 2:
            return None
        _read(x, "channels", 1)
        pointwise = all(k == 1 for k in weight.shape[2:])
        # a window that slides along an axis makes it places; one of size 1 says nothing of the others
        rest = [of_x[2 + d] if pointwise or of_x[2 + d] == FEATURES else PLACES for d in range(places)]
        return (UNKNOWN, FEATURES, *(UNKNOWN if role == FEATURES else role for role in rest)), ()

    def _multiplied(self, y: Tensor) -> tuple[Roles, Origin] | None:
        a, b = self.given[0], self.given[1]
        if len(self.shapes[id(a)]) < 2 or len(self.shapes[id(b)]) < 2:
            return None
        of_a, of_b = self.roles[id(a)], self.roles[id(b)]
        if isinstance(b, nn.Parameter):
            _read(a, "linear", -1)
        rows = FEATURES if isinstance(a, nn.Parameter) else of_a[-2]
        columns = FEATURES if isinstance(b, nn.Parameter) else of_b[-1]
        longer = of_a if len(of_a) >= len(of_b) else of_b
        return (*longer[:-2], rows, columns), ()

    def _order(self, dims: int) -> list[int]:
        """The axes of the input in the order of the output."""
        sizes: Any = torch.empty(tuple(range(2, 2 + dims)), device="meta")  # all different
        function = getattr(Tensor, self.name.rstrip("_"))
        arguments = self.args[1:]
        moved: Any = function(sizes, *arguments, **self.kwargs) if callable(function) else getattr(sizes, self.name)
        return [size - 2 for size in moved.shape]

    def _reduced(self, x: Tensor, of_x: Roles, y: Tensor) -> tuple[Roles, Origin] | None:
        dim = self.kwargs.get("dim", self.args[1] if len(self.args) > 1 else None)
        if dim is None:
            return None
        gone = {d % len(of_x) for d in (dim if isinstance(dim, (tuple, list)) else (dim,))}
        for d in gone:
            _read(x, "pooled", d)
        if y.dim() == len(of_x):
            return of_x, ()
        return tuple(role for d, role in enumerate(of_x) if d not in gone), ()

    def _indexed(self, x: Tensor, of_x: Roles, y: Tensor) -> Roles:
        """Of a view that lacks axes, those that are left have the strides that they had."""
        roles, at, strides = [], 0, x.stride()
        for stride, size in zip(y.stride(), y.shape, strict=True):
            while at < len(strides) and (strides[at] != stride or size > x.size(at)):
                at += 1
            roles.append(of_x[at] if at < len(strides) and size > 1 else UNKNOWN)
            at += 1
        return tuple(roles)

    def _elementwise(self, y: Tensor) -> tuple[Roles, Origin] | None:
        """Shapes that broadcast to the output's: each axis is what all say that know it."""
        parts = [(self.shapes[id(t)], self.roles[id(t)]) for t in self.given if not isinstance(t, nn.Parameter)]
        try:
            if not parts or torch.broadcast_shapes(*(shape for shape, _ in parts)) != y.shape:
                return None
        except RuntimeError:
            return None
        merged = []
        for d in range(1, y.dim() + 1):
            said = {roles[-d] for shape, roles in parts if len(shape) >= d and (shape[-d] > 1 or y.size(-d) == 1)}
            said.discard(UNKNOWN)
            if said == {PLACES, SEQUENCE}:
                said = {SEQUENCE}
            merged.append(said.pop() if len(said) == 1 else UNKNOWN)
        # a sum or product with anything else, as behind a residual branch, is still read as what it is
        whole = [t for t in self.given if self.shapes[id(t)] == y.shape]
        origins = {id(one[0]): one for t in whole for one in self.origins.get(id(t), ())}
        return tuple(reversed(merged)), tuple(origins.values())


def _reshaped(roles: Roles, old: tuple[int, ...], new: tuple[int, ...]) -> Roles:
    """Roles of a reshaped tensor: an axis that is split gives its role to its parts; of merged ones all must agree."""
    found: list[str] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        a = b = 1
        # the shortest runs of axes of both shapes with the same number of elements
        while i == start_i or j == start_j or a != b:
            if (a <= b and i < len(old)) or j >= len(new):
                if i >= len(old):
                    break
                a *= old[i]
                i += 1
            else:
                b *= new[j]
                j += 1
        said = {role for role, size in zip(roles[start_i:i], old[start_i:i], strict=True) if size > 1}
        # a batch or a sequence together with more places is many places, but not for sure which
        role = said.pop() if len(said) == 1 else UNKNOWN
        found += [role if size > 1 else UNKNOWN for size in new[start_j:j]]
    return tuple(found)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
