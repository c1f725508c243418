"""Damaged and unsupported checkpoint folders: one clear error each, naming the file, the field and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_helpers import save_checkpoint, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ibtpo_engine import (
    CheckpointError,
    ModelConfig,
    checkpoint,
    load_model,
    load_tokenizer,
    save_model,
    stop_tokens,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint in one file."""
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    save_checkpoint(folder, "qwen3", head_dim=24, tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint in several files."""
    folder = tmp_path_factory.mktemp("checkpoint") / "sharded"
    save_checkpoint(folder, "qwen3", head_dim=24, shard="20KB")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path, *parts: str) -> str:
    """Assert that loading fails with one paragraph that holds every part."""
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    for part in parts:
        assert part in message
    return message


def test_the_folders_damaged_below_are_good_to_begin_with(whole: Path, sharded: Path) -> None:
    assert load_model(whole).state_dict().keys() == load_file(whole / WEIGHTS).keys()
    load_model(sharded)
    assert load_tokenizer(whole).eos_token_id == 2


# ---- files ---------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder", "Give a Hugging Face checkpoint folder")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_dtype_given_by_name(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"dtype='bfloat16' is not a torch.dtype; give one, such as torch.bfloat16"):
        load_model(folder, dtype="bfloat16")  # type: ignore[arg-type]


def test_a_file_in_place_of_the_folder(folder: Path) -> None:
    refused(folder / WEIGHTS, "no such folder")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json: not found", "safetensors")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00garbage", b"[1, 2]", b"null", b'"text"'])
def test_config_that_is_not_a_json_object(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json", "Download the file again")


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, WEIGHTS, INDEX)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_named_and_not_opened(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    refused(folder, name, "convert it to safetensors")


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "model-00001-of-00001.safetensors", "__0_0.distcp", "model-q4.gguf"]
)
def test_weights_of_other_tools_are_named(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    refused(folder, WEIGHTS, name, "save_pretrained")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -5000], ids=lambda keep: f"keep{keep}")
def test_truncated_weights(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refused(folder, WEIGHTS, "truncated or damaged", "again")


def test_weights_that_are_garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 100)
    refused(folder, WEIGHTS, "truncated or damaged")


def test_weights_that_are_a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refused(folder, WEIGHTS)


def test_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(folder, gone.name, "not found", INDEX, "Download the missing shard")


def test_a_truncated_shard(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    cut = sorted(folder.glob("model-*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-7])
    refused(folder, cut.name, "truncated or damaged")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": 3}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {}}',
        b"\xff\xfe\x00",
    ],
)
def test_an_index_that_is_none(sharded: Path, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    (folder / INDEX).write_bytes(content)
    refused(folder, INDEX, "not a safetensors index", "again")


def test_two_sets_of_weights(sharded: Path, whole: Path, tmp_path: Path) -> None:
    """As where `transformers` saves shards beside a single file: it goes on loading the file, others the shards."""
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shutil.copy(whole / WEIGHTS, folder)
    refused(folder, WEIGHTS, INDEX, "Delete the wrong ones")


def test_an_index_that_a_later_save_left_behind(sharded: Path, whole: Path, tmp_path: Path) -> None:
    """`transformers` removes the shards it replaces by a single file, but not their index."""
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    shutil.copy(sharded / INDEX, folder)
    saved = load_file(folder / WEIGHTS)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_model(folder).state_dict().items())


def test_saving_over_shards_replaces_them(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    model = load_model(folder)
    with torch.no_grad():
        model.head.mul_(2.0)
    save_model(model, None, folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == [WEIGHTS]
    assert torch.equal(load_model(folder).head, model.head)


# ---- tensors -------------------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj.weight"


def test_a_tensor_of_the_wrong_shape(folder: Path) -> None:
    edit_weights(folder, lambda state: state.update({DOWN: torch.zeros(3, 5)}))
    refused(folder, WEIGHTS, DOWN, "(3, 5)", "(48, 56)", "of the same model")


def test_a_config_of_another_size(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=41)
    refused(folder, "(40, 48)", "(41, 48)")


def test_a_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda state: state.pop(DOWN))
    refused(folder, "is missing (1 missing in all)", DOWN, "shard")


def test_a_missing_head(folder: Path) -> None:
    """An untied model without its head must not be run with the embeddings in its place."""
    edit_weights(folder, lambda state: state.pop("lm_head.weight"))
    refused(folder, "lm_head.weight", '"tie_word_embeddings": true')


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "tied", "qwen3", head_dim=24, tie_word_embeddings=True)
    return tmp_path / "tied"


@pytest.mark.parametrize("names", [(EMBEDDING, HEAD), (HEAD,)], ids=["both", "head alone"])
def test_a_tied_matrix_under_either_name(tied: Path, names: tuple[str, ...]) -> None:
    """`safetensors.torch.save_model`, and with it accelerate's, keeps the first name of the alphabet."""
    wanted = load_model(tied).state_dict()
    matrix = load_file(tied / WEIGHTS)[EMBEDDING].clone()  # else older safetensors map the file, which changes
    edit_weights(tied, lambda state: state.pop(EMBEDDING))
    edit_weights(tied, lambda state: state.update({name: matrix.clone() for name in names}))
    found = load_model(tied, dtype=torch.float64).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name].double()) for name, tensor in found.items())


