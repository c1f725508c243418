"""A whole decoder in one native call, for models so small that calls cost more than arithmetic.

The counterpart, on the CPU, of a captured CUDA graph: what a step runs is recorded once, as addresses of weights and
sizes, and then run without Python between the kernels. Matrices are copied in the order in which a product reads them,
so that a step of a few rows does not spend its time on transposing: an update of the weights needs a new `Decoder`
(0.6 ms for the built-in policy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ibtpo_kernels import checks
from ibtpo_kernels.cpu import native
from ibtpo_kernels.plan import DecodePlan

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

Events = list[tuple[int, int]]
"""(place among the branches run, code) of those to attend to.

Code 1: it drew a stop token; 2: it reached its limit; 3: it continues but has no page for its next token.
"""


class DecodeRun(NamedTuple):
    """The outcome of a run of decode steps.

    Attributes:
        steps: their number.
        rows: tokens run and sampled in all of them.
        events: of branches that ended during the run, and of those that lack a page after the last step.
        paged: the places of branches that were given spare pages, in the order of the pages.
    """

    steps: int
    rows: int
    events: Events
    paged: list[int]


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Weights of one layer, in the order of `DecoderLayer` in kernels.h: matrices [out, in], vectors [out]."""

    attention_norm: Tensor
    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def tensors(self) -> list[Tensor | None]:
        """The fields, in order."""
        return [getattr(self, field.name) for field in fields(self)]


class Branches(Protocol):
    """Running branches as arrays with an entry, or row, a branch; see `ibtpo_engine.slots.Slots`.

    In the order of `Branches` in kernels.h.
    """

    table: Ints
    start: Ints
    limit: Ints
    before: Ints
    length: Ints
    stream: Longs
    stops: Longs
    temperature: Floats
    top_p: Floats
    min_p: Floats
    top_k: Ints
    tokens: Ints
    logprob: Floats
    logprob_raw: Floats
    entropy: Floats


_BRANCH_FIELDS = tuple(Branches.__annotations__)[1:]  # without the table, which is not in the struct

_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def can_borrow(x: Tensor | None) -> bool:
    """Whether the native decoder can read a weight in place."""
    return x is None or (x.is_cpu and x.dtype is torch.float32 and x.is_contiguous())


