"""Gradient checking: is the gradient that the code computes the one that the function has?"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GradcheckReport", "TensorCheck", "gradcheck", "relative_error"]

# Rounding error of a difference quotient, in units of machine epsilon times the norm of the outputs that moved over h:
# a norm layer rounds a few times on the way to its output.
_ROUNDINGS = 4.0


@dataclass
class TensorCheck:
    """One tensor's result: the largest relative error of the coordinates that can be judged, and the others."""

    name: str
    shape: tuple[int, ...]
    error: float = 0.0
    checked: int = 0  # coordinates, over all points
    total: int = 0
    worst: str = ""  # where the error is largest, with both values
    failed: int = 0  # coordinates above the tolerance, unexplained
    kinks: list[str] = field(default_factory=list)  # mismatches that a kink within h explains
    unresolved: int = 0  # gradients too small for differences to confirm or refute at the tolerance
    zero: int = 0  # gradients that are exactly zero both ways

    @property
    def ok(self) -> bool:
        return self.failed == 0

    def lines(self, width: int) -> Iterator[str]:
        """The result as text, the name padded to `width`."""
        many = f"{self.checked} coordinates" + (f" sampled of {self.total}" if self.checked < self.total else "")
        counts = ((self.failed, "wrong"), (len(self.kinks), "at kinks"), (self.unresolved, "below resolution"))
        notes = ", ".join(f"{count} {what}" for count, what in counts if count)
        shape = "x".join(map(str, self.shape)) or "scalar"
        yield f"  {self.name:<{width}}  {self.error:.1e}  {shape}, {many}" + (f" ({notes})" if notes else "")
        if self.failed:
            yield f"    worst: {self.worst}"
        if self.kinks:
            more = f" and {len(self.kinks) - 3} more" if len(self.kinks) > 3 else ""
            yield f"    kinks, not counted as errors: {'; '.join(self.kinks[:3])}{more}"


@dataclass(frozen=True)
class GradcheckReport:
    """What `gradcheck` found: `ok`, `errors` (a `TensorCheck` by tensor name) and `warnings`; true if ok."""

    errors: dict[str, TensorCheck]
    points: int
    h: float
    tolerance: float
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.errors.values())

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        width = max(len(name) for name in self.errors)
        return "\n".join(
            [
                f"gradient check {'passed' if self.ok else 'FAILED'}: analytic against central differences at "
                f"{self.points} point{'s' * (self.points != 1)}, h = {self.h:g}, tolerance {self.tolerance:g}",
                *(line for check in self.errors.values() for line in check.lines(width)),
                *(f"  note: {warning}" for warning in self.warnings),
            ]
        )


