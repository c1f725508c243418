"""Install the extra `bench`, what the benchmarks compare with, one by one; what is not to be had is left out."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Never fails: a peer that is missing is listed as missing by the benchmarks."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["optional-dependencies"]["bench"]:
        command = [sys.executable, "-m", "pip", "install", "--quiet", requirement]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            print(f"[peers] {requirement} could not be installed; it will be listed as missing")


if __name__ == "__main__":
    main()
