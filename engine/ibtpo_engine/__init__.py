"""A lightweight in-process generation engine whose unit is the tree."""

from ibtpo_engine.adapter_folder import load_adapter, save_adapter
from ibtpo_engine.checkpoint import load_model, load_tokenizer, save_model, stop_tokens
from ibtpo_engine.engine import Engine, Growth, Reward, Search
from ibtpo_engine.errors import CheckpointError, EngineError, OutOfPages, StaleWeights
from ibtpo_engine.export import PackedTree
from ibtpo_engine.lora import LoRA
from ibtpo_engine.model import Model, initialise
from ibtpo_engine.model_config import ModelConfig, RopeConfig
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.shadow import Shadow
from ibtpo_engine.tree import Node, Tree

__all__ = [
    "CheckpointError",
    "Engine",
    "EngineError",
    "Growth",
    "LoRA",
    "Model",
    "ModelConfig",
    "Node",
    "OutOfPages",
    "PackedTree",
    "Reward",
    "RopeConfig",
    "Sampling",
    "Search",
    "Shadow",
    "StaleWeights",
    "Tree",
    "initialise",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "save_adapter",
    "save_model",
    "stop_tokens",
]
