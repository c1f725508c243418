"""What the README and the examples show runs as it stands."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from ibtpo.policy import built_in_policy

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    built_in_policy(0, dtype=torch.float32, device=torch.device("cpu")).save(folder)
    return folder


def test_the_readme_blocks_run_in_order(checkpoint, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks).replace("path/to/checkpoint", str(checkpoint)), {})
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"6 trajectories in \d+ unique tokens", lines[0])
    assert sorted(line.split()[0] for line in lines[1:]) == ["0", "1"]
    assert all(line.split()[1] == "12" for line in lines[1:])


def test_every_path_the_readme_links_to_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_best_first_example_prints_a_completion_a_prompt(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["best_first_search.py", str(checkpoint), "7*8=?\n", "1+2-3=?\n"])
    runpy.run_path(str(ROOT / "examples" / "best_first_search.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "'7*8=?\\n': best of 12" in out
    assert "'1+2-3=?\\n': best of 12" in out
