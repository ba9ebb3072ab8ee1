"""Triton's interpreter, nearer to a GPU: its loops count, and products of matrices do not depend on where rows stand.

It has a loop's bounds as arrays of one element, which are no ints to NumPy 2.4. And it leaves products to NumPy, which
may compute a matrix's last rows in another order than its first ones.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_and_count(tensor: type, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot(_: Any, a: Any, b: Any, start: Any, _precision: Any, _imprecise: Any) -> Any:
    total = start.data.copy()
    left, right = a.data.astype(total.dtype), b.data.astype(total.dtype)
    for i in range(left.shape[1]):
        total += left[:, i : i + 1] * right[i]
    return interpreter.TensorHandle(total, start.dtype.scalar)


def improve() -> None:
    """For good; kernels that a GPU runs do not notice."""
    interpreter._patch_lang_tensor = _patch_and_count
    interpreter.InterpreterBuilder.create_dot = _dot
