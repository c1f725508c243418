"""A lightweight in-process generation engine whose unit is the tree."""

from ibtpo_engine.adapter_folder import load_adapter, save_adapter
from ibtpo_engine.backend_engine import BackendEngine
from ibtpo_engine.backends import Backend, Completion, EngineBackend, TreeEngine
from ibtpo_engine.borrowed import borrow
from ibtpo_engine.budget import Budget
from ibtpo_engine.checkpoint import load_model, load_tokenizer, save_model, stop_tokens
from ibtpo_engine.engine import Engine
from ibtpo_engine.errors import (
    BackendError,
    BudgetSpent,
    CheckpointError,
    EngineError,
    IntegrityError,
    NoTokenAllowed,
    OutOfPages,
    StaleWeights,
)
from ibtpo_engine.export import PackedTree
from ibtpo_engine.given import Score
from ibtpo_engine.growing import Ahead, Growth, Reward, Search
from ibtpo_engine.http_backend import CompletionsServer, HttpBackend
from ibtpo_engine.lora import LoRA
from ibtpo_engine.masks import MaskState, TokenMask
from ibtpo_engine.model import Model, initialise
from ibtpo_engine.model_config import ModelConfig, RopeConfig
from ibtpo_engine.parity import Parity, sampler_logprob
from ibtpo_engine.pause import Boundary, Pause
from ibtpo_engine.sampling import Sampling
from ibtpo_engine.shadow import Shadow
from ibtpo_engine.stream import Event
from ibtpo_engine.tree import Node, Tree

__all__ = [
    "Ahead",
    "Backend",
    "BackendEngine",
    "BackendError",
    "Boundary",
    "Budget",
    "BudgetSpent",
    "CheckpointError",
    "Completion",
    "CompletionsServer",
    "Engine",
    "EngineBackend",
    "EngineError",
    "Event",
    "Growth",
    "HttpBackend",
    "IntegrityError",
    "LoRA",
    "MaskState",
    "Model",
    "ModelConfig",
    "NoTokenAllowed",
    "Node",
    "OutOfPages",
    "PackedTree",
    "Parity",
    "Pause",
    "Reward",
    "RopeConfig",
    "Sampling",
    "Score",
    "Search",
    "Shadow",
    "StaleWeights",
    "TokenMask",
    "Tree",
    "TreeEngine",
    "borrow",
    "initialise",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "sampler_logprob",
    "save_adapter",
    "save_model",
    "stop_tokens",
]
