"""Which models the native decoder runs, and how it finds their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ibtpo_engine.model import MLP, Attention, Block, Model, RMSNorm
from ibtpo_engine.model import Decoder as Layers
from ibtpo_kernels import Decoder, LayerWeights, can_borrow, has_compiled

MOST_BYTES = 16 << 20
"""Largest weights of a model that the native decoder runs. It runs a few rows on one thread; in a larger model their
products would profit from a second one, and take so long that the cost of calls does not matter."""

_KNOWN = (Model, Layers, nn.ModuleList, Block, Attention, MLP, RMSNorm, nn.Linear, nn.Embedding)


def native_decoder(model: Model, *, max_positions: int) -> Decoder | None:
    """The model as one native call, borrowing its weights; None if it must run in torch.

    That is the case for a dtype other than float32, a device other than the CPU, a model that is not small, missing
    compiled kernels, or a module that was replaced or given a hook.

    Args:
        model: as `Model` builds it.
        max_positions: positions of all rows are below this.
    """
    if not has_compiled() or not all(map(_is_plain, model.modules())):
        return None
    parameters = list(model.parameters())
    if not all(map(can_borrow, parameters)) or sum(p.nbytes for p in parameters) > MOST_BYTES:
        return None
    config = model.config
    with torch.inference_mode():
        cos, sin = model.rotation(torch.arange(min(max_positions, config.max_positions)))
    return Decoder(
        [_layer(block) for block in model.model.layers],
        embedding=model.model.embed_tokens.weight,
        norm=model.model.norm.weight,
        head=model.head,
        cos=cos,
        sin=sin,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        eps=config.rms_eps,
    )


def _is_plain(module: nn.Module) -> bool:
    """Is its forward pass known?"""
    return type(module) in _KNOWN and not (module._forward_hooks or module._forward_pre_hooks)


def _layer(block: Any) -> LayerWeights:
    attention, mlp = block.self_attn, block.mlp
    norms: tuple[Tensor | None, Tensor | None] = (None, None)
    if attention.has_norms:
        norms = attention.q_norm.weight, attention.k_norm.weight
    return LayerWeights(
        attention_norm=block.input_layernorm.weight,
        q=attention.q_proj.weight,
        q_bias=attention.q_proj.bias,
        k=attention.k_proj.weight,
        k_bias=attention.k_proj.bias,
        v=attention.v_proj.weight,
        v_bias=attention.v_proj.bias,
        q_norm=norms[0],
        k_norm=norms[1],
        o=attention.o_proj.weight,
        o_bias=attention.o_proj.bias,
        mlp_norm=block.post_attention_layernorm.weight,
        gate=mlp.gate_proj.weight,
        gate_bias=mlp.gate_proj.bias,
        up=mlp.up_proj.weight,
        up_bias=mlp.up_proj.bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )
