"""Patches Triton's interpreter (3.6 to 3.9) to round bfloat16 and tf32 as a GPU does.

- bfloat16 is kept as raw 16-bit integers: casts truncate, and dot products work on the integers (errors of 1e10). Here
  casts round to nearest even and operands are widened to float32. Arithmetic on bfloat16 stays wrong: kernels here do
  none.
- tf32 products are computed in float32. Here their operands are rounded to tf32's 10 bits of mantissa.
- Triton 3.6 turns arrays of one element into indices as numpy 2.4 no longer allows. Here as Triton 3.9 does.

Import it after TRITON_INTERPRET=1 is set and before a kernel runs. The suite keeps a canary for both.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, uint16."""
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).bfloat16()
    return values.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(x))


def widened(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32."""
    wide = np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def rounded_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 -> float32 with 10 bits of mantissa, ties away from zero; infinities and NaN stay."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x).astype(np.float32).reshape(np.shape(x))


def _patch() -> None:
    builder = interpreter.InterpreterBuilder
    convert, dot = interpreter._convert_float, builder.create_dot

    def convert_float(value, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return rounded_to_bfloat16(value if value.dtype == np.float32 else value.view(np.float32))
        if source == tl.bfloat16 and target == tl.float32:
            return widened(value).view(np.uint32)
        return convert(value, source, target, rounding)

    def operand(handle, precision):
        if handle.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(widened(handle.data), tl.float32)
        if handle.dtype.scalar == tl.float32 and str(precision).rpartition(".")[2] == "TF32":
            return interpreter.TensorHandle(rounded_to_tf32(handle.data), tl.float32)
        return handle

    def create_dot(self, a, b, d, precision, imprecise):
        return dot(self, operand(a, precision), operand(b, precision), d, precision, imprecise)

    interpreter._convert_float, builder.create_dot = convert_float, create_dot
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


_patch()
