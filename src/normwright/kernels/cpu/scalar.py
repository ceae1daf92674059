"""Scalars inside the kernels: loads and stores of every type, activations and their derivatives.

Everything here is straight-line arithmetic, so that LLVM vectorizes the loops around it; calls of libm would stop it.
Half types are kept as 16-bit integers and computed in float32. Polynomials: Cephes (exp, tanh) and the
fractional-error form of erfc in Numerical Recipes, section 6.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic

# the decorated function takes one argument less than it is written with, which type checkers cannot know
intrinsic: Any = _numba_intrinsic

# reductions may be reordered and products fused; NaN and infinity keep their meaning
FAST = {"reassoc", "contract", "nsz", "arcp"}
# fused products only: for range reductions, whose steps must happen in the order written
STRICT = {"contract"}

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()


def _pointer_intrinsic(element: types.Type, llvm: ir.Type):
    @intrinsic
    def pointer(typing_context, address):
        """int64 address -> typed pointer."""

        def codegen(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], llvm.as_pointer())

        return types.CPointer(element)(types.int64), codegen

    return pointer


pointer_f32 = _pointer_intrinsic(types.float32, _F32)
pointer_f64 = _pointer_intrinsic(types.float64, _F64)
pointer_u16 = _pointer_intrinsic(types.uint16, _I16)
pointer_u8 = _pointer_intrinsic(types.uint8, ir.IntType(8))
pointer_i64 = _pointer_intrinsic(types.int64, _I64)


@intrinsic
def _bf16_to_f32(typing_context, bits):
    def codegen(context, builder, signature, arguments):
        wide = builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(wide, _F32)

    return types.float32(types.uint16), codegen


@intrinsic
def _f32_to_bf16(typing_context, value):
    """Round to nearest even; NaN stays a quiet NaN."""

    def codegen(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF))), ir.Constant(_I32, 16))
        nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(nan, ir.Constant(_I32, 0x7FC0), rounded), _I16)

    return types.uint16(types.float32), codegen


@intrinsic
def _f16_to_f32(typing_context, bits):
    def codegen(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), _F32)

    return types.float32(types.uint16), codegen


@intrinsic
def _f32_to_f16(typing_context, value):
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), _I16)

    return types.uint16(types.float32), codegen


@intrinsic
def _scale_f32(typing_context, value, exponent):
    """value · 2^exponent for an integral float exponent in the normal range."""

    def codegen(context, builder, signature, arguments):
        shifted = builder.shl(builder.fptosi(arguments[1], _I32), ir.Constant(_I32, 23))
        return builder.bitcast(builder.add(builder.bitcast(arguments[0], _I32), shifted), _F32)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def _scale_f64(typing_context, value, exponent):
    def codegen(context, builder, signature, arguments):
        shifted = builder.shl(builder.fptosi(arguments[1], _I64), ir.Constant(_I64, 52))
        return builder.bitcast(builder.add(builder.bitcast(arguments[0], _I64), shifted), _F64)

    return types.float64(types.float64, types.float64), codegen


# elements computed in the first-level cache before they are written past all caches
STAGE = 1024


@intrinsic
def stage_address(typing_context):
    """Address of STAGE elements, of up to 8 bytes, on the stack of the kernel."""

    def codegen(context, builder, signature, arguments):
        with builder.goto_entry_block():
            # not cgutils.alloca_once, which stores zeros: LLVM takes seconds to break up a store of that size
            buffer = builder.alloca(ir.ArrayType(ir.IntType(8), STAGE * 8))
        buffer.align = 64
        return builder.ptrtoint(buffer, _I64)

    return types.int64(), codegen


@intrinsic
def _stream_line(typing_context, to, source):
    """Copy 64 bytes to an address that is a multiple of 64, past the cache."""

    def codegen(context, builder, signature, arguments):
        line = ir.VectorType(_I64, 8).as_pointer()
        to, source = (builder.inttoptr(argument, line) for argument in arguments)
        written = builder.store(builder.load(source, align=2), to, align=64)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _prefetch_line(typing_context, address):
    def codegen(context, builder, signature, arguments):
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        name = "llvm.prefetch.p0" if pointer.is_opaque else "llvm.prefetch.p0i8"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        flags = [ir.Constant(_I32, flag) for flag in (0, 3, 1)]  # for reading, into the first level, of data
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *flags])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def fence(typing_context):
    """What was written past the cache is there for whoever reads next."""

    def codegen(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


f32, f64 = np.float32, np.float64


def inner(fastmath: set[str]) -> Callable:
    """Decorator for a function called inside a kernel: no exceptions (a division by zero gives infinity)."""
    return njit(fastmath=fastmath, error_model="numpy", forceinline=True)


def _keep_inside(library: Any, name: str) -> None:
    """Let nothing outside of the library see its function of this name, once it is optimized.

    Numba tells functions of one name apart by a count that every process starts at 1, and one table holds the symbols
    of all kernels of a process. Kernels from the disk that different processes compiled would run each other's loops,
    and a kernel just compiled would run the function's own copy, which may round otherwise than its copy on the disk.
    """
    finalize = library._finalize_final_module

    def finalize_inside() -> None:
        library._final_module.get_function(name).linkage = "internal"
        finalize()

    library._finalize_final_module = finalize_inside


def alone(fastmath: set[str]) -> Callable:
    """Decorator for loops over elements, compiled as a function of their own, whose status is not asked for.

    Inlined into the loops over statistics, they make LLVM carry some two hundred addresses on the stack from one turn
    of the outer loop to the next: batch norm of (32,64,112,112) in bfloat16 took 14.0 ms so and 9.5 ms like this,
    forward and backward on one thread of a Zen 5.
    """

    def decorate(function: Callable) -> Callable:
        outlined = njit(fastmath=fastmath, error_model="numpy", forceinline=False)(function)

        @intrinsic
        def call(typing_context, *arguments):
            found = types.Dispatcher(outlined).get_call_type(typing_context, arguments, {})

            def codegen(context, builder, signature, values):
                compiled = outlined.get_compile_result(found)
                context.active_code_library.add_linking_library(compiled.library)
                _keep_inside(context.active_code_library, compiled.fndesc.mangled_name)
                called = context.declare_function(builder.module, compiled.fndesc)
                unpacked = cgutils.unpack_tuple(builder, values[0], len(arguments))
                _, result = context.call_conv.call_function(
                    builder, called, found.return_type, found.args, unpacked, ("noinline",)
                )
                return result

            return found.return_type(types.StarArgTuple(arguments)), codegen

        return call

    return decorate


_strict = inner(STRICT)


@alone(STRICT)
def stream(to, source, size):
    """Copy an even number of bytes past the cache: no line is read only to be overwritten."""
    head = min((-to) & 63, size)
    a, b = pointer_u16(to), pointer_u16(source)
    for i in range(head // 2):
        a[i] = b[i]
    lines = (size - head) // 64
    for i in range(lines):
        _stream_line(to + head + 64 * i, source + head + 64 * i)
    for i in range((head + lines * 64) // 2, size // 2):
        a[i] = b[i]


@inner(STRICT)
def prefetch(address, size):
    """Ask for bytes that will be read soon."""
    if address != 0:
        for i in range(0, size, 64):
            _prefetch_line(address + i)


def _single() -> SimpleNamespace:
    """float32: exp by a degree-5 polynomial after Cody–Waite reduction, relative error below 2e-7."""
    low, high = f32(-87.0), f32(88.0)
    log2e, magic = f32(1.44269504), f32(12582912.0)  # adding 1.5·2^23 rounds to an integer
    ln2_high, ln2_low = f32(0.693359375), f32(-2.12194440e-4)
    c0, c1, c2, c3, c4, c5 = map(
        f32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    )
    one, half = f32(1), f32(0.5)

    @_strict
    def exp(x):
        x = low if x < low else x
        x = high if x > high else x
        k = (x * log2e + magic) - magic
        r = (x - k * ln2_high) - k * ln2_low
        p = c0
        p = p * r + c1
        p = p * r + c2
        p = p * r + c3
        p = p * r + c4
        p = p * r + c5
        return _scale_f32(p * (r * r) + r + one, k)

    t0, t1, t2, t3, t4 = map(
        f32, (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
    )
    near = f32(0.625)

    @_strict
    def tanh(x):
        a = abs(x)
        s = x * x
        small = ((((t0 * s + t1) * s + t2) * s + t3) * s + t4) * s * x + x
        e = exp(-(a + a))
        large = (one - e) / (one + e)
        large = -large if x < f32(0) else large
        return small if a < near else large

    e0, e1, e2, e3, e4, e5, e6, e7, e8, e9 = map(
        f32,
        (-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
         -0.82215223, 0.17087277),
    )  # fmt: skip
    root = f32(math.sqrt(0.5))

    @_strict
    def normal_cdf(x):
        z = abs(x) * root
        t = one / (one + half * z)
        p = e0 + t * (e1 + t * (e2 + t * (e3 + t * (e4 + t * (e5 + t * (e6 + t * (e7 + t * (e8 + t * e9))))))))
        tail = half * t * exp(p - z * z)
        return tail if x < f32(0) else one - tail

    return SimpleNamespace(exp=exp, tanh=tanh, normal_cdf=normal_cdf)


def _double() -> SimpleNamespace:
    """float64: a degree-13 Taylor exp, relative error below 3e-16; erf and tanh from libm, exact before fast."""
    low, high = -708.0, 709.0
    log2e, magic = 1.4426950408889634, 6755399441055744.0
    ln2_high, ln2_low = 6.93147180369123816490e-01, 1.90821492927058770002e-10
    c = tuple(1 / math.factorial(i) for i in range(13, 1, -1))
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11 = c

    @_strict
    def exp(x):
        x = low if x < low else x
        x = high if x > high else x
        k = (x * log2e + magic) - magic
        r = (x - k * ln2_high) - k * ln2_low
        p = c0
        p = p * r + c1
        p = p * r + c2
        p = p * r + c3
        p = p * r + c4
        p = p * r + c5
        p = p * r + c6
        p = p * r + c7
        p = p * r + c8
        p = p * r + c9
        p = p * r + c10
        p = p * r + c11
        return _scale_f64(p * (r * r) + r + 1.0, k)

    root = math.sqrt(0.5)

    @_strict
    def tanh(x):
        return math.tanh(x)

    @_strict
    def normal_cdf(x):
        return 0.5 * math.erfc(-x * root)

    return SimpleNamespace(exp=exp, tanh=tanh, normal_cdf=normal_cdf)


def _activation(name: str, T, functions: SimpleNamespace) -> tuple[Callable, Callable, Callable | None]:
    """The activation f(z), its derivative f'(z), and that again from y = f(z) where y tells, in the type T."""
    exp, tanh, normal_cdf = functions.exp, functions.tanh, functions.normal_cdf
    zero, one, slope, density = T(0), T(1), T(0.01), T(1 / math.sqrt(2 * math.pi))
    half = T(0.5)

    @_strict
    def sigmoid(z):
        return one / (one + exp(-z))

    if name == "none":
        return _strict(lambda z: z), _strict(lambda z: one), None
    if name == "relu":  # as torch: NaN passes, the derivative at 0 is 0
        by_sign = _strict(lambda z: zero if z <= zero else one)
        return _strict(lambda z: zero if z <= zero else z), by_sign, by_sign
    if name == "leaky_relu":
        by_sign = _strict(lambda z: one if z > zero else slope)
        return _strict(lambda z: z if z > zero else z * slope), by_sign, by_sign
    if name == "sigmoid":

        @_strict
        def sigmoid_slope(z):
            s = sigmoid(z)
            return s * (one - s)

        return sigmoid, sigmoid_slope, _strict(lambda y: y * (one - y))
    if name == "tanh":

        @_strict
        def tanh_slope(z):
            t = tanh(z)
            return one - t * t

        return tanh, tanh_slope, _strict(lambda y: one - y * y)
    if name == "silu":

        @_strict
        def silu(z):
            return z * sigmoid(z)

        @_strict
        def silu_slope(z):
            s = sigmoid(z)
            return s * (one + z * (one - s))

        return silu, silu_slope, None
    if name == "gelu":

        @_strict
        def gelu(z):
            return z * normal_cdf(z)

        @_strict
        def gelu_slope(z):
            return normal_cdf(z) + z * density * exp(-half * z * z)

        return gelu, gelu_slope, None
    raise ValueError(f"no such activation: {name}")


