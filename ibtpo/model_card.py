"""The model card of a checkpoint: README.md with YAML front matter, as the Hugging Face Hub reads it.

It contains no times, and no paths except those of the base model and the data: the same run writes the same card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ibtpo.config import TrainConfig
from ibtpo.config_io import flat, plain, to_yaml
from ibtpo.environment import package_version
from ibtpo.policy import Policy, base_folder
from ibtpo.presets import PRESETS
from ibtpo.printable import counted
from ibtpo.sections.jsonl import parse_options
from ibtpo_engine.adapter_folder import is_adapter_folder

CARD = "README.md"

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer({prompt}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```

vLLM: `vllm serve FOLDER`. `ibtpo eval --model FOLDER` measures it as it was trained.
"""
_LOAD_ADAPTER = """These are LoRA adapters; the base model is needed too.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder)  # .merge_and_unload() makes it a plain model
```

vLLM: `vllm serve BASE --enable-lora --lora-modules trained=FOLDER`.
"""


def model_card(
    config: TrainConfig,
    *,
    step: int,
    sampled_tokens: int,
    rows: Iterable[Mapping[str, Any]],
    chat: bool = False,
    adapters: bool = False,
) -> str:
    """The text of a checkpoint's README.md.

    Args:
        config: the run.
        step: training steps taken.
        sampled_tokens: tokens sampled for them.
        rows: rows of the run's log; the evaluations up to `step` are shown.
        chat: does the tokenizer have a chat template?
        adapters: does the checkpoint hold adapters instead of a whole model?
    """
    header: dict[str, Any] = {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reinforcement-learning", "ibtpo", config.advantage.kind],
    }
    began_with_adapters = is_adapter_folder(config.model)
    model = base_folder(config.model) if began_with_adapters else config.model
    if (base := _hub_name(model)) is not None:
        header["base_model"] = base
    title = f"{counted(step, 'step')} of {config.advantage.kind}" if step else "Before training"
    facts = {
        "base model": model if base is None else base,
        **({"adapters it began with": config.model} if began_with_adapters else {}),
        "method": method(config),
        "data": str(config.data or config.task),
        "rewards": ", ".join(config.reward) or "the task's own",
        "training steps": f"{step:,}",
        "sampled tokens": f"{sampled_tokens:,} of {config.sampled_tokens:,}",
        "seed": str(config.seed),
        "made by": f"ibtpo {package_version('ibtpo')}",
    }
    lines = ["---", to_yaml(header).rstrip(), "---", "", f"# {title}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_in_cell(value)} |" for name, value in facts.items()]
    lines += ["", "## Held-out accuracy", "", *_accuracy(row for row in rows if row["step"] <= step), ""]
    operations = "7*8-5+3*9+4-2*6+8"[: 2 * config.digits.min_ops + 1]  # as many as in the shortest training prompts
    prompt = f'"{operations}=?\\n"' if config.model == "built-in" else '"..."'
    if chat:
        message = 'tokenizer.apply_chat_template([{"role": "user", "content": "..."}]'
        options = parse_options(config.jsonl.chat_template_options)
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        prompt = f"{message}, add_generation_prompt=True, tokenize=False{given})"
    load = _LOAD_ADAPTER if adapters else _LOAD.format(prompt=prompt)
    lines += ["## Loading it", "", load, "## Settings", "", "```yaml", _settings(config), "```"]
    return "\n".join(lines) + "\n"


def method(config: TrainConfig) -> str:
    """Advantage and sampler, and the preset with these settings, if there is one."""
    text = f"{config.advantage.kind} advantages on {config.search.method} samples"
    fitting = [name for name, changes in PRESETS.items() if _agrees(config, changes)]
    if not fitting:
        return text
    return f"{text} (preset {max(fitting, key=lambda name: len(flat(PRESETS[name])))})"  # the most specific one


def save_generation_config(policy: Policy, config: TrainConfig, folder: Path) -> None:
    """Write generation_config.json: stop tokens, and the sampling settings of training."""
    sampling = config.sampling
    GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p or None,
        bos_token_id=policy.tokenizer.bos_token_id,
        eos_token_id=list(policy.stops),
        pad_token_id=policy.tokenizer.pad_token_id,
    ).save_pretrained(folder)


def _in_cell(text: str) -> str:
    """Escape a text for a table cell: a reward's pattern or a path may contain ``|`` or a newline."""
    return " ".join(text.replace("|", "\\|").split())


def _accuracy(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    evaluations = [row for row in rows if row.get("eval_avg") is not None]
    if not evaluations:
        return ["Not measured yet."]
    prompts, k = size = _prompts_and_samples(evaluations[-1])
    lines = [f"{prompts} held-out prompts, {k} independent samples each; 95 % intervals over prompts.", ""]
    lines += [f"| step | avg@{k} | pass@{k} | greedy |", "|---|---|---|---|"]
    names = ("eval_avg", "eval_pass", "eval_greedy")
    for row in evaluations:
        others = _prompts_and_samples(row)  # a resumed run may use others
        step = str(row["step"]) + ("" if others == size else f" ({others[0]} prompts, k = {others[1]})")
        lines.append(f"| {step} | {' | '.join(_interval(row, name) for name in names)} |")
    return lines


def _prompts_and_samples(row: Mapping[str, Any]) -> tuple[int, int]:
    return int(row["eval_prompts"]), int(row["eval_samples"])


def _interval(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} – {row[f'{name}_high']:.3f})"


def _settings(config: TrainConfig) -> str:
    """The settings that differ from the defaults."""
    return to_yaml(_changed(config, TrainConfig()) or {}).rstrip()


def _changed(config: Any, default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, before in vars(default).items():
        now = getattr(config, name)
        if now == before or name in ("out", "resume"):
            continue
        found[name] = _changed(now, before) if hasattr(before, "__dataclass_fields__") else plain(now)
    return found


def _agrees(config: Any, changes: Mapping[str, Any]) -> bool:
    return all(
        _agrees(getattr(config, name), value) if isinstance(value, Mapping) else plain(getattr(config, name)) == value
        for name, value in changes.items()
    )


def _hub_name(model: str) -> str | None:
    """The Hub name recorded in a checkpoint folder, or None."""
    try:
        name = json.loads((Path(model) / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    is_name = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/")) and name[-1] != "/"
    return name if is_name and not Path(name).exists() else None
