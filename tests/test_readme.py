"""What the README and the examples show runs as it stands."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from ibtpo.config import DigitChainConfig
from ibtpo.policy import built_in_policy
from ibtpo.tasks.digit_chain import END, parse_prompt, right_solution

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


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


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_anchor_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^):\s]+)\)", page.read_text(encoding="utf-8"))
    for path, _, anchor in (link.partition("#") for link in links):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), anchor


def test_the_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"](docs/{page.name})" not in readme] == []


def test_the_rows_to_start_with_are_right_and_of_a_length_that_the_policy_knows():
    """With other prompts or answers the built-in policy gets no reward, and nothing is trained."""
    page = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in re.findall(r"^{.*}$", page, flags=re.MULTILINE)]
    lengths = DigitChainConfig()
    assert len(rows) > 4
    for row in rows:
        problem = parse_prompt(row["prompt"])
        assert right_solution(problem).splitlines()[-1] == row["answer"] + END
        assert lengths.min_ops <= len(re.findall(r"[-+*]", row["prompt"])) <= lengths.max_ops


def test_the_best_first_example_prints_a_completion_a_prompt(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["best_first_search.py", str(checkpoint), "7*8=?\n", "1+2-3=?\n"])
    runpy.run_path(str(ROOT / "examples" / "best_first_search.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "'7*8=?\\n': best of 12" in out
    assert "'1+2-3=?\\n': best of 12" in out
