"""A lightweight in-process generation engine whose unit is the tree."""

from ibtpo_engine.checkpoint import load_model, load_tokenizer, save_model, stop_tokens
from ibtpo_engine.engine import Engine, Growth, Reward, Search
from ibtpo_engine.errors import CheckpointError, EngineError, OutOfPages, StaleWeights
from ibtpo_engine.export import PackedTree
from ibtpo_engine.model import Model, initialise
from ibtpo_engine.model_config import ModelConfig, RopeConfig
from ibtpo_engine.parity import Parity, sampler_logprob
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.tree import Node, Tree

__all__ = [
    "CheckpointError",
    "Engine",
    "EngineError",
    "Growth",
    "Model",
    "ModelConfig",
    "Node",
    "OutOfPages",
    "PackedTree",
    "Parity",
    "Reward",
    "RopeConfig",
    "Sampling",
    "Search",
    "StaleWeights",
    "Tree",
    "initialise",
    "load_model",
    "load_tokenizer",
    "sampler_logprob",
    "save_model",
    "stop_tokens",
]