def relative_error(a: Any, b: Any) -> float:
    """The largest relative error over all entries: `max |a − b| / max(1e-8, |a| + |b|)`; 0 of nothing."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float((np.abs(a - b) / np.maximum(1e-8, np.abs(a) + np.abs(b))).max(initial=0.0))


@dataclass
class _Problem:
    """A function in float64 that can be evaluated and differentiated where its tensors stand."""

    tensors: dict[str, Any]  # NumPy arrays or torch tensors, written to in place
    output: Callable[[], NDArray]  # flat
    gradient: Callable[[NDArray], Mapping[str, NDArray]]  # of (projection · output), by tensor name

    def differences(self, name: str, index: tuple, h: float, *, y: NDArray, p: NDArray) -> tuple[float, float, float]:
        """At one coordinate: first difference, second difference times h, rounding error to expect of the first."""
        tensor = self.tensors[name]
        x = float(_numpy(tensor)[index])
        moved = []
        for step in (h, -h):
            _write(tensor, index, x + step)
            moved.append(self.output())
        _write(tensor, index, x)
        up, down = moved
        # outputs are subtracted before they are summed, and the step is the one taken after rounding
        first = float(p @ (up - down)) / ((x + h) - (x - h))
        second = float(p @ ((up - y) + (down - y))) / h
        noise = float(_ROUNDINGS * np.finfo(np.float64).eps * np.linalg.norm((p * y)[up != down]) / h)
        return first, second, noise


def gradcheck(
    f: Any,
    inputs: Any,
    *,
    points: int = 5,
    h: float = 1e-5,
    tolerance: float = 1e-6,
    max_coordinates: int = 128,
    spread: float = 0.5,
    constant: Sequence[str] = (),
    seed: int = 0,
) -> GradcheckReport:
    """Compare the gradients of `f` with central differences at several points, tensor by tensor.

    Formula: for `L = Σ p · y` with a random p per point, the analytic `∂L/∂x_i` against
    `(L(x + h e_i) − L(x − h e_i)) / 2h`; the error is `max |a − b| / max(1e-8, |a| + |b|)`.

    Where the two disagree the function is also evaluated at h/2 and 2h. A smooth function's second difference over h
    doubles with h; one that does not shows a kink within h (an activation crossing zero), and a mismatch no larger than
    this is counted as a kink. One that rounding or curvature explains, because the differences disagree among
    themselves as much, is counted as below resolution. The rest is wrong.

    Arguments:
        f: a torch module, a function of torch tensors (autograd differentiates both), or a pair `(forward, backward)`
            of NumPy functions, `forward(...) -> (y, cache)` and `backward(dy, cache) -> {"dx": …}`, as in `reference`.
        inputs: one tensor, a sequence of them in the order of f's arguments, or a mapping by argument name. Boolean
            tensors (masks) and what is no tensor are passed through.
        points: how many; the first is as given, the others add normal noise of `spread` times each tensor's root mean
            square (1 for a tensor of zeros) to inputs and parameters.
        h: the step, in the unit of the tensors.
        tolerance: the largest relative error that is not wrong.
        max_coordinates: of larger tensors a random sample of this many is checked at each point; the report says so.
        constant: names of inputs or parameters that are not differentiated and do not move (token indices, a variance).
        seed: of points, projections and samples, and of f's own torch randomness at each evaluation (dropout).

    A module is checked in a float64 copy with its own train or eval mode, its buffers put back before each evaluation;
    the original, its running statistics and torch's random state stay as they are.

    Errors: `TypeError` for an input that is not floating, `ValueError` for nothing to differentiate, an output that is
    not finite or not the same twice, or a gradient of another shape.
    """
    for name, value in (("points", points), ("h", h), ("tolerance", tolerance), ("max_coordinates", max_coordinates)):
        if not value > 0:
            raise ValueError(f"{name} is positive; got {value}.")
    # not default_rng(seed): inputs drawn from that would repeat as the projection, and its gradient is nearly zero
    rng = np.random.default_rng([seed, 1])
    with _reference(f, inputs, constant) if isinstance(f, tuple) else _torch(f, inputs, constant, seed) as problem:
        start = {name: _numpy(t).copy() for name, t in problem.tensors.items()}
        checks = {name: TensorCheck(name, a.shape) for name, a in start.items()}
        for point in range(points):
            for name, a in start.items():
                if point:
                    scale = spread * (np.sqrt(np.mean(a**2)) if a.any() else 1.0)
                    _write(problem.tensors[name], ..., a + scale * rng.standard_normal(a.shape))
            y = problem.output()
            if not np.isfinite(y).all():
                bad = np.count_nonzero(~np.isfinite(y))
                raise ValueError(
                    f"Differences need finite outputs; at point {point}, {bad} of {y.size} are not. Check the inputs, "
                    "lower spread, or name tensors that must not move in constant=."
                )
            drift = np.abs(problem.output() - y).max(initial=0.0)
            if drift > 1e-9 * np.abs(y).max(initial=0.0):
                raise ValueError(
                    f"Differences need the same output for the same input; two calls differ by {drift:.1e} at point "
                    f"{point}. Keep state in buffers, draw randomness from torch's default generator, or use eval()."
                )
            p = rng.standard_normal(y.shape)
            analytic = problem.gradient(p)
            for check in checks.values():
                a = np.asarray(analytic[check.name])
                if a.shape != check.shape:
                    raise ValueError(
                        f"A gradient has the shape of its tensor; d{check.name} has {a.shape} for {check.shape}. "
                        "Sum it over the axes along which the tensor was broadcast."
                    )
                check.total += a.size
                chosen = np.arange(a.size)
                if a.size > max_coordinates:
                    chosen = np.sort(rng.choice(a.size, max_coordinates, replace=False))
                for flat in chosen:
                    index = tuple(int(i) for i in np.unravel_index(flat, a.shape))
                    differences = partial(problem.differences, check.name, index, y=y, p=p)
                    _check(check, index, float(a[index]), differences, point, h, tolerance)
    return GradcheckReport(checks, points, h, tolerance, tuple(_warnings(checks, h)))


def _check(
    check: TensorCheck,
    index: tuple[int, ...],
    a: float,
    differences: Callable[[float], tuple[float, float, float]],
    point: int,
    h: float,
    tolerance: float,
) -> None:
    """Judge the gradient `a` of one coordinate by differences, and enter it in `check`."""
    b, second, noise = differences(h)
    mismatch, size = abs(a - b), abs(a) + abs(b)
    error = mismatch / max(1e-8, size) if math.isfinite(a) else math.inf
    where = f"{check.name}[{', '.join(map(str, index))}] at point {point}: {a:.6g} against {b:.6g}"
    check.checked += 1
    check.zero += size == 0
    unresolved = 0 < size < noise / tolerance
    if error > tolerance and math.isfinite(a):
        (b_half, second_half, _), (b_double, second_double, _) = differences(h / 2), differences(2 * h)
        # A slope that jumps by J at distance u·h, u < 1, puts b off by J(1−u)/2. The second difference of a smooth
        # function doubles with h; here it fails to by max(|3u/2 − 1|, |3u − 1| or 1 − u) · J, at least 1.19 times that.
        kink = max(abs(second_double - 2 * second), abs(second - 2 * second_half))
        disagreement = max(abs(b - b_half), abs(b - b_double) / 4)  # 3/4 of b's error where curvature makes it
        if mismatch > noise and kink >= mismatch and kink > 16 * noise:
            check.kinks.append(where)
            return
        if mismatch <= max(noise, 2 * disagreement):
            check.unresolved += 1
            return
    check.unresolved += unresolved
    check.failed += error > tolerance
    if error > check.error or not check.worst:
        check.error, check.worst = error, where


def _warnings(checks: dict[str, TensorCheck], h: float) -> Iterator[str]:
    for check in checks.values():
        if check.checked and check.zero == check.checked:
            yield (
                f"The gradient of {check.name} is exactly zero at every coordinate checked, and agreement says little. "
                "Is it used, or is every activation that it reaches dead?"
            )
        elif len(check.kinks) > check.checked / 2:
            yield (
                f"Most coordinates of {check.name} lie at a kink, where there is no gradient to compare: move the "
                "inputs or take a smaller h."
            )
        elif check.unresolved > check.checked / 2:
            yield (
                f"Most gradients of {check.name} are below what differences with h = {h:g} resolve, so their agreement "
                "proves nothing: tiny weights or saturation mislead. Check at larger weights or with a larger h; a "
                "gradient that is zero by theory, as of a bias before batch norm, shows like this too."
            )


def _named(f: Callable, inputs: Any) -> dict[str, Any]:
    """The inputs by argument name, in order; `input0` … where the function does not tell its names."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    values = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # functions written in C
        parameters = ()
    names = [q.name for q in parameters if q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD)]
    return {names[i] if i < len(names) else f"input{i}": value for i, value in enumerate(values)}