class Decoder:
    """A dense decoder (Qwen3, Qwen2, Llama) over a page pool, float32 on the CPU, in one native call.

    A row's result has the same bits alone and in any batch, decoded and prefilled, on any number of threads. Matrices
    are copied when it is made; later changes to them are not seen.

    Args:
        layers: weights a layer.
        embedding, head: [V, H]; norm: [H], the final one.
        cos, sin: [positions, D/2], the rotation of every position that may occur.
        num_heads, num_kv_heads: of the attention.
        eps: of every norm.

    Raises:
        ValueError: there is no compiled module, or a tensor is not contiguous float32 on the CPU or has a wrong shape.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        *,
        embedding: Tensor,
        norm: Tensor,
        head: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> None:
        if native is None:
            raise ValueError("Decoder: the compiled module is missing; use the model itself")
        outer: list[Tensor | None] = [embedding, norm, head, cos, sin]
        if not all(map(can_borrow, [*outer, *(x for layer in layers for x in layer.tensors())])):
            raise ValueError("Decoder: every tensor must be float32, contiguous and on the CPU; use the model itself")
        checks.decoder(embedding, norm, head, cos, sin, num_heads, num_kv_heads, eps)
        self.hidden_size, self.vocab_size = embedding.shape[1], embedding.shape[0]
        head_dim, inner = 2 * cos.shape[1], layers[0].gate.shape[0] if layers else 0
        shapes = _layer_shapes(self.hidden_size, inner, num_heads * head_dim, num_kv_heads * head_dim, head_dim)
        for i, layer in enumerate(layers):
            checks.named(f"Decoder: layer {i}", vars(layer), shapes)
        weights = [_packed_layer(layer).tensors() for layer in layers]
        outer = [embedding, norm, _packed(head), cos, sin, torch.tensor([eps], dtype=torch.float32)]
        self._kept = [x.detach() for row in (*weights, outer) for x in row if x is not None]  # owners of the addresses
        self._pages_like = (len(layers), num_kv_heads, head_dim)
        self._layers = np.array([[_address(x) for x in row] for row in weights], np.int64)
        self._image = np.array(
            [
                len(layers), self.hidden_size, inner, num_heads, num_kv_heads, head_dim, self.vocab_size, len(cos),
                *map(_address, outer), self._layers.ctypes.data,
            ],
            np.int64,
        )  # fmt: skip
        self._address = self._image.ctypes.data

    def __reduce__(self) -> Any:
        raise TypeError("Decoder: it holds addresses of weights and cannot be copied; make another")

    def forward(
        self, tokens: Tensor, pos: Tensor, slots: Tensor, plan: DecodePlan, k_pages: Tensor, v_pages: Tensor
    ) -> Tensor:
        """Hidden states [T, H], after the final norm, of T rows; their keys and values are appended first.

        Args:
            tokens, pos: int64 [T].
            slots: int64 [T], the slots for each row's key and value, as in `append_kv`.
            plan: for these rows, its lengths pos + 1; its table [R, P] must be contiguous.
            k_pages, v_pages: contiguous [layers, num_pages, page_size, Hkv, D].

        Raises:
            ValueError: a shape or dtype is wrong, a token, position or slot is out of range, or a page that a row needs
                is missing.
        """
        checks.decoder_forward(tokens, pos, slots, plan, k_pages, v_pages, self._pages_like)
        tokens, pos, slots = tokens.contiguous(), pos.contiguous(), slots.contiguous()
        row, lengths, items = plan.rows.contiguous(), plan.lengths.contiguous(), plan.items.contiguous()
        out = torch.empty(len(tokens), self.hidden_size, dtype=torch.float32, device="cpu")
        image = _rows_image(
            k_pages, v_pages, plan.page_table.shape, plan.page_table.data_ptr(), len(tokens), len(items),
            (items.data_ptr(), *(x.data_ptr() for x in (row, lengths, tokens, pos, slots, out))),
        )  # fmt: skip
        failed = native.decoder_forward(self._address, image.ctypes.data)
        if failed >= 0:
            raise ValueError(
                f"Decoder: row {failed} has token {int(tokens[failed])}, position {int(pos[failed])} and slot "
                f"{int(slots[failed])}: one is out of range, or a page of its path is missing"
            )
        return out

    def announce(self, num_rows: int) -> None:
        """Announce a step of so many rows, so that the threads it will use wake up meanwhile.

        Optional: a step whose threads are asleep begins alone, and they join when they are awake.
        """
        native.decoder_announce(self._address, num_rows)

    def record(self, branches: Branches, k_pages: Tensor, v_pages: Tensor) -> DecodeStep:
        """A decode step over these arrays and this pool, to be run any number of times.

        Raises:
            ValueError: the pool has a wrong shape or dtype.
        """
        checks.decoder_pages(k_pages, v_pages, self._pages_like)
        return DecodeStep(self, branches, k_pages, v_pages)


class DecodeStep:
    """A step that samples one token for each of the chosen branches, in place; made by `Decoder.record`.

    The arrays of the branches are borrowed: if one is replaced, record the step again.
    """

    def __init__(self, decoder: Decoder, branches: Branches, k_pages: Tensor, v_pages: Tensor) -> None:
        self._decoder = decoder
        self._branches = branches
        self._arrays = [branches.table, *(getattr(branches, name) for name in _BRANCH_FIELDS)]
        self._stops, self._tokens = branches.stops, branches.tokens  # arrays that are replaced when they grow
        self._pages = (k_pages.data_ptr(), v_pages.data_ptr())  # not the tensors: the pool may be released
        table = branches.table
        self._pool = _rows_image(k_pages, v_pages, table.shape, table.ctypes.data, 0, 0, (0,) * 7)
        self._image = np.array(
            [branches.stops.shape[1], branches.tokens.shape[1], *(x.ctypes.data for x in self._arrays[1:])], np.int64
        )
        self._addresses = (self._decoder._address, self._pool.ctypes.data, self._image.ctypes.data)

    def is_current(self, k_pages: Tensor, v_pages: Tensor) -> bool:
        """Whether it still refers to the branches' arrays and to this pool; check before a run."""
        now = self._branches
        return (
            self._stops is now.stops
            and self._tokens is now.tokens
            and self._pages == (k_pages.data_ptr(), v_pages.data_ptr())
        )

    def choose(self, chosen: Longs, items: Tensor) -> None:
        """Choose the branches of the next runs.

        Args:
            chosen: int64 [B], branches by index.
            items: of a plan for these branches, with their indices as rows of the table.
        """
        items = items.contiguous()
        self._chosen, self._items = chosen, items
        self._call = (*self._addresses, chosen.ctypes.data, len(chosen), items.data_ptr(), len(items))

    def run(self, most: int = 1, *, most_ended: int = 0, spare: Ints | None = None) -> DecodeRun:
        """Run the last token of each branch chosen and sample the next one, with its log-probs and entropy.

        Args:
            most: most steps, at least 1; the run ends early once a branch lacks a page and no spare one is left.
            most_ended: the run ends early once more branches than this have ended; later steps leave ended ones out.
            spare: free pages for branches that come to lack one; written into the table in this order.

        Raises:
            ValueError: a branch has NaN or inf logits, or lacks a page, in the first step; then nothing is recorded.
                A later step that fails records nothing either, and the next run begins with it.
        """
        pages = (0, 0) if spare is None else (spare.ctypes.data, len(spare))
        result = native.decoder_steps(*self._call, most, most_ended, *pages)
        if isinstance(result, tuple):
            return DecodeRun(*result)
        failed: int = result
        if failed >= len(self._chosen):
            raise ValueError(f"sample: row {failed - len(self._chosen)} has no distribution (NaN or inf logits)")
        raise ValueError(
            f"DecodeStep: branch {int(self._chosen[failed])} lacks a page, or its last token is out of range"
        )


