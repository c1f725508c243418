"""Accuracy from independent rollouts: avg@k, pass@k, maj@k and greedy, in training and as a separate command."""

from __future__ import annotations

from ibtpo.evaluation.evaluate import Evaluation, evaluate
from ibtpo.evaluation.sampling import Completion, sample_completions

__all__ = ["Completion", "Evaluation", "evaluate", "sample_completions"]
