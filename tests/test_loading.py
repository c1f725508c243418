"""Loading takes the weights in their new type and a chunk, whatever lies in the files."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocations import Allocations
from engine_helpers import save_checkpoint
from safetensors.torch import load_file, save_file

from ibtpo_engine import CheckpointError, Model, ModelConfig, load_model, save_model, weight_file
from ibtpo_engine.weight_file import WeightFile

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "sharded"
    save_checkpoint(folder, "qwen3", head_dim=24, shard="20KB")
    return folder


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    """The same in one file."""
    save_model(load_model(sharded), None, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


def refused(folder: Path, *parts: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(CheckpointError) as error:
        load_model(folder, dtype=dtype)
    for part in (str(folder), *parts):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_chunks_of_any_size_load_the_same_values(folder: Path, dtype: torch.dtype, monkeypatch) -> None:
    """A chunk of 40 bytes ends within rows and begins off every page boundary."""
    stored = load_file(folder / WEIGHTS)
    monkeypatch.setattr(weight_file, "CHUNK", 40)
    loaded = load_model(folder, dtype=dtype).state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in stored.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_every_weight_is_materialised_once(kind: str, dtype: torch.dtype, request, monkeypatch) -> None:
    """Nothing but the parameters themselves is larger than a few chunks."""
    folder = request.getfixturevalue(kind)
    monkeypatch.setattr(weight_file, "CHUNK", 64)
    with Allocations() as made:
        model = load_model(folder, dtype=dtype)
    large = [size for size in made.sizes if size > 4 * 64]
    assert sorted(large) == sorted(p.nbytes for p in model.parameters() if p.nbytes > 4 * 64)
    assert len(large) > 10
    assert len(made.sizes) > 100, "chunks were counted too"


PEAK = """
import sys, torch
from ibtpo_engine import Model, ModelConfig, load_model
torch.set_num_threads(1)
torch.zeros(1 << 20).to(torch.bfloat16).isfinite().all()
with torch.device("meta"):
    Model(ModelConfig.from_folder(sys.argv[1]))  # torch imports 0.1 GB of its own for the first module there
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


OF_THE_PROCESS = 24 << 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 M random parameters, in fp32, in one file."""
    folder = tmp_path_factory.mktemp("checkpoint") / "wide"
    raw = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}
    raw |= {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8}
    model = Model(ModelConfig.from_dict(raw))
    save_model(model, None, folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peak_of_resident_memory_is_the_weights_and_a_tenth(wide: Path, dtype: str) -> None:
    """Pages of the mapped file count as resident too; they are given up behind the copy. What the process takes for
    itself meanwhile, as for a thread of torch's that starts just then, does not grow with the weights."""
    command = [sys.executable, "-c", PEAK, str(wide), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, size = map(int, result.stdout.split())
    assert size > 80e6
    assert 0.9 * size < peak < 1.1 * size + OF_THE_PROCESS


def test_the_benchmark_loads_and_samples_a_scaled_down_checkpoint(tmp_path: Path) -> None:
    """One layer, a small vocabulary; its row says what was loaded and that the memory kept its bound."""
    script, out = Path(__file__).parents[1] / "bench" / "load_model.py", tmp_path / "row.csv"
    command = [sys.executable, str(script), "--layers", "1", "--vocabulary", "1000", "--out", str(out)]
    subprocess.run(command, capture_output=True, text=True, check=True, cwd=script.parent)
    with out.open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["layers"] == "1"
    assert float(row["checkpoint_gb"]) == pytest.approx(2e-9 * (1000 * 2048 + 50_335_000), rel=0.01)
    assert int(row["tokens"]) == 64
    assert 0.9 < float(row["peak_share"]) < 1.3  # a second copy would make it 2; a process has some MB of its own


def test_a_model_outlives_the_file_it_came_from(folder: Path) -> None:
    """Saving over it, also in place, changes the file and not the model that was loaded from it."""
    model = load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(load_file(folder / WEIGHTS)[DOWN], before[DOWN]), "training wrote into the file"
    save_model(model, None, folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    assert all(torch.equal(tensor, before[name] + 1.0) for name, tensor in model.state_dict().items())


def test_a_header_of_odd_length_is_read(folder: Path) -> None:
    """Then no tensor is aligned to its type."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    wanted = load_model(folder).state_dict()
    header = content[8 : 8 + length].rstrip(b" ")
    header += b" " * (len(header) % 2 == 0)
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert len(header) % 2 == 1
    loaded = load_model(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_all_headers_are_checked_before_any_data_is_read(sharded: Path, tmp_path: Path, monkeypatch) -> None:
    copied = Path(shutil.copytree(sharded, tmp_path / "model"))
    reads: list[str] = []
    monkeypatch.setattr(WeightFile, "read", lambda self, name, target: reads.append(name))
    load_model(copied)
    assert len(reads) > 10
    reads.clear()
    last = sorted(copied.glob("model-*.safetensors"))[-1]
    edit(last, **{"model.extra": torch.zeros(2)})
    refused(copied, last.name, "unexpected tensor", "model.extra")
    assert not reads


def test_a_tensor_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(sharded, tmp_path / "model"))
    weight_map = json.loads((copied / INDEX).read_text())["weight_map"]
    other = next(name for name in weight_map.values() if name != weight_map[DOWN])
    edit(copied / other, **{DOWN: load_file(copied / weight_map[DOWN])[DOWN]})
    refused(copied, DOWN, other, weight_map[DOWN], "is also in")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_tensors_are_named(folder: Path, dtype: torch.dtype) -> None:
    edit(folder / WEIGHTS, **{DOWN: torch.zeros(48, 56).to(dtype)})
    refused(folder, WEIGHTS, DOWN, "is stored as", "BF16", "Quantized")


def test_values_that_the_wanted_type_cannot_hold(folder: Path) -> None:
    edit(folder / WEIGHTS, **{DOWN: torch.full((48, 56), 7e4)})
    load_model(folder, dtype=torch.bfloat16)
    refused(folder, WEIGHTS, DOWN, "7e+04", "torch.float16", "bfloat16", dtype=torch.float16)


@pytest.mark.parametrize("place", [0, 48 * 56 - 1])
def test_nan_in_any_chunk_is_found(folder: Path, place: int, monkeypatch) -> None:
    monkeypatch.setattr(weight_file, "CHUNK", 1024)
    down = load_file(folder / WEIGHTS)[DOWN].clone()
    down.view(-1)[place] = float("nan")
    edit(folder / WEIGHTS, **{DOWN: down})
    refused(folder, WEIGHTS, DOWN, "NaN or Inf")
