"""Every setting of a run: frozen dataclasses with a sentence a field.

The defaults are the paper's (arXiv 2605.28109, section 5) wherever it names a value. What the paper leaves open is a
field too, with the reading we chose as default; `docs/method.md` gives the reasons. Each section is a module of
ibtpo/sections, named as in YAML and flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ibtpo.sections.advantage import AdvantageConfig
from ibtpo.sections.digits import DigitChainConfig
from ibtpo.sections.engine import EngineConfig
from ibtpo.sections.eval import EvalConfig
from ibtpo.sections.ib import IBConfig
from ibtpo.sections.jsonl import JsonlConfig
from ibtpo.sections.lora import LoRAConfig
from ibtpo.sections.loss import LossConfig
from ibtpo.sections.optim import OptimConfig
from ibtpo.sections.safeguards import SafeguardConfig
from ibtpo.sections.sampling import SamplingConfig
from ibtpo.sections.search import SearchConfig
from ibtpo.sections.warm_start import WarmStartConfig
from ibtpo.validation import as_path, check_choice, check_choices, check_range

__all__ = [
    "AdvantageConfig",
    "DigitChainConfig",
    "EngineConfig",
    "EvalConfig",
    "IBConfig",
    "JsonlConfig",
    "LoRAConfig",
    "LossConfig",
    "OptimConfig",
    "SafeguardConfig",
    "SamplingConfig",
    "SearchConfig",
    "TrainConfig",
    "WarmStartConfig",
]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    model: str = "built-in"
    """A Hugging Face checkpoint folder, a run folder (newest checkpoint), or "built-in": tiny, warm-started first."""
    task: str = "digit-chain"
    """digit-chain, jsonl (set by --data), or reasoning-gym:NAME."""
    data: Path | None = None
    """Prompts and answers: JSONL, Parquet, or a folder of datasets' save_to_disk; sets the task to jsonl."""
    layout: Literal["auto", "plain", "gsm8k", "math", "dapo", "aime", "boxed"] = "auto"
    """Form of the data file: which fields hold prompt and answer, and in what form; auto: the first rows decide."""
    reward: tuple[str, ...] = ()
    """NAME[:WEIGHT] ...: math, exact, format, regex=PATTERN, package.module:function; by default the task's own."""
    out: Path | None = None
    """Run folder to create; default: runs/<task>-<preset>-<date, time>. With `ibtpo eval`: for completions."""
    resume: Path | None = None
    """Folder of the run to continue from its last checkpoint."""
    seed: int = 0
    """Random seed of prompts, samples and initial weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the model computes in; master weights are float32 in either case."""
    parity: Literal["fast", "bitwise"] = "fast"
    """bitwise: the trainer computes the sampler's log-probs to the last bit; fast: up to rounding."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto uses a GPU if there is one."""
    distributed: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun. ddp: a full copy of the model in every process; fsdp: a shard in each; auto: ddp if that fits."""
    distributed_timeout: float = 1800.0
    """Seconds that the processes of a run wait for the slowest one; after that the run ends and names it."""
    sampled_tokens: int = 600_000
    """Training ends when this many tokens have been sampled."""
    prompts_per_step: int = 24
    """Prompts in a training step, each with one tree."""
    mini_batches: int = 2
    """Optimizer steps in a training step; the step's trees are divided among them."""
    micro_batch_tokens: int = 16_384
    """Largest number of packed tokens in one forward and backward; larger trees are split, with the same gradient."""
    gradient_checkpointing: bool = False
    """Recompute activations inside decoder layers in the backward pass: less memory, the same gradient."""
    checkpoint_every: int = 10
    """Training steps between checkpoints; one is always written at the end."""
    trees_per_step: int = 4
    """Trees of every training step that are kept, for `ibtpo view`."""
    trees_megabytes: float = 256.0
    """Megabytes of disk that the kept trees may take; beyond that, steps are dropped evenly over the run."""
    report_trees: int = 48
    """Number of the kept trees that the report holds, spread over the run."""
    log: str = ""
    """Further loggers: wandb, trackio or both (wandb,trackio); TensorBoard events are always written."""
    ib: IBConfig = field(default_factory=IBConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    jsonl: JsonlConfig = field(default_factory=JsonlConfig)
    digits: DigitChainConfig = field(default_factory=DigitChainConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    safeguards: SafeguardConfig = field(default_factory=SafeguardConfig)

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs under the frozen starting policy are asked for."""
        return self.loss.kl_coef > 0 or self.advantage.pi_ref == "reference"

    def __post_init__(self) -> None:
        check_choices(self)
        as_path(self.model, "model")
        if self.advantage.kind == "vineppo" and self.search.method != "vineppo":
            raise ValueError("advantage.kind: vineppo needs the rollouts of search.method=vineppo; set that too")
        if self.search.method == "treepo" and self.search.segment_tokens >= self.sampling.max_tokens:
            limit = f"sampling.max_tokens={self.sampling.max_tokens}"
            raise ValueError(f"search.segment_tokens: {self.search.segment_tokens} must be below {limit}; lower it")
        check_range("distributed_timeout", self.distributed_timeout, low=0.0, low_open=True)
        check_range("sampled_tokens", self.sampled_tokens, low=1)
        check_range("prompts_per_step", self.prompts_per_step, low=1)
        check_range("mini_batches", self.mini_batches, low=1, high=self.prompts_per_step)
        check_range("micro_batch_tokens", self.micro_batch_tokens, low=1)
        check_range("checkpoint_every", self.checkpoint_every, low=1)
        check_range("trees_per_step", self.trees_per_step, low=0)
        check_range("trees_megabytes", self.trees_megabytes, low=0.0, low_open=True)
        check_range("report_trees", self.report_trees, low=0)
        check_choice("log", self.log, ("", "wandb", "trackio", "wandb,trackio", "trackio,wandb"))