def _packed(weight: Tensor) -> Tensor:
    """[out, in] as [panels, in, panel], see `Linear` in kernels.h."""
    panels = -(-len(weight) // native.panel)
    padded = F.pad(weight.detach(), (0, 0, 0, panels * native.panel - len(weight)))
    return padded.view(panels, native.panel, -1).transpose(1, 2).contiguous()


def _packed_layer(layer: LayerWeights) -> LayerWeights:
    return replace(layer, **{name: _packed(getattr(layer, name)) for name in _MATRICES})


def _layer_shapes(hidden: int, inner: int, queries: int, keys: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """The shape of each field of `LayerWeights`."""
    matrices = {
        "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    biases = {f"{name}_bias": shape[:1] for name, shape in matrices.items()}
    norms = {"attention_norm": (hidden,), "mlp_norm": (hidden,), "q_norm": (head_dim,), "k_norm": (head_dim,)}
    return {**matrices, **biases, **norms}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows_image(
    k_pages: Tensor, v_pages: Tensor, table_shape: tuple[int, ...], table: int, num_rows: int, num_items: int,
    rest: tuple[int, ...],
) -> Longs:  # fmt: skip
    """`DecoderRows` of kernels.h; `rest` are the fields after the page table."""
    _, num_pages, page_size, _, _ = k_pages.shape
    pages = (k_pages.data_ptr(), v_pages.data_ptr())
    return np.array([num_pages, page_size, *table_shape, num_rows, num_items, *pages, table, *rest], np.int64)
