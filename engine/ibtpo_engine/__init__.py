"""A lightweight in-process generation engine whose unit is the tree."""

from ibtpo_engine.budget import Budget
from ibtpo_engine.checkpoint import load_model, load_tokenizer, save_model, stop_tokens
from ibtpo_engine.engine import Engine, Growth, Reward, Search
from ibtpo_engine.errors import BudgetSpent, CheckpointError, EngineError, IntegrityError, OutOfPages, StaleWeights
from ibtpo_engine.export import PackedTree
from ibtpo_engine.given import Score
from ibtpo_engine.model import Model, initialise
from ibtpo_engine.model_config import ModelConfig, RopeConfig
from ibtpo_engine.pause import Boundary, Pause
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.stream import Event
from ibtpo_engine.tree import Node, Tree

__all__ = [
    "Boundary",
    "Budget",
    "BudgetSpent",
    "CheckpointError",
    "Engine",
    "EngineError",
    "Event",
    "Growth",
    "IntegrityError",
    "Model",
    "ModelConfig",
    "Node",
    "OutOfPages",
    "PackedTree",
    "Pause",
    "Reward",
    "RopeConfig",
    "Sampling",
    "Score",
    "Search",
    "StaleWeights",
    "Tree",
    "initialise",
    "load_model",
    "load_tokenizer",
    "save_model",
    "stop_tokens",
]
