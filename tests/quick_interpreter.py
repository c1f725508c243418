"""Triton's interpreter, faster (docs/log.md).

Whenever a function is called it looks through all of `triton.language` for what to replace, which takes longer than
most of what it interprets; and every value it makes describes its own type anew. Imported by `conftest.py` under
TRITON_INTERPRET=1, this lets it look once, and describe each shape once; results are the same.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def _builtins(place: ModuleType | type) -> list[tuple[str, Any]]:
    """(name, function) of what the interpreter replaces in a module or class; asked before it first does."""
    return [(name, member) for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]


def _patch_builtin(place: ModuleType | type, *how: Any) -> None:
    found = _builtins(place)
    if found and getattr(place, found[0][0]) is found[0][1]:  # otherwise all are replaced: a function called by another
        for name, member in found:
            interpreter._patch_attr(place, name, member, *how)


interpreter._patch_builtin = _patch_builtin

_patch_all = interpreter._patch_lang
_PATCHED: set[ModuleType] = set()
"""Modules that are patched while a kernel runs; it calls functions which would patch them again."""


@cache
def _modules(function: Any) -> list[ModuleType]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _patch_lang(function: Any) -> Any:
    if _PATCHED.issuperset(_modules(function)):
        return interpreter._LangPatchScope()
    scope = _patch_all(function)
    restore = scope.restore

    def restore_and_forget() -> None:
        restore()
        _PATCHED.clear()

    scope.restore = restore_and_forget
    _PATCHED.update(_modules(function))
    return scope


interpreter._patch_lang = _patch_lang

_np_dtype_of_scalar = cache(interpreter._get_np_dtype)


def _get_np_dtype(kind: Any) -> Any:
    scalar = kind.scalar
    return interpreter.np.dtype("uint64") if scalar.is_ptr() else _np_dtype_of_scalar(scalar)


interpreter._get_np_dtype = _get_np_dtype

_describe_block, _describe_value = tl.block_type.__init__, tl.tensor.__init__
_BLOCKS: dict[tuple[int, ...], tuple[Any, int, str]] = {}
_VALUES: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    if sizes not in _BLOCKS:
        _describe_block(self, element_ty, shape)
        _BLOCKS[sizes] = self.shape, self.numel, str(self.shape)
    self.element_ty = element_ty
    self.shape, self.numel, text = _BLOCKS[sizes]
    self.name = f"<{text}, {element_ty}>"


def _init_tensor(self: Any, handle: Any, kind: Any) -> None:
    sizes = tuple(kind.shape) if kind.is_block() else ()
    if sizes not in _VALUES:
        _describe_value(self, handle, kind)
        _VALUES[sizes] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = _VALUES[sizes]


tl.block_type.__init__ = _init_block_type
tl.tensor.__init__ = _init_tensor
