"""Puts the kernels built by scripts/sanitize.sh in place of the installed ones; a pytest plugin (`-p sanitized`).

As a program it makes an access past the end of a tensor, which the sanitizer must stop, or lists instruction sets.
"""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
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
        names = ("baseline", "v3", "v4", "v4bf16", "neon")
        print(*(name for name in names if native.use_isa(name)))
        return
    x = torch.zeros(37)
    native.row_stats(x.data_ptr(), torch.zeros(8).data_ptr(), 1, 38)


if __name__ == "__main__":
    main()
