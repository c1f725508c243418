"""The shape of a dense Qwen3, Qwen2/2.5, Llama or Mistral model, from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ibtpo_engine.errors import CheckpointError

ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base frequency and how positions are stretched.

    Attributes:
        theta: base of the frequencies.
        kind: "default" stretches nothing, "linear" every wavelength by `factor`, "llama3" and "yarn" only long ones.
        factor: by which wavelengths are stretched.
        low_freq_factor, high_freq_factor: llama3: waves with fewer turns within the original context than the first
            are stretched, those with more than the second kept.
        beta_slow, beta_fast: yarn: the same two bounds.
        truncate: yarn: are the bounds rounded outwards, to whole frequency indices?
        original_positions: llama3, yarn: the original context, in tokens.
        attention_factor: yarn: factor of rotated queries and keys.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    truncate: bool = True
    original_positions: int = 8192
    attention_factor: float = 1.0

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """float32 [head_dim / 2], radians a position, highest frequency first."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        inverse = 1.0 / (self.theta**exponent)
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        if self.kind == "yarn":
            return self._yarn(inverse, head_dim)
        return inverse

    def _llama3(self, inverse: torch.Tensor) -> torch.Tensor:
        """Llama 3.1: long waves are stretched by `factor`, short ones kept, the band between is interpolated."""
        turns = self.original_positions * inverse / (2 * math.pi)  # full turns within the original context
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return keep * inverse + (1.0 - keep) * inverse / self.factor

    def _yarn(self, inverse: torch.Tensor, head_dim: int) -> torch.Tensor:
        """YaRN (Peng et al., arXiv 2309.00071): as Llama 3.1 does, but interpolated along the frequencies' indices."""

        def index(turns: float) -> float:
            """The fractional index of the wave that makes so many turns within the original context."""
            return head_dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0.0  # avoids dividing by 0, as in `transformers`
        stretch = ((torch.arange(len(inverse), dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
        return (1.0 - stretch) * inverse + stretch * inverse / self.factor


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a dense decoder.

    Attributes:
        vocab_size, hidden_size, intermediate_size: V, H, and the width inside an MLP.
        num_layers, num_heads, num_kv_heads, head_dim: decoder layers; Hq, Hkv, D of their attention.
        max_positions: longest path in tokens; with yarn at least `factor` times the original context.
        rms_eps: added under the root of every norm.
        tie_embeddings: is the head the embedding?
        qkv_bias, out_bias, mlp_bias: which projections have biases.
        rope: the rotary embedding.
        raw: the original JSON, so that saving loses nothing.
    """

    architecture: Literal["qwen3", "qwen2", "llama", "mistral"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rope: RopeConfig
    raw: dict[str, Any] = field(repr=False)

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises queries and keys per head."""
        return self.architecture == "qwen3"

    @classmethod
    def from_folder(cls, folder: Path | str) -> ModelConfig:
        """Read ``config.json``.

        Raises:
            CheckpointError: the file is missing, not JSON, or describes a model we do not run.
        """
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: not found. A model folder holds config.json, *.safetensors and the tokenizer's files."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}). Download the file again.") from None
        return cls.from_dict(raw, source=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, source: str = "config") -> ModelConfig:
        """The same from the parsed JSON.

        Args:
            raw: what config.json holds.
            source: its origin, for messages.

        Raises:
            CheckpointError: a field is missing or wrong, or it describes a model we do not run.
        """
        if not isinstance(raw, dict):
            raise CheckpointError(f"{source}: holds a {type(raw).__name__}, not an object. Download the file again.")
        names, kind = raw.get("architectures"), str(raw.get("model_type"))
        by_kind = {kind: name for name, kind in ARCHITECTURES.items()}
        name = names[0] if names else by_kind.get(kind, kind)  # as `transformers` falls back to the type
        architecture = ARCHITECTURES.get(name)
        if architecture is None:
            raise CheckpointError(
                f"{source}: architecture {name!r} is not supported, only dense {', '.join(ARCHITECTURES)} are."
            )
        _refuse_unsupported(raw, architecture, source)

        def size(name: str, default: int | None = None) -> int:
            value = int(_number(raw, name, default, source))
            if value < 1:
                raise CheckpointError(f"{source}: {name} = {value} must be at least 1.")
            return value

        hidden_size, num_heads, rope = size("hidden_size"), size("num_attention_heads"), _rope(raw, source)
        stretched = int(rope.factor * rope.original_positions) if rope.kind == "yarn" else 0  # cards leave the maximum
        bias = architecture != "mistral" and bool(raw.get("attention_bias", False))
        config = cls(
            architecture=architecture,  # type: ignore[arg-type]
            vocab_size=size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=size("intermediate_size"),
            num_layers=size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=size("num_key_value_heads", num_heads),
            head_dim=size("head_dim", 128 if architecture == "qwen3" else hidden_size // num_heads),
            max_positions=max(size("max_position_embeddings", 32_768), stretched),
            rms_eps=_number(raw, "rms_norm_eps", 1e-6, source),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "qwen2" or bias,
            out_bias=architecture != "qwen2" and bias,
            mlp_bias=architecture == "llama" and bool(raw.get("mlp_bias", False)),
            rope=rope,
            raw={"model_type": architecture} | raw,  # `transformers` needs it to load what is saved
        )
        config._validate(source)
        return config

    def _validate(self, source: str) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{source}: {self.num_heads} attention heads are not a multiple of {self.num_kv_heads} key-value heads."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise CheckpointError(f"{source}: head_dim {self.head_dim} must be even for rotary embeddings.")


def _refuse_unsupported(raw: dict[str, Any], architecture: str, source: str) -> None:
    """Raise for features whose neglect would silently give wrong results."""
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; only 'silu' is.")
    if raw.get("is_causal") is False:
        raise CheckpointError(f"{source}: is_causal = false (an embedding model) is not supported; use a decoder.")
    if _is_windowed(raw, architecture, source):
        raise CheckpointError(
            f"{source}: sliding-window attention is not supported; every layer must see the whole path "
            '(in a config.json of Mistral: "sliding_window": null).'
        )
    if raw.get("quantization_config"):
        raise CheckpointError(f"{source}: quantized weights are not supported; use the bf16 or fp32 checkpoint.")


def _is_windowed(raw: dict[str, Any], architecture: str, source: str) -> bool:
    """Does any layer use a sliding window? Reads the fields as `transformers` does, with its defaults."""
    has_window = raw.get("sliding_window", 4096) is not None
    if architecture == "mistral":
        return has_window
    if types := raw.get("layer_types"):
        return set(types) != {"full_attention"}
    first = _number(raw, "max_window_layers", 28, source)
    has_any = has_window and bool(raw.get("use_sliding_window"))
    return has_any and first < _number(raw, "num_hidden_layers", None, source)


def _number(fields: dict[str, Any], name: str, default: float | None, source: str) -> float:
    """A field of the JSON; null counts as absent."""
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{source}: field {name!r} is missing.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{source}: {name} = {value!r} must be a number.")
    return value


def _rope(raw: dict[str, Any], source: str) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (before)."""
    settings: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = raw.get(name) or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"{source}: {name} = {raw[name]!r} must be an object.")
        if "type" in given:  # the older spelling of the older field
            given = {"rope_type": given["type"]} | given
        if any(settings.get(field, value) != value for field, value in given.items()):
            raise CheckpointError(
                f"{source}: rope_scaling and rope_parameters contradict each other. Put what is meant into "
                'rope_parameters, "rope_theta" included, and remove rope_scaling (transformers would go by it alone).'
            )
        settings |= given
    if nested := [name for name, value in settings.items() if isinstance(value, dict)]:
        raise CheckpointError(f"{source}: rope settings of their own for {nested} are not supported.")
    kind = settings.get("rope_type", "default")
    settings.setdefault("rope_theta", raw.get("rope_theta"))
    settings.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise CheckpointError(
            f"{source}: rope type {kind!r} is not supported, only default, linear, llama3, yarn. If it was added to "
            "reach contexts longer than the model was trained on, remove it."
        )
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError(
            f"{source}: partial_rotary_factor = {settings['partial_rotary_factor']!r} is not supported; "
            "whole heads are rotated."
        )
    if raw.get("original_max_position_embeddings") is not None:  # where transformers 5 looks first
        settings["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    needs: dict[str, tuple[str, ...]] = {  # transformers has no defaults for these either
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings"),
    }
    for name in needs.get(kind, ()):
        _number(settings, name, None, f"{source}: rope type {kind!r}")

    def positive(name: str, default: float) -> float:
        value = _number(settings, name, default, source)
        if not value > 0:
            raise CheckpointError(f"{source}: {name} = {value} must be above 0.")
        return value

    factor = positive("factor", 1.0)
    length = positive("attention_factor", _yarn_length(settings, factor, source)) if kind == "yarn" else 1.0
    return RopeConfig(
        theta=positive("rope_theta", 10_000.0),
        kind=kind,
        factor=factor,
        low_freq_factor=positive("low_freq_factor", 1.0),
        high_freq_factor=positive("high_freq_factor", 4.0),
        beta_slow=positive("beta_slow", 1.0),
        beta_fast=positive("beta_fast", 32.0),
        truncate=bool(settings.get("truncate", True)),
        original_positions=int(positive("original_max_position_embeddings", 8192)),
        attention_factor=length,
    )


def _yarn_length(settings: dict[str, Any], factor: float, source: str) -> float:
    """YaRN's factor of rotated queries and keys, if the settings give no attention_factor."""
    above, below = (_number(settings, name, 0.0, source) for name in ("mscale", "mscale_all_dim"))
    if not (above and below):  # one without the other is ignored
        above, below = 1.0, 0.0
    grown = 0.1 * math.log(max(factor, 1.0))
    return (above * grown + 1.0) / (below * grown + 1.0)