def _not_floating(name: str, dtype: Any) -> TypeError:
    return TypeError(
        f"Gradients exist for floating tensors; input {name!r} is {dtype}. "
        "Convert it to float, or name it in constant=."
    )


def _check_names(constant: Sequence[str], names: Collection[str]) -> None:
    for name in constant:
        if name not in names:
            raise ValueError(
                f"constant= names inputs or parameters: {', '.join(names)}; got {name!r}. Correct the name."
            )


def _nothing() -> ValueError:
    return ValueError(
        "There is no tensor to differentiate: every input and parameter is empty, constant, boolean or frozen. "
        "Pass a floating tensor as input, or set requires_grad on a parameter."
    )


def _numpy(t: Any) -> NDArray:
    return t if isinstance(t, np.ndarray) else t.detach().cpu().numpy()


def _write(t: Any, index: Any, value: Any) -> None:
    """`t[index] = value` for an array, or for a tensor without autograd noticing."""
    if isinstance(t, np.ndarray):
        t[index] = value
        return
    import torch

    t.data[index] = torch.as_tensor(value, dtype=t.dtype, device=t.device)


@contextmanager
def _reference(pair: tuple, inputs: Any, constant: Sequence[str]) -> Iterator[_Problem]:
    forward, backward = pair
    arguments = _named(forward, inputs)
    _check_names(constant, arguments)
    tensors: dict[str, NDArray] = {}
    for name, value in arguments.items():
        if name in constant or not isinstance(value, np.ndarray):
            continue
        if value.dtype == np.bool_:
            continue
        if not np.issubdtype(value.dtype, np.floating):
            raise _not_floating(name, value.dtype)
        tensors[name] = arguments[name] = np.array(value, np.float64)
    if not any(t.size for t in tensors.values()):
        raise _nothing()

    def gradient(p: NDArray) -> dict[str, NDArray]:
        y, cache = forward(**arguments)
        found = backward(p.reshape(y.shape), cache)
        missing = [f"d{name}" for name in tensors if f"d{name}" not in found]
        if missing:
            raise ValueError(
                f"backward returns the gradient of every input; {', '.join(missing)} is missing of {sorted(found)}. "
                "Return it, or name the input in constant=."
            )
        return {name: np.asarray(found[f"d{name}"]) for name in tensors}

    yield _Problem(tensors, lambda: np.array(forward(**arguments)[0], np.float64).ravel(), gradient)