def test_a_head_that_is_not_the_embedding_it_is_tied_to(tied: Path) -> None:
    """As from an adapter merged with a head of its own: `transformers` 4 drops that head, 5 takes it."""
    edit_weights(tied, lambda state: state.update({HEAD: state[EMBEDDING] * 1.01}))
    refused(tied, HEAD, EMBEDDING, "differ", '"tie_word_embeddings": false')
    edit_json(tied / "config.json", tie_word_embeddings=False)
    assert torch.equal(load_model(tied).head, load_file(tied / WEIGHTS)[HEAD])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_with_the_prefix_of_what_wrapped_the_model(folder: Path, prefix: str) -> None:
    edit_weights(folder, lambda state: [state.update({prefix + name: state.pop(name)}) for name in list(state)])
    refused(folder, f"unexpected tensor '{prefix}lm_head.weight'", EMBEDDING, "Save the plain model")


def test_an_unexpected_tensor(folder: Path) -> None:
    edit_weights(folder, lambda state: state.update({"model.layers.0.extra": torch.zeros(2)}))
    refused(folder, WEIGHTS, "unexpected tensor", "model.layers.0.extra", "config.json")


def test_a_layer_more_than_the_config_says(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    refused(folder, "unexpected tensor", "model.layers.1")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    edit_weights(folder, lambda state: state[DOWN].view(-1).__setitem__(7, value))
    refused(folder, WEIGHTS, DOWN, "NaN or Inf", "damaged")


# ---- config fields -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", "not supported", "Qwen3ForCausalLM")),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, ("Qwen3MoeForCausalLM", "dense")),
        ({"architectures": None, "model_type": "mamba"}, ("mamba",)),
        ({"is_causal": False}, ("is_causal", "not supported")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("sliding-window",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantized", "bf16 or fp32")),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, ("rope type", "longrope", "yarn", "remove it")),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ("yarn", "original_max_position", "missing")),
        ({"rope_parameters": YARN | {"mscale": "wide"}}, ("mscale", "wide")),
        ({"rope_parameters": YARN | {"attention_factor": -1.0}}, ("attention_factor", "-1")),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, ("rope type", "dynamic")),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, ("factor", "0")),
        ({"rope_parameters": {"rope_type": "linear"}}, ("linear", "factor", "missing")),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ("llama3", "low_freq_factor", "missing")),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor", "0.5")),
        ({"architectures": ["Gemma2ForCausalLM"]}, ("Gemma2ForCausalLM", "not supported", "MistralForCausalLM")),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, ("sliding-window",)),
        ({"rope_parameters": {"rope_theta": -1.0}}, ("rope_theta", "-1")),
        ({"rope_parameters": [1]}, ("rope_parameters",)),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, ("rope settings", "full_attention")),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ("contradict each other", "remove rope_scaling")),
        ({"num_key_value_heads": 3}, ("4 attention heads", "multiple", "3 key-value heads")),
        ({"head_dim": 7}, ("head_dim", "7", "even")),
        ({"num_attention_heads": 0, "head_dim": None}, ("num_attention_heads", "0")),
        ({"num_hidden_layers": -1}, ("-1", "at least 1")),
        ({"hidden_size": "wide"}, ("hidden_size", "wide")),
        ({"max_position_embeddings": 0}, ("max_position_embeddings", "0")),
        ({"rms_norm_eps": "tiny"}, ("rms_norm_eps", "tiny")),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_config_fields_we_do_not_run(folder: Path, fields: dict[str, object], parts: tuple[str, ...]) -> None:
    edit_json(folder / "config.json", **fields)
    refused(folder, "config.json", *parts)


