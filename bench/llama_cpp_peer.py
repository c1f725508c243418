"""llama.cpp as a peer: the same weights written as GGUF, decoded in batches by the low-level calls of llama-cpp-python.

Installing needs a matching wheel or a compiler to build llama.cpp: pip install llama-cpp-python gguf
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ibtpo_engine import Model

ROWS = 512  # most tokens of one pass, llama.cpp's own default


def is_installed() -> bool:
    """Are llama-cpp-python and gguf installed?"""
    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def write_gguf(model: Model, path: Path) -> None:
    """Write the weights, matrices in the model's type and vectors in float32, without a tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, config.architecture)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    architecture = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == config.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        matrix = values.ndim == 2 and parameter.dtype is torch.bfloat16
        kind = gguf.GGMLQuantizationType.BF16 if matrix else gguf.GGMLQuantizationType.F32
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in llama.cpp, its keys and values in float16 (its default), on as many threads as torch has.

    Args:
        model: Qwen3 or Qwen2.
        sequences: decoded side by side.
        tokens: maximum length of a sequence, including the prompt.
        shared: do sequences share a prompt? Then they use one unified buffer, which is slower without sharing.

    Raises:
        RuntimeError: its logits are not those of `model`.
    """

    def __init__(self, model: Model, *, sequences: int, tokens: int, shared: bool) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            write_gguf(model, Path(folder) / "model.gguf")
            self._model: Any = llama_cpp.llama_model_load_from_file(
                str(Path(folder) / "model.gguf").encode(), llama_cpp.llama_model_default_params()
            )
        settings: Any = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * (-(-tokens // 256) * 256)
        settings.n_batch = settings.n_ubatch = ROWS
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.kv_unified = shared
        self._context: Any = llama_cpp.llama_init_from_model(self._model, settings)
        self._batch: Any = llama_cpp.llama_batch_init(ROWS, 0, 1)
        fields = (self._batch.token, self._batch.pos, self._batch.logits, self._batch.n_seq_id)
        self._token, self._pos, self._wanted, num_sequences = (np.ctypeslib.as_array(x, (ROWS,)) for x in fields)
        num_sequences[:] = 1
        self._samplers = [llama_cpp.llama_sampler_chain_init(self._chain()) for _ in range(sequences)]
        for seed, sampler in enumerate(self._samplers):
            llama_cpp.llama_sampler_chain_add(sampler, llama_cpp.llama_sampler_init_dist(seed))
        self._check(model)

    def _chain(self) -> Any:
        return self._api.llama_sampler_chain_default_params()

    def generate(self, prompts: npt.NDArray[np.int64], new: int, n: int = 1) -> int:
        """Sample `new` tokens for `n` sequences on each prompt [B, m]; returns the number of tokens sampled."""
        sequences = len(prompts) * n
        self._prefill(prompts, n)
        for s in range(sequences):
            self._batch.seq_id[s][0] = s
        self._wanted[:sequences] = 1
        drawn = [self._draw(s, s // n) for s in range(sequences)]
        for at in range(prompts.shape[1], prompts.shape[1] + new - 1):
            self._token[:sequences], self._pos[:sequences] = drawn, at
            self._decode(sequences)
            drawn = [self._draw(s, s) for s in range(sequences)]
        return sequences * new

    def _draw(self, sequence: int, row: int) -> int:
        return int(self._api.llama_sampler_sample(self._samplers[sequence], self._context, row))

    def _prefill(self, prompts: npt.NDArray[np.int64], n: int) -> None:
        """Compute the prompts and share each with its sequences; row b of the last pass has prompt b's last token."""
        api, (count, length) = self._api, prompts.shape
        memory = api.llama_get_memory(self._context)
        api.llama_memory_clear(memory, False)
        heads = [(b, at) for b in range(count) for at in range(length - 1)]  # tokens whose logits are not needed
        lasts = [(b, length - 1) for b in range(count)]
        for rows in [*(heads[i : i + ROWS] for i in range(0, len(heads), ROWS)), lasts]:
            self._token[: len(rows)] = [prompts[b, at] for b, at in rows]
            self._pos[: len(rows)] = [at for _, at in rows]
            self._wanted[: len(rows)] = rows is lasts
            for i, (b, _) in enumerate(rows):
                self._batch.seq_id[i][0] = b * n
            self._decode(len(rows))
        for b in range(count):
            for j in range(1, n):
                api.llama_memory_seq_cp(memory, b * n, b * n + j, -1, -1)

    def _decode(self, rows: int) -> None:
        self._batch.n_tokens = rows
        code = self._api.llama_decode(self._context, self._batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _check(self, model: Model) -> None:
        """Compare the logits after a short prompt with the model's own."""
        prompt = np.arange(1, 13)[None] % model.config.vocab_size
        self._prefill(prompt, 1)
        found = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (model.config.vocab_size,))
        with torch.inference_mode():
            length = prompt.shape[1]
            end = torch.full((length,), length, dtype=torch.int32)
            hidden = model.packed(torch.from_numpy(prompt[0]), torch.arange(length), end)
            expected = torch.nn.functional.linear(hidden[-1], model.head).float().numpy()
        worst = np.abs(found - expected).max() / np.abs(expected).max()
        if not worst < (1e-2 if model.dtype is torch.float32 else 5e-2):
            raise RuntimeError(f"llama.cpp computes other logits: {worst:.3f} of the largest apart")

    def close(self) -> None:
        """Free the model."""
        for sampler in self._samplers:
            self._api.llama_sampler_free(sampler)
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