def _results(module: ir.Module) -> ir.MDValue:
    """The alias scope of what `store` writes, which `load` never reads: loops need not compare their addresses."""
    domain = module.add_metadata([ir.MetaDataString(module, "normwright")])
    return module.add_metadata([module.add_metadata([ir.MetaDataString(module, "results"), domain])])


@intrinsic
def _element(typing_context, pointer, index):
    """pointer[index] of an input."""

    def codegen(context, builder, signature, arguments):
        loaded = builder.load(builder.gep(arguments[0], [arguments[1]]))
        loaded.set_metadata("noalias", _results(builder.module))
        return loaded

    return pointer.dtype(pointer, types.int64), codegen


@intrinsic
def _set_element(typing_context, pointer, index, value):
    """pointer[index] = value, of a result."""

    def codegen(context, builder, signature, arguments):
        stored = builder.store(arguments[2], builder.gep(arguments[0], [arguments[1]]))
        stored.set_metadata("alias.scope", _results(builder.module))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, pointer.dtype), codegen


@_strict
def _plain_load(p, i):
    return _element(p, i)


@_strict
def _plain_store(p, i, v):
    _set_element(p, i, v)


@_strict
def _load_bf16(p, i):
    return _bf16_to_f32(_element(p, i))


@_strict
def _store_bf16(p, i, v):
    _set_element(p, i, _f32_to_bf16(v))


