"""Repairs Triton's interpreter where it computes otherwise than a GPU: bfloat16, and the order of sums in products."""

from __future__ import annotations

from typing import Any

import numpy as np


def repair() -> None:
    """Make the interpreter compute what a GPU does.

    It keeps bfloat16 as uint16 and computes with those integers, and its casts truncate: here bfloat16 is widened to
    float32 for arithmetic and results are rounded to nearest even (reductions excepted: cast before them). Its
    products come from a BLAS, which rounds equal columns differently: here every entry is summed in the same order.

    What it still cannot show: the error of tf32, which it computes as float32, and races. Call it after
    ``TRITON_INTERPRET=1`` is set; a second call does nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_errseg_repaired", False):
        return
    builder._errseg_repaired = True
    handle = interpreter.TensorHandle
    create_dot_of_bytes = builder.create_dot
    plain = {name: getattr(builder, name) for name in ("cast_impl", "binary_op", "ternary_op", "unary_op")}

    def is_bfloat16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def operand(value: Any) -> np.ndarray:
        return widen(value.data) if is_bfloat16(value) else value.data

    def result(data: np.ndarray) -> Any:
        if data.dtype == np.bool_:
            return handle(data, tl.int1)
        return handle(round_to_bfloat16(data), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if a.dtype.primitive_bitwidth == 8 or b.dtype.primitive_bitwidth == 8:
            return create_dot_of_bytes(self, a, b, d, *precision)
        factors = (operand(factor).astype(d.data.dtype) for factor in (a, b))
        return handle(np.einsum("...ik,...kj->...ij", *factors) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, value: Any, to: Any) -> Any:
        source, target = value.dtype.scalar, to.scalar
        if (source == tl.bfloat16) == (target == tl.bfloat16):
            return plain["cast_impl"](self, value, to)
        if target == tl.bfloat16:
            return handle(round_to_bfloat16(value.data), target)
        return handle(widen(value.data).astype(interpreter._get_np_dtype(to)), target)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        return result(op(operand(a), operand(b))) if is_bfloat16(a) else plain["binary_op"](self, a, b, op)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        # `where` comes here as well: its values need no arithmetic, only the others do.
        if op is np.where or not is_bfloat16(b):
            return plain["ternary_op"](self, a, b, c, op)
        return result(op(operand(a), operand(b), operand(c)))

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        with np.errstate(all="ignore"):  # a GPU overflows in silence
            return result(op(operand(a))) if is_bfloat16(a) else plain["unary_op"](self, a, op)

    for function in (create_dot, cast_impl, binary_op, ternary_op, unary_op):
        setattr(builder, function.__name__, function)


def widen(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16 as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)
