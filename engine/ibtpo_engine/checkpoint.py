"""Hugging Face checkpoint folders: config.json, safetensors (single or sharded) and the tokenizer's files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from ibtpo_engine.errors import CheckpointError
from ibtpo_engine.model import Model
from ibtpo_engine.model_config import ModelConfig
from ibtpo_engine.weight_file import WeightFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PICKLED = (".bin", ".pt", ".pth")
_OTHERS = (*_PICKLED, ".safetensors", ".distcp", ".gguf")  # weights of other tools, or shards without an index
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}


def check_folder(folder: Path) -> None:
    """Check that a checkpoint folder is there.

    Raises:
        CheckpointError: it is not; for what looks like a name on the Hugging Face Hub, the message says how to get it.
    """
    if folder.is_dir():
        return
    hub = len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.exists()
    download = f" Nothing is downloaded: if that is a name on the Hub, hf download {folder} --local-dir DIR" * hub
    raise CheckpointError(f"{folder}: no such folder. Give a Hugging Face checkpoint folder.{download}")


def load_model(folder: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """Load a dense Qwen3, Qwen2/2.5, Llama or Mistral checkpoint, memory-mapped and shard by shard.

    Peak memory is the weights in `dtype` and one chunk of a file; all headers are checked before any data is read.

    Args:
        folder: the checkpoint folder.
        dtype: what the weights are converted to.
        device: where they go.

    Raises:
        CheckpointError: a file is missing or truncated, or a tensor is missing, unexpected, of the wrong shape,
            quantized, or holds NaN, Inf or values that `dtype` cannot represent.
        TypeError: `dtype` is no torch.dtype.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"load_model: dtype={dtype!r} is not a torch.dtype; give one, such as torch.bfloat16")
    folder = Path(folder)
    check_folder(folder)
    config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        model = Model(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for stored, file in _find(folder, expected, config).items():  # all headers fit: now the data, file by file
        name = _parameter(stored, config)
        if name not in state:
            state[name] = torch.empty(expected[name], dtype=dtype, device=device)
            file.read(stored, state[name])
        elif not file.holds(stored, state[name]):  # a tied matrix, written twice
            raise CheckpointError(
                f"{folder}: {HEAD} and {EMBEDDING} differ, but config.json ties them. If the head was trained on its "
                'own, set "tie_word_embeddings": false there; else remove the head from the weights.'
            )
    model.load_state_dict(state, assign=True)
    return model


def _parameter(stored: str, config: ModelConfig) -> str:
    """The parameter that a stored tensor is for: a tied matrix may be stored under either name, or under both."""
    return EMBEDDING if stored == HEAD and config.tie_embeddings else stored


def _find(folder: Path, expected: dict[str, tuple[int, ...]], config: ModelConfig) -> dict[str, WeightFile]:
    """The file of each stored tensor, in the order to read them; only headers are read."""
    found: dict[str, WeightFile] = {}
    for file in map(WeightFile, _weight_files(folder)):
        for name in file.names():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            shape = expected.get(_parameter(name, config))
            if shape is None:
                raise CheckpointError(
                    f"{file.path}: unexpected tensor {name!r}; config.json describes a {config.architecture}, whose "
                    f"tensors are named like {EMBEDDING!r}. Save the plain model, without wrappers or added modules."
                )
            if file.shape(name) != shape:
                raise CheckpointError(
                    f"{file.path}: {name} has shape {file.shape(name)}, but config.json requires {shape}. "
                    "Use weights and config.json of the same model."
                )
            if name in found:
                raise CheckpointError(
                    f"{file.path}: {name} is also in {found[name].path.name}. Delete the shards and save again."
                )
            file.dtype(name)
            found[name] = file
    missing = sorted(set(expected) - {_parameter(name, config) for name in found})
    if missing:
        tied = 'If head and embedding are tied, set "tie_word_embeddings": true in config.json.'
        remedy = tied if missing == [HEAD] else "Check that every shard is there."
        raise CheckpointError(f"{folder}: {missing[0]!r} is missing ({len(missing)} missing in all). {remedy}")
    return found


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError):
            files = []
        if not files:
            raise CheckpointError(f"{index}: not a safetensors index. Download the file again.")
        gone = [path for path in files if not path.exists()]
        if single.exists() and single not in files:
            if gone:  # `transformers` leaves an old index behind when it saves a sharded model as one file
                return [single]
            raise CheckpointError(
                f"{folder}: there are weights in {SINGLE}, and others in the shards that {INDEX} names. Delete the "
                "wrong ones (transformers would take the single file)."
            )
        if gone:
            raise CheckpointError(f"{gone[0]}: not found, but {INDEX} names it. Download the missing shard.")
        return files
    if single.exists():
        return [single]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHERS)
    pickled = bool(others) and Path(others[0]).suffix in _PICKLED
    remedy = "convert it to safetensors (loading pickles runs code)" if pickled else "save the model by save_pretrained"
    hint = f" Found {others[0]}: {remedy}." if others else ""
    raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there.{hint}")


def save_model(model: Model, tokenizer: PreTrainedTokenizerBase | None, folder: Path | str) -> None:
    """Write a folder that `transformers` loads: config.json, model.safetensors and the tokenizer's files.

    Existing weights in the folder, single or sharded, are replaced.
    Not atomic: write into a temporary folder and rename it (see `RunFolder.checkpoint`).

    Raises:
        ValueError: the model has adapters, which such a folder cannot hold.
    """
    if model.adapters is not None:
        raise ValueError("save_model: this model has adapters, and its own weights are unchanged; use save_adapter")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = {key: value for key, value in model.config.raw.items() if key not in ("torch_dtype", "dtype")}
    raw["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / SINGLE, metadata={"format": "pt"})
    for stale in (folder / INDEX, *folder.glob("model-*-of-*.safetensors")):  # else they would be read as other weights
        stale.unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The folder's own tokenizer.

    Raises:
        CheckpointError: there is no such folder or no tokenizer in it, or it cannot be read or names no end-of-sequence
            token.
    """
    from transformers import AutoTokenizer  # here, because importing it is slow

    check_folder(Path(folder))
    present = {path.name for path in Path(folder).glob("*")}
    if "tokenizer_config.json" not in present or not present & VOCABULARIES:  # transformers would make one up
        raise CheckpointError(f"{folder}: there is no tokenizer; it needs tokenizer.json and tokenizer_config.json.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        remedy = "Download tokenizer.json and tokenizer_config.json again."
        if "tokenizer.json" not in present and find_spec("sentencepiece") is None:  # transformers asks for tiktoken
            remedy = "Without tokenizer.json it takes sentencepiece: pip install sentencepiece."
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            f"{remedy}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{folder}/tokenizer_config.json: field eos_token is missing, so no answer would ever end. "
            'Add "eos_token": "..." with the token that ends an answer.'
        )
    return tokenizer


def stop_tokens(folder: Path | str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, and those of generation_config.json or, without one, config.json.

    Raises:
        CheckpointError: the file names something that is no token id, or nothing names one.
    """
    stops = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    path = Path(folder) / "generation_config.json"
    path = path if path.exists() else Path(folder) / "config.json"
    if path.exists():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            stops.update(int(stop) for stop in (named if isinstance(named, list) else [named]) if stop is not None)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: eos_token_id must be a token id or a list of them ({error}). Correct or delete the file."
            ) from None
    if not stops:
        raise CheckpointError(
            f"{folder}: neither the tokenizer nor {path.name} names an end-of-sequence token, so no answer would ever "
            f'end. Add "eos_token_id" to {path.name}.'
        )
    return tuple(sorted(stops))
