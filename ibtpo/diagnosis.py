"""What is installed, what works here, and what to do about the rest: the findings of ``ibtpo doctor``."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from ibtpo.environment import package_version
from ibtpo.printable import counted, one_line
from ibtpo_engine.memory import free_memory
from ibtpo_kernels import active_backend, backend, cpu, torch_is_slow
from ibtpo_kernels.dispatch import BACKENDS
from ibtpo_kernels.roofline.machine import available_cores, processor_name
from ibtpo_kernels.self_check import self_check, triton_lacks

Status = Literal["ok", "note", "slow", "broken"]
EXTRAS = ("gpu", "study", "gym", "data", "8bit")
LOGGERS = ("wandb", "trackio")
MODULES = {"pyyaml": "yaml"}  # modules whose name differs from their distribution's
LOW_DISK, LOW_MEMORY = 2e9, 2e9  # bytes; a checkpoint of a 0.5 B model with its optimizer takes more
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        group: packages, hardware, backends, kernels or space.
        name: of the package, device, kernel or folder.
        status: ok; note: optional and missing; slow: works, but slowly; broken: a run would fail.
        text: the finding and its remedy.
    """

    group: str
    name: str
    status: Status
    text: str


def examine(*, kernels: bool = True) -> Iterator[Finding]:
    """All findings in the order of the report; a check that raises is itself a finding."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", _packages),
        ("hardware", _processor),
        ("hardware", _gpu),
        ("backends", _backends),
    ]
    checks += [("kernels", _kernels)] if kernels else []
    for group, check in [*checks, ("space", _space)]:
        try:
            yield from check()
        except Exception as error:
            yield Finding(group, group, "broken", f"could not be examined: {type(error).__name__}: {error}")


# ---- packages ----------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    yield Finding("packages", "python", "ok", platform.python_version())
    try:
        yield Finding("packages", "ibtpo", "ok", importlib.metadata.version("ibtpo"))
        needed = [Requirement(line) for line in importlib.metadata.requires("ibtpo") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "ibtpo", "note", "runs from its sources, not installed; packages are not checked")
        return
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _needed(requirement)
    for extra in EXTRAS:
        for requirement in needed:
            marker = requirement.marker
            if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                yield _optional(requirement.name, f"pip install 'ibtpo[{extra}]'", requirement)
    for name in LOGGERS:
        yield _optional(name, f"pip install {name}, for --log {name}")


def _needed(requirement: Requirement) -> Finding:
    name = requirement.name
    remedy = f"pip install '{name}{requirement.specifier}'"
    version = package_version(name)
    if version is None:
        return Finding("packages", name, "broken", f"not installed; {remedy}")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("packages", name, "broken", f"{version}, but {requirement.specifier} is needed; {remedy}")
    try:
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:
        return Finding("packages", name, "broken", f"{version} cannot be imported ({one_line(error)}); {remedy}")
    return Finding("packages", name, "ok", version)


def _optional(name: str, remedy: str, requirement: Requirement | None = None) -> Finding:
    version = package_version(name)
    if version is None:
        return Finding("packages", name, "note", f"not installed (optional: {remedy})")
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        return Finding("packages", name, "note", f"{version}, but {requirement.specifier} is needed ({remedy})")
    return Finding("packages", name, "ok", version)


# ---- hardware and kernels ----------------------------------------------------------------------------------------


def _processor() -> Iterator[Finding]:
    cores, threads = counted(available_cores(), "core"), counted(torch.get_num_threads(), "thread")
    yield Finding("hardware", "processor", "ok", f"{processor_name()}; {cores}, {threads}")
    if cpu.native is not None:
        slow = torch_is_slow(torch.empty(0, dtype=torch.bfloat16))
        half = "; no instructions for products of bfloat16" if slow else ""
        yield Finding("hardware", "compiled kernels", "ok", f"instruction set {cpu.native.isa()}{half}")
        return
    remedy = "install ibtpo with a C++17 compiler at hand (make setup, without IBTPO_NO_COMPILE)"
    if find_spec("ibtpo_kernels._cpu") is None:
        text = f"the compiled module is missing, so ops run on plain torch; {remedy}"
        yield Finding("hardware", "compiled kernels", "slow", text)
        return
    try:
        importlib.import_module("ibtpo_kernels._cpu")
        why = "it loads now, but did not when the package was imported"
    except ImportError as error:
        why = one_line(error)
    yield Finding("hardware", "compiled kernels", "broken", f"the compiled module does not load ({why}); {remedy}")


def _gpu() -> Iterator[Finding]:
    has_driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            free, total = torch.cuda.mem_get_info(index)
            text = (
                f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {free / GB:.1f} of {total / GB:.1f} GB free"
            )
            yield Finding("hardware", f"cuda:{index}", "ok", text)
        if active_backend("cuda") == "triton" and (lack := triton_lacks()):
            yield Finding("hardware", "for triton", "broken", lack)
    elif torch.version.cuda is None:
        status: Status = "slow" if has_driver else "note"
        text = f"none: this torch ({torch.__version__}) is built without CUDA"
        yield Finding("hardware", "gpu", status, text + ("; install the CUDA build of torch" if has_driver else ""))
    elif not has_driver:
        yield Finding("hardware", "gpu", "note", "none: there is no NVIDIA driver here")
    else:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            why = "torch sees no device; is CUDA_VISIBLE_DEVICES empty?"
        except Exception as error:
            why = one_line(error)
        text = f"there is a driver, but torch (CUDA {torch.version.cuda}) cannot use it: {why}"
        yield Finding("hardware", "gpu", "slow", text)


def _backends() -> Iterator[Finding]:
    for name in BACKENDS:
        try:
            with backend(name):
                pass
        except ValueError as error:  # its message names what is missing
            yield Finding("backends", name, "note", one_line(error).removeprefix(f"backend '{name}': "))
        except Exception as error:
            yield Finding("backends", name, "broken", f"{type(error).__name__}: {one_line(error)}")
        else:
            yield Finding("backends", name, "ok", "works")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        chosen = active_backend(device)
        status: Status = "slow" if chosen == "reference" else "ok"
        yield Finding("backends", f"on {device}", status, f"{chosen} runs the ops")


def _kernels() -> Iterator[Finding]:
    checked = 0
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        name = active_backend(device)
        if name == "reference":
            continue
        for check in self_check(name, device):
            checked += 1
            text = f"{check.dtype}, {name}: "
            text += (
                f"failed: {check.failure}"
                if check.failure
                else f"error {check.error:.1e} (at most {check.tolerance:g})"
            )
            yield Finding("kernels", check.op, "ok" if check.is_ok else "broken", text)
    if not checked:
        yield Finding(
            "kernels", "all", "slow", "ops run on the plain torch reference itself; there is nothing to compare"
        )


# ---- space -------------------------------------------------------------------------------------------------------


def _space() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = free_memory(torch.device("cpu"))
    yield _room("memory", free, total, LOW_MEMORY, "close something, or lower engine.kv_tokens")
    usage = shutil.disk_usage(Path.cwd())
    yield _room("disk, here", usage.free, usage.total, LOW_DISK, "free some, or put runs elsewhere with --out")


def _room(name: str, free: float, total: float, low: float, remedy: str) -> Finding:
    text = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    return Finding("space", name, "ok" if free >= low else "slow", text if free >= low else f"{text}; {remedy}")
