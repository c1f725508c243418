"""Types of the arrays that an engine keeps on the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
"""Tokens, depths, pages."""
Longs = npt.NDArray[np.int64]
"""Slots and what torch indexes with."""
Floats = npt.NDArray[np.float32]
"""Log-probs and entropies."""
