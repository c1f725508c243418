"""Rows of data files, read one at a time: JSONL through an index of its lines, Arrow and Parquet through a memory map.

No file is read into memory whole. A JSONL file costs 8 bytes a row for the offsets of its lines; a folder written by
``datasets.Dataset.save_to_disk`` is mapped as it is; a Parquet file is compressed and has no access to single rows, so
it is unpacked once into an unnamed temporary Arrow file, which is mapped.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from ibtpo.printable import one_line
from ibtpo.tasks.splits import choose_split

_FORMATS = "a JSONL file (.jsonl), a Parquet file or folder (.parquet), or a folder written by datasets' save_to_disk"

_BOM = b"\xef\xbb\xbf"
_NARROW = {"float": np.float32, "halffloat": np.float16}  # Arrow's names


class Rows(Protocol):
    """Rows of a file, in its order."""

    path: Path
    note: str
    """Which of several splits is read, for the user; "" if there is only one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` as a mapping of its fields.

        Raises:
            ValueError: it cannot be read; the message names place, fault and remedy.
        """

    def where(self, index: int) -> str:
        """Place of row `index` for error messages: the file and the line or row, counted from 1."""


def fail(where: str, problem: str, remedy: str) -> NoReturn:
    """Raise the error of a row that cannot be used."""
    raise ValueError(f"{where}: {problem}; {remedy}") from None


def open_rows(path: Path) -> Rows:
    """The rows of a data file or folder.

    Raises:
        ValueError: there is no such file, it is empty, or its format is unknown.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file; give --data {_FORMATS}, with one prompt and answer a row")
    rows: Rows
    if path.is_dir():
        rows = _folder_rows(path)
    elif path.suffix == ".parquet":
        rows = parquet_rows(path, [path])
    elif path.suffix == ".arrow":
        rows = ArrowRows(path, [path])
    else:
        _check_kind(path)
        rows = JsonlRows(path)
    if not len(rows):
        such = 'write one JSON object per line, such as {"prompt": "What is 2+2?", "answer": "4"}'
        raise ValueError(
            f"{path}: the file is empty; {such}" if isinstance(rows, JsonlRows) else f"{path}: has no rows; add some"
        )
    return rows


def _folder_rows(path: Path) -> ArrowRows:
    """A folder of Parquet files, one of `datasets`, or a dataset of the Hugging Face Hub with its files in data/."""
    if files := sorted(path.glob("*.parquet")):
        chosen, note = choose_split(path, files)
        rows = parquet_rows(path, chosen)
        rows.note = note
        return rows
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        folders = sorted({file.parent for file in path.glob("*/*.parquet")})
        if path / "data" in folders:
            return _folder_rows(path / "data")
        if folders:
            names = ", ".join(folder.name for folder in folders)
            raise ValueError(f"{path}: has Parquet files in the folders {names}; give one of them: {folders[0]}")
    return saved_rows(path)


def _check_kind(path: Path) -> None:
    """Raise if a file that should be JSONL is of a kind that is often mistaken for it."""
    with path.open("rb") as file:
        begin = file.read(512)
    text = begin.removeprefix(_BOM).lstrip()
    save = (
        f'pip install "ibtpo[data]", and in Python: datasets.Dataset.from_{{}}("{path}"{{}}).to_parquet("rows.parquet")'
    )
    if begin.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PK\x03\x04")):
        raise ValueError(f"{path}: a compressed file; unpack it (gunzip, unzstd, unzip, ...) and give what was in it")
    if begin.startswith(b"PAR1"):
        raise ValueError(f"{path}: a Parquet file; give it a name that ends in .parquet")
    if path.suffix in (".csv", ".tsv"):
        separator = ', sep="\\t"' if path.suffix == ".tsv" else ""
        raise ValueError(f"{path}: a table, not JSONL; convert it: {save.format('csv', separator)}")
    if text.startswith(b"[") and text[1:].lstrip().startswith((b"{", b"[")):
        raise ValueError(f"{path}: one JSON array, not one object per line; convert it: {save.format('json', '')}")


class JsonlRows:
    """A file with one JSON object a line; blank lines are skipped.

    It is read, not mapped: if another process truncates a mapped file, this one ends with SIGBUS.
    """

    note = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._starts, self._lines = _index(path)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = int(self._starts[index]), int(self._starts[index + 1])  # includes blank lines after it
        line = os.pread(self._file, end - start, start)
        if len(line) < end - start:
            fail(self.where(index), "the file was cut short while it was in use", "put it back and begin again")
        return _parse_object(line, self.where(index))

    def where(self, index: int) -> str:
        """The file and the line, counted from 1."""
        line = index if self._lines is None else int(self._lines[index])
        return f"{self.path}, line {line + 1}"


def _index(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """Offsets of the lines that are not blank and of the file's end; their numbers unless these are 0, 1, 2, ..."""
    starts, lines, offset, number = array("q"), array("q"), 0, -1
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if line.removeprefix(_BOM).strip():
                starts.append(offset)
                lines.append(number)
            offset += len(line)
    gaps = len(lines) != number + 1
    starts.append(offset)
    return np.array(starts, np.int64), np.array(lines, np.int64) if gaps else None


def _parse_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig").rstrip(), parse_constant=lambda name: fail(
            where, f"{name} is not JSON", "write a number or a string"))  # fmt: skip
    except UnicodeDecodeError as error:
        fail(where, f"not UTF-8 text (byte {error.start} of the line)", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        hint = "a JSONL file holds one complete JSON object per line, without an array around them or commas between"
        fail(where, f"malformed JSON at column {error.colno} ({error.msg})", hint)
    except RecursionError:
        fail(where, "JSON nested too deeply", "a row is a flat object")
    except ValueError as error:
        if where in str(error):
            raise
        fail(where, "a number with thousands of digits", "write it as a string")
    if not isinstance(record, dict):
        fail(where, f"expected an object, found {kind_of(record)}", 'write {"prompt": ..., "answer": ...}')
    return record


def kind_of(value: Any) -> str:
    """The kind of a value in JSON's terms; Parquet has more kinds."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    kinds |= dict.fromkeys((int, float, Decimal), "a number") | {bytes: "bytes"}
    return kinds.get(type(value), f"a {type(value).__name__}")


class ArrowRows:
    """Memory-mapped Arrow files of one schema (stream or file format), one after the other."""

    note = ""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path = path
        self._batches: list[Any] = []
        for file in files:
            self._batches += _map_batches(file)
        self._ends = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, index, side="right")) - 1
        batch = self._batches[number].slice(index - int(self._ends[number]), 1)
        try:
            [row] = batch.to_pylist()
        except Exception as error:  # text that is not UTF-8, a date beyond Python's, an unknown time zone
            fail(self.where(index), f"cannot be read ({one_line(error)})", "mend the row, or leave that column out")
        return {field.name: _as_written(row[field.name], field.type) for field in batch.schema}

    def where(self, index: int) -> str:
        """The file and the row, counted from 1."""
        return f"{self.path}, row {index + 1}"


def _as_written(value: Any, kind: Any) -> Any:
    """A value of this Arrow type; 16- and 32-bit floats as the shortest decimal that rounds to them: .1, not .10000000.

    So a pass rate of .7 is not below .7, and an answer of .1 can be matched.
    """
    if isinstance(value, dict):
        return {field.name: _as_written(value[field.name], field.type) for field in kind}
    narrow = _NARROW.get(str(kind)) if isinstance(value, float | np.float16) else None  # float16: older pyarrow
    return value if narrow is None else float(str(narrow(value)))


def _map_batches(file: Path) -> list[Any]:
    arrow = _arrow(file)
    source = arrow.memory_map(str(file))
    try:
        return list(arrow.ipc.open_stream(source))
    except (arrow.ArrowException, OSError):
        pass
    try:
        reader = arrow.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not an Arrow file ({one_line(error)}); write it again") from None


def saved_rows(folder: Path) -> ArrowRows:
    """Rows of a `Dataset.save_to_disk` folder; for a `DatasetDict`, of its only split or the one called train."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _described(splits, "splits")
        if not names:
            raise ValueError(f"{folder}: has no splits; save it again with rows")
        if len(names) > 1 and "train" not in names:
            raise ValueError(
                f"{folder}: has the splits {', '.join(names)}; give the folder of one: {folder / names[0]}"
            )
        name = "train" if "train" in names else names[0]
        rows = saved_rows(folder / name)
        if others := ", ".join(other for other in names if other != name):
            rows.note = f"{folder}: the split {name} is read, not {others}; name the folder of another to read it"
        return rows
    state = folder / "state.json"
    if not state.is_file():
        raise ValueError(f"{folder}: no data was found there (no state.json, no *.parquet); give --data {_FORMATS}")
    if _described(state, "_indices_data_files", []):
        raise ValueError(f"{folder}: holds an index over its rows; save it again with flatten_indices().save_to_disk()")
    names = [str(entry["filename"]) for entry in _described(state, "_data_files")]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: {missing[0]} is missing; copy the whole folder, or save it again")
    return ArrowRows(folder, [folder / name for name in names])


def _described(path: Path, name: str, default: list[Any] | None = None) -> list[Any]:
    """A list from one of the JSON files with which `datasets` describes a folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(name, default)
    except (ValueError, AttributeError):
        found = None
    if not isinstance(found, list):
        raise ValueError(f"{path}: not as datasets' save_to_disk writes it (no list {name!r}); save it again")
    return found


def parquet_rows(path: Path, files: Sequence[Path]) -> ArrowRows:
    """Parquet files, unpacked batch by batch into a temporary Arrow file that is mapped and already unlinked."""
    arrow = _arrow(path)
    with tempfile.NamedTemporaryFile(prefix="ibtpo-", suffix=".arrow") as unpacked:
        with _named(files[0]):
            schema = importlib.import_module("pyarrow.parquet").read_schema(files[0])
        with arrow.ipc.new_stream(unpacked.name, schema) as writer:
            for file in files:
                for batch in _parquet_batches(file, schema, files[0].name):
                    writer.write_batch(batch)
        return ArrowRows(path, [Path(unpacked.name)])


def _parquet_batches(file: Path, schema: Any, first: str) -> Iterator[Any]:
    with _named(file):
        opened = importlib.import_module("pyarrow.parquet").ParquetFile(file)
        if not opened.schema_arrow.equals(schema):
            names = sorted({field.name for field in {*opened.schema_arrow} ^ {*schema}})
            odd = f" ({', '.join(names)})" if names else ""
            raise ValueError(f"{file}: has other columns or types than {first}{odd}; write both alike, or give one")
        yield from opened.iter_batches()


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Name the Parquet file in errors of the block."""
    try:
        yield
    except (_arrow(file).ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a Parquet file, or a damaged one ({one_line(error)}); write it again") from None


def _arrow(path: Path) -> Any:
    try:
        importlib.import_module("pyarrow.ipc")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ValueError(
            f'{path}: Parquet and Arrow need the package pyarrow ({error}); install it with: pip install "ibtpo[data]"'
        ) from error