@pytest.mark.parametrize("fields", [{"architectures": None}, {"architectures": []}])
def test_the_model_type_stands_in_for_the_architecture(folder: Path, fields: dict[str, object]) -> None:
    """A config.json of `config.save_pretrained`: `transformers` goes by the type."""
    edit_json(folder / "config.json", **fields)
    assert load_model(folder).config.architecture == "qwen3"


def test_mistral_without_a_word_on_its_window_has_one(folder: Path) -> None:
    """`transformers` then takes 4096, as the first Mistral had."""
    raw = json.loads((folder / "config.json").read_text()) | {"architectures": ["MistralForCausalLM"]}
    del raw["sliding_window"]
    (folder / "config.json").write_text(json.dumps(raw))
    refused(folder, "config.json", "sliding-window", '"sliding_window": null')


@pytest.mark.parametrize("window", [64, None])
@pytest.mark.parametrize("first", [0, 1, 2, 28])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_window_that_no_layer_has_is_none(folder: Path, kind: str, first: int, window: int | None) -> None:
    """Which layers have one is what `transformers` makes of the fields."""
    fields = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": first, "layer_types": None}
    edit_json(folder / "config.json", architectures=None, model_type=kind, **fields)
    config = AutoConfig.from_pretrained(folder)
    if "sliding_attention" in config.layer_types:
        refused(folder, "config.json", "sliding-window")
    else:
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_config_field(folder: Path, field: str) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw[field]
    (folder / "config.json").write_text(json.dumps(raw))
    refused(folder, "config.json", field, "missing")


# ---- tokenizer -----------------------------------------------------------------------------------------------


def tokenizer_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(folder)
    for part in (str(folder), *parts):
        assert part in str(error.value)


@pytest.mark.parametrize("gone", ["tokenizer*", "tokenizer.json", "tokenizer_config.json"])
def test_no_tokenizer(folder: Path, gone: str) -> None:
    """`transformers` would make up an empty one, with an end of sequence the model has never seen."""
    for path in folder.glob(gone):
        path.unlink()
    tokenizer_refused(folder, "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe\x00"])
def test_a_damaged_tokenizer(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    tokenizer_refused(folder, "tokenizer.json")


@pytest.mark.parametrize(
    ("there", "remedy"), [(False, "pip install sentencepiece"), (True, "Download")], ids=["missing", "installed"]
)
def test_a_sentencepiece_tokenizer_alone(folder: Path, there: bool, remedy: str, monkeypatch) -> None:
    """Folders of before 2024 may have no tokenizer.json."""
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: object() if there else None)
    tokenizer_refused(folder, "cannot be loaded", remedy)


def test_a_tokenizer_without_an_end(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    save_tokenizer(folder, eos=False)
    tokenizer_refused(folder, "tokenizer_config.json", "eos_token", "no answer would ever end")


# ---- stop tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "stops"),
    [(None, (2,)), (7, (2, 7)), ([7, 5, 2], (2, 5, 7)), ([], (2,))],
    ids=["none", "one", "list", "empty"],
)
def test_generation_config_adds_stop_tokens(folder: Path, named: object, stops: tuple[int, ...]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert stop_tokens(folder, load_tokenizer(folder)) == stops


@pytest.mark.parametrize(("named", "stops"), [(None, (2,)), (7, (2, 7)), ([2, 5, 7], (2, 5, 7))])
def test_without_a_generation_config_the_models_config_adds_them(
    folder: Path, named: object, stops: tuple[int, ...]
) -> None:
    """As in `transformers`."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": named}))
    assert stop_tokens(folder, load_tokenizer(folder)) == stops


def test_stop_tokens_may_come_from_the_config_alone(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = None
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert stop_tokens(folder, tokenizer) == (7,)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match='Add "eos_token_id" to generation_config.json'):
        stop_tokens(folder, tokenizer)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b'{"eos_token_id": "</s>"}', b'{"eos_token_id": ["a"]}']
)
def test_a_damaged_generation_config(folder: Path, content: bytes) -> None:
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        stop_tokens(folder, load_tokenizer(folder))