@_strict
def _load_f16(p, i):
    return _f16_to_f32(_element(p, i))


@_strict
def _store_f16(p, i, v):
    _set_element(p, i, _f32_to_f16(v))


_SINGLE, _DOUBLE = _single(), _double()
_TYPES = {
    "float32": (f32, pointer_f32, pointer_f32, _plain_load, _plain_store, _SINGLE),
    "float64": (f64, pointer_f64, pointer_f64, _plain_load, _plain_store, _DOUBLE),
    "bfloat16": (f32, pointer_f32, pointer_u16, _load_bf16, _store_bf16, _SINGLE),
    "float16": (f32, pointer_f32, pointer_u16, _load_f16, _store_f16, _SINGLE),
}


def scalars(dtype: str, act: str) -> SimpleNamespace:
    """What a kernel for this type and activation is written with.

    `T` computes, `pt` points to T (parameters), `px` to the stored type, of `size` bytes; `load`, `store` convert;
    `f`, `slope` are the activation and its derivative, `slope_of_output` the derivative from f(z), or None.
    """
    T, pt, px, load, store, functions = _TYPES[dtype]
    f, slope, slope_of_output = _activation(act, T, functions)
    size = 8 if dtype == "float64" else 4 if dtype == "float32" else 2
    return SimpleNamespace(
        T=T, pt=pt, px=px, size=size, load=load, store=store, f=f, slope=slope, slope_of_output=slope_of_output
    )  # fmt: skip