@contextmanager
def _torch(f: Any, inputs: Any, constant: Sequence[str], seed: int) -> Iterator[_Problem]:
    import torch

    module = f if isinstance(f, torch.nn.Module) else None
    arguments = _named(module.forward if module is not None else f, inputs)
    positional = not isinstance(inputs, Mapping)
    tensors: dict[str, torch.Tensor] = {}
    buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
    if module is not None:
        f = copy.deepcopy(module).double()
        tensors = {name: q for name, q in f.named_parameters() if q.requires_grad and name not in constant}
        buffers = [(buffer, buffer.clone()) for buffer in f.buffers()]
    _check_names(constant, [*arguments, *([name for name, _ in module.named_parameters()] if module else [])])
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().to(torch.float64, copy=True).contiguous()
            if name not in constant:
                tensors[f"{name} (input)" if name in tensors else name] = value.requires_grad_()
        elif isinstance(value, torch.Tensor) and value.dtype != torch.bool and name not in constant:
            raise _not_floating(name, value.dtype)
        given[name] = value
    if not any(t.numel() for t in tensors.values()):
        raise _nothing()

    devices = sorted({t.get_device() for t in tensors.values() if t.is_cuda})
    # these and not torch.manual_seed, which formats a stack trace for CUDA at each call: milliseconds
    generators = [torch.default_generator, *(torch.cuda.default_generators[d] for d in devices)]

    def call() -> torch.Tensor:
        """All floating outputs in one flat tensor."""
        for buffer, before in buffers:
            buffer.copy_(before)
        for generator in generators:
            generator.manual_seed(seed)
        # clones, so that an operation in place does not write to a leaf
        values = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        y = f(*values.values()) if positional else f(**values)
        flat = [t.double().reshape(-1) for t in _tensors_of(y) if t.is_floating_point()]
        if not flat:
            raise TypeError(
                f"f returns floating tensors, alone or in tuples, lists and mappings; got {type(y).__name__}. "
                "Return what the gradient is of."
            )
        return torch.cat(flat)

    def output() -> NDArray:
        with torch.no_grad():
            return call().cpu().numpy()

    def gradient(p: NDArray) -> dict[str, NDArray]:
        with torch.enable_grad():
            y = call()
        if not y.requires_grad:
            raise ValueError(
                "The output does not depend on any tensor through autograd; was it detached, or computed in no_grad? "
                "Return what autograd tracks."
            )
        grads = torch.autograd.grad(y, list(tensors.values()), torch.as_tensor(p, device=y.device), allow_unused=True)
        return {
            name: np.zeros(t.shape) if g is None else g.cpu().numpy()
            for (name, t), g in zip(tensors.items(), grads, strict=True)
        }

    with torch.random.fork_rng(devices):
        yield _Problem(tensors, output, gradient)


def _tensors_of(y: Any) -> list[Any]:
    if isinstance(y, Mapping):
        y = list(y.values())
    if isinstance(y, (tuple, list)):
        return [t for part in y for t in _tensors_of(part)]
    return [y] if hasattr(y, "is_floating_point") else []
