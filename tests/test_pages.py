"""What the pages name is there: commands, flags, settings, files; and what is public stands on a page."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint

import ibtpo_engine
import ibtpo_kernels
from ibtpo.cli import COMMANDS
from ibtpo.commands.arguments import parse, parse_alone
from ibtpo.commands.completion import CompletionArguments
from ibtpo.commands.config import ConfigArguments
from ibtpo.commands.doctor import DoctorArguments
from ibtpo.commands.eval import EvalArguments
from ibtpo.commands.presets import PresetsArguments
from ibtpo.commands.sample import SampleArguments
from ibtpo.commands.study import StudyArguments
from ibtpo.commands.train import TrainArguments
from ibtpo.commands.view import ViewArguments
from ibtpo.config_reference import sections
from ibtpo.memory_plan import plan_memory
from ibtpo.presets import PRESETS
from ibtpo.studies.matrix import load_study, shipped_studies
from ibtpo_engine import Engine, ModelConfig, Sampling, load_model, load_tokenizer

ROOT = Path(__file__).parent.parent
OF_THE_PAST = ("CHANGELOG.md", "log.md")
PAGES = sorted(page for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if page.name not in OF_THE_PAST)
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
ALL = "\n".join(TEXTS.values())

OF_A_RUN = {"train": TrainArguments, "eval": EvalArguments, "sample": SampleArguments, "config": ConfigArguments}
ALONE = {
    "presets": PresetsArguments,
    "study": StudyArguments,
    "view": ViewArguments,
    "doctor": DoctorArguments,
    "completion": CompletionArguments,
}
SETTINGS = {field.name for section in sections() for field in section.fields}
FOLDERS = (".", "docs", "tests", "bench", "bench/results", "ibtpo")
FOLDERS += ("engine/ibtpo_engine", "kernels/ibtpo_kernels", "kernels/csrc")


def spans(text: str) -> list[str]:
    """What stands in backticks, code blocks aside."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def command_lines(text: str) -> list[str]:
    """`ibtpo ...` of code blocks, without comments, and of spans that go on behind the command's name."""
    blocks = "\n".join(re.findall(r"```.*?\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    lines = [line.partition("  #")[0] for line in blocks.splitlines()]
    lines = [line.partition("-m ")[2] if line.startswith("torchrun ") else line for line in lines]
    return [line.strip() for line in (*lines, *spans(text)) if re.match(r"ibtpo [a-z]+ +\S", line.strip())]


@pytest.mark.parametrize("page", [page for page in PAGES if command_lines(TEXTS[page])], ids=lambda page: page.name)
def test_the_commands_of_a_page_are_understood(page: Path) -> None:
    for line in command_lines(TEXTS[page]):
        words = shlex.split(re.sub(r" \.\.\.( |$)|[>|] .*$", " ", line).replace("$'\\n'", "'\n'"))
        command, arguments = words[1], words[2:]
        assert command in COMMANDS, line
        if command in OF_A_RUN:
            parse(OF_A_RUN[command], OF_A_RUN[command](), line, arguments)  # exits where a flag or value is unknown
        else:
            parse_alone(ALONE[command], line, arguments)


def test_every_flag_in_the_text_is_one_of_a_command_or_a_script() -> None:
    ours = {f"--{name}" for name in SETTINGS}
    ours |= {f"--{field.name}" for kind in (*OF_A_RUN.values(), *ALONE.values()) for field in fields(kind)}
    ours = {flag.replace("_", "-") for flag in ours}
    ours |= {flag.replace("--", "--no-", 1) for flag in ours} | {"--jsonl.no-chat-template", "--help"}
    sources = (*ROOT.glob("bench/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("kernels/ibtpo_kernels/roofline/*.py"))
    ours |= {flag for path in sources for flag in re.findall(r'"(--[a-z-]+)"', path.read_text(encoding="utf-8"))}
    others = {"--shutdown-timeout", "--nproc-per-node", "--nnodes", "--max-restarts", "--no-deps"}  # torchrun, pip,
    others |= {"--rdzv-endpoint", "--rdzv-conf", "--rdzv-backend", "--logdir"}  # tensorboard
    for page, text in TEXTS.items():
        for span in spans(text):
            named = re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9](?![\w-])", span)
            assert [flag for flag in named if flag not in ours | others] == [], (page.name, span)


def test_every_setting_in_the_text_exists() -> None:
    """`search.rounds`; but `engine.run` is a method, and `loss.py` a file."""
    groups = {name.partition(".")[0] for name in SETTINGS if "." in name}
    names = re.compile(rf"(?<![\w./-])({'|'.join(sorted(groups))})\.([a-z0-9_]+)")
    for page, text in TEXTS.items():
        for span in spans(text):
            for group, field in names.findall(span):
                known = f"{group}.{field}" in SETTINGS or (group == "engine" and hasattr(Engine, field))
                assert known or field == "py", (page.name, span)


def test_every_source_file_in_the_text_exists() -> None:
    for page, text in TEXTS.items():
        for span in spans(text):
            for path in re.findall(r"(?<![\w.*])[\w./-]+\.(?:py|cpp|h|sh|csv|md)(?!\w)", span):
                found = any((ROOT / folder / path).exists() for folder in FOLDERS)
                assert found or path in ("Python.h", "my_rewards.py"), (page.name, span)


@pytest.mark.parametrize("package", [ibtpo_engine, ibtpo_kernels], ids=lambda package: package.__name__)
def test_everything_public_stands_on_a_page(package: object) -> None:
    code = "\n".join([*spans(ALL), *re.findall(r"```python\n(.*?)```", ALL, flags=re.DOTALL)])
    words = set(re.findall(r"\w+", code))
    assert [name for name in package.__all__ if name not in words] == []  # type: ignore[attr-defined]


def test_every_command_flag_preset_and_study_stands_on_a_page() -> None:
    assert [name for name in COMMANDS if f"ibtpo {name}" not in ALL] == []
    for command, kind in (OF_A_RUN | ALONE).items():
        positional = {"study": {"name"}, "view": {"runs"}, "completion": {"shell"}}.get(command, set())
        names = [field.name.replace("_", "-") for field in fields(kind) if field.name not in {"run"} | positional]
        missing = [name for name in names if not re.search(rf"--(no-)?{name}\b", ALL)]
        assert missing == [], command
    assert [name for name in PRESETS if f"`{name}`" not in ALL] == []
    studies = TEXTS[ROOT / "docs" / "studies.md"]
    assert [name for name in shipped_studies() if f"`{name}`" not in studies] == []


def test_the_estimates_of_the_training_page_are_those_of_the_plan() -> None:
    """A row with a + changes what the row above it had."""
    shape = ModelConfig.from_dict(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "tie_word_embeddings": True,
        }
    )
    text = TEXTS[ROOT / "docs" / "training.md"].partition("## A 1.7B model on one GPU")[2]
    rows = re.findall(r"^\| (.+) \| (\S+) \| (\S+) \| (\S+) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 7
    flags: list[str] = []
    for name, *numbers in rows:
        own = shlex.split(" ".join(spans(name)))
        flags = [*flags, *own] if name.startswith("+") else own
        config = parse(TrainArguments, TrainArguments(), "ibtpo train", ["--dtype", "bfloat16", *flags]).run
        plan = plan_memory(config, shape, torch.device("cuda"), free=0)
        documented = [float(number.strip("*")) for number in numbers]
        assert [round(count / 2**30, 1) for count in plan.phases.values()] == documented, name


def test_the_study_of_the_page_can_be_loaded(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", TEXTS[ROOT / "docs" / "studies.md"], flags=re.DOTALL)
    path = tmp_path / "wider.yaml"
    path.write_text(text, encoding="utf-8")
    study = load_study(str(path))
    assert len(study.cells(range(2), prompts=8, changes={})) == 2 * len(study.variants) == 6


def test_the_programs_of_the_kernels_page_run() -> None:
    [program] = re.findall(r"```python\n(.*?)```", TEXTS[ROOT / "docs" / "kernels.md"], flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(program, names)
    shapes = {name: tuple(getattr(names[name], "shape", ())) for name in ("logprob", "entropy", "out")}
    assert shapes == {"logprob": (4,), "entropy": (7,), "out": (2, 8, 64)}


def test_the_programs_of_the_engine_page_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where an adapter is saved
    folder = save_checkpoint(tmp_path / "model", context=512)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompts = [tokenizer.encode(text) for text in ("7*8=?\n", "2+2=?\n")]
    engine = Engine(model)
    tree = engine.tree(prompts[0])
    engine.extend(tree.root.fork(3), Sampling(max_tokens=5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = {**vars(ibtpo_engine), **vars(ibtpo_kernels), "torch": torch, "optimizer": optimizer}
    names |= {"folder": str(folder), "model": model, "tokenizer": tokenizer, "prompts": prompts, "tree": tree}
    programs = re.findall(r"```python\n(.*?)```", TEXTS[ROOT / "docs" / "engine.md"], flags=re.DOTALL)
    for program in programs:
        ast.parse(program)
        if "Protocol" in program or "http://" in program:  # a declaration; a server that is not there
            continue
        if 'parity="bitwise"' in program and not ibtpo_kernels.has_compiled():  # refused there
            continue
        exec(program.replace("max_tokens=256", "max_tokens=8"), names)
    assert names["logprob"].shape == (15,)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
