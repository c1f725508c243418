"""The one model definition: the trainer runs it on packed trees, the engine on paged KV.

Shapes: N packed tokens, H hidden size, Hq/Hkv query/key-value heads, D head size, V vocabulary.
Parameter names are Hugging Face's, so a checkpoint loads by name and the engine borrows the trainer's parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibtpo_engine.lora import Adapters, LoRA, adapt_layers
from ibtpo_engine.model_config import ModelConfig
from ibtpo_engine.pages import PAGE
from ibtpo_engine.parity import PackedAttend, Parity, Project, by_depth, check_parity, plain_project, project_for
from ibtpo_kernels import rms_norm, rope, silu_mul, tree_attention
from ibtpo_kernels.dispatch import same_choice


class Attend(Protocol):
    """How one layer's queries find their keys; see `PackedAttention` and the engine's paged one."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, norms: QKNorm | None) -> Tensor:
        """[N,Hq,D], [N,Hkv,D], [N,Hkv,D], all before norm and rotation -> [N,Hq,D]."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class QKNorm(Protocol):
    """The two per-head norms of a Qwen3 attention layer."""

    q_norm: RMSNorm
    k_norm: RMSNorm

    @property
    def qk_norm(self) -> tuple[Tensor, Tensor, float]:
        """Weights [D] of the queries' and the keys' norm, and their eps."""


class PackedAttention:
    """Tree attention in a packed forest: query i sees key j <=> j <= i < end[j]; `attend` replaces the fast kernel."""

    def __init__(self, end: Tensor, cos: Tensor, sin: Tensor, attend: PackedAttend | None = None) -> None:
        self.attend = attend or (lambda q, k, v: tree_attention(q, k, v, end))
        self.cos = cos
        self.sin = sin

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, norms: QKNorm | None) -> Tensor:
        if norms is not None:
            q, k = norms.q_norm(q), norms.k_norm(k)
        return self.attend(rope(q, self.cos, self.sin), rope(k, self.cos, self.sin), v)


class Attention(nn.Module):
    """Grouped-query self-attention; the caller's `attend` decides which keys a query sees."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.out_bias)
        self.has_norms = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_eps)

    @property
    def qk_norm(self) -> tuple[Tensor, Tensor, float]:
        """Weights [D] of the queries' and the keys' norm, and their eps; only if `has_norms`."""
        return self.q_norm.weight, self.k_norm.weight, self.q_norm.eps

    def forward(self, x_NH: Tensor, attend: Attend, project: Project = plain_project) -> Tensor:
        q, k, v = (
            projected.reshape(len(x_NH), projected.shape[-1] // self.head_dim, self.head_dim)
            for projected in (project(layer, x_NH) for layer in (self.q_proj, self.k_proj, self.v_proj))
        )
        return project(self.o_proj, attend(self.layer, q, k, v, self if self.has_norms else None).flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, size, bias=config.mlp_bias)

    def forward(self, x_NH: Tensor, project: Project = plain_project) -> Tensor:
        return project(self.down_proj, silu_mul(project(self.gate_proj, x_NH), project(self.up_proj, x_NH)))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mlp = MLP(config)

    def forward(self, x_NH: Tensor, attend: Attend, project: Project = plain_project) -> Tensor:
        x_NH = x_NH + self.self_attn(self.input_layernorm(x_NH), attend, project)
        out: Tensor = x_NH + self.mlp(self.post_attention_layernorm(x_NH), project)
        return out


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)


class Model(nn.Module):
    """A dense Qwen3, Qwen2/2.5, Llama or Mistral decoder.

    Args:
        config: its shape; parameters are created on torch's current default device and dtype.

    Attributes:
        adapters: those that `add_adapters` put on it, or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._frequencies: Tensor | None = None
        self.adapters: Adapters | None = None

    @property
    def head(self) -> Tensor:
        """[V, H], the matrix that turns hidden states into logits."""
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type."""
        return self.model.norm.weight.dtype

    def rotation(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Positions int [N] -> (cos, sin), each [N, D/2]: float32, or float64 for a float64 model.

        With yarn both are multiplied by its attention factor.
        """
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self._frequencies is None or self._frequencies.device != pos.device or self._frequencies.dtype != wide:
            frequencies = self.config.rope.inverse_frequencies(self.config.head_dim)
            self._frequencies = frequencies.to(device=pos.device, dtype=wide)
        angles = pos.to(wide)[:, None] * self._frequencies
        cos, sin, factor = angles.cos(), angles.sin(), self.config.rope.attention_factor
        return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)

    def forward(
        self, tokens: Tensor, attend: Attend, project: Project = plain_project, checkpointing: bool = False
    ) -> Tensor:
        """int64 [N] -> hidden states after the final norm, [N, H]; `project` runs every linear layer but the head."""
        x_NH = F.embedding(tokens, self.model.embed_tokens.weight)
        for block in self.model.layers:
            if checkpointing:  # a block draws no random numbers, so no state to preserve
                x_NH = checkpoint(
                    block, x_NH, attend, project, use_reentrant=False, preserve_rng_state=False, context_fn=_as_now
                )
            else:
                x_NH = block(x_NH, attend, project)
        out: Tensor = self.model.norm(x_NH)
        return out

    def packed(
        self, tokens: Tensor, pos: Tensor, end: Tensor, *, parity: Parity = "fast", checkpointing: bool = False
    ) -> Tensor:
        """Training forward over a packed forest, differentiable.

        Args:
            tokens: int64 [N], trees in depth-first pre-order.
            pos: int [N], depth of each token on its path.
            end: int32 [N], exclusive end of each token's subtree.
            parity: "bitwise" gives the bits of an `Engine(parity="bitwise")`, whether it prefilled or decoded a row.
            checkpointing: keep only the input of each block, and run the block again in the backward pass; the
                gradients are the same.

        Returns:
            Hidden states after the final norm, [N, H].

        Raises:
            ValueError: `parity` is unknown, or cannot be kept with this model, type or device.
        """
        check_parity(parity, dtype=self.dtype, device=self.device)
        attend = by_depth(end, page_size=PAGE) if parity == "bitwise" else None
        attention = PackedAttention(end, *self.rotation(pos), attend)
        hidden: Tensor = self(tokens, attention, project_for(parity), checkpointing)
        return hidden

    def add_adapters(self, config: LoRA, *, seed: int = 0) -> None:
        """Put low-rank adapters beside the projections and freeze everything else; the output does not change yet.

        Make engines and optimizers afterwards.

        Args:
            config: rank, weight and places.
            seed: decides the initial A of each; B is 0.

        Raises:
            ValueError: it has adapters already.
        """
        if self.adapters is not None:
            raise ValueError(f"this model has adapters already ({self.adapters.config}); load it anew for others")
        self.adapters = Adapters(config)
        adapt_layers(self, self.adapters, seed)

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The model without its adapters, the policy they started from, until the block ends; no effect without any."""
        if self.adapters is None:
            yield
            return
        before, self.adapters.on = self.adapters.on, False
        try:
            yield
        finally:
            self.adapters.on = before


def _as_now() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's forward pass and of its recomputation, which uses the same backend."""
    return nullcontext(), same_choice()


def initialise(model: Model, seed: int) -> Model:
    """New weights: matrices and embeddings normal with deviation 0.02, norms 1, biases 0; reproducible by `seed`."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "generator": generator}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, **drawn) * 0.02)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    return model
