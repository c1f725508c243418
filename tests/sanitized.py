"""Puts the kernels built by scripts/sanitize.sh in place of the installed ones; a pytest plugin (`-p sanitized`).

As a program it reads past the end of a tensor, which the sanitizer must stop, or lists the instruction sets (--isas).
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch  # first: the kernels use its OpenMP runtime


def load() -> Any:
    """The checked module, as `ibtpo_kernels._cpu`, on the instruction set asked for."""
    name = "ibtpo_kernels._cpu"
    spec = spec_from_file_location(name, os.environ["IBTPO_CHECKED"])
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    isa = os.environ.get("IBTPO_CHECKED_ISA")
    if isa and not module.use_isa(isa):
        sys.exit(f"instruction set {isa!r} was not built or does not run here")
    return module


native = load()


def pytest_report_header() -> str:
    from ibtpo_kernels import cpu

    assert cpu.native is native
    return f"checked kernels: {os.environ['IBTPO_CHECKED']}, {native.isa()}"


def main() -> None:
    if sys.argv[1:] == ["--isas"]:
        names = ("baseline", "v3", "v4", "v4bf16", "v4amx", "neon")
        print(*(name for name in names if native.use_isa(name)))
        return
    code = Path(os.environ["IBTPO_CHECKED"]).read_bytes()
    if b"__asan_report_" not in code or b"__ubsan_handle_" not in code:
        sys.exit("the module was built without checks")
    x = torch.zeros(37)
    ctypes.memmove(torch.zeros(1).data_ptr(), x.data_ptr() + x.nbytes, 4)


if __name__ == "__main__":
    main()
