"""Reads questions: JSON Lines and Parquet behind any fsspec URL, and Hugging Face datasets.

Files are cut into pieces that can be read independently, each knowing the position of its first row.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ka2l.errors import PoolError, first_line

if TYPE_CHECKING:
    import datasets

#: Endings read as one JSON object a line. ``.json`` counts only where named by the user: directories hold other JSON.
_JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_PARQUET = (".parquet", ".pq")
_PIECE_BYTES = 32 * 2**20
_BATCH_ROWS = 1024
_MIB = 2**20
#: Larger pools are not read a second time only to know them again.
_MAX_HASHED_BYTES = 4 * 2**30


class BadRow(NamedTuple):
    """Stands for a row that could not be parsed."""

    reason: str
    content: str


class Piece(NamedTuple):
    """A part of a file that is read by one worker."""

    path: str
    """Path or URL; named in the quarantine."""
    first_row: int
    """Position in the file of the piece's first row."""
    row_groups: list[int] | None
    """Parquet row groups; None: the whole file, JSON Lines."""
    num_bytes: int


# ---------------------------------------------------------------------------------------------------- known datasets


def _trivia_qa(row: Mapping[str, Any]) -> dict[str, Any]:
    answer = row["answer"]
    answers = [answer["value"], *answer["aliases"]]
    seen = {text.casefold() for text in answers if text}
    normalised = [answer.get("normalized_value"), *(answer.get("normalized_aliases") or [])]
    answers += [text for text in normalised if text and text.casefold() not in seen]
    return {
        "id": row["question_id"],
        "question": row["question"],
        # The test split hides its answers behind this value.
        "answers": [text for text in answers if text != "<unk>"],
        "question_source": row.get("question_source"),
    }


def _nq_open(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "answers": row["answer"]}


def _medmcqa(row: Mapping[str, Any]) -> dict[str, Any]:
    options = [row["opa"], row["opb"], row["opc"], row["opd"]]
    correct = row["cop"]
    return {
        "id": row["id"],
        "question": row["question"],
        # Asked open-ended. The test split hides the correct option as -1.
        "answers": [options[correct]] if correct >= 0 else [],
        # Metadata, not a group: with 21 subjects, whole groups would make a one-sided evaluation set.
        "subject_name": row.get("subject_name"),
        "topic_name": row.get("topic_name"),
        "choice_type": row.get("choice_type"),
        "options": options,
    }


class KnownDataset(NamedTuple):
    """A Hugging Face dataset whose layout is known."""

    hf_name: str | None
    """Configuration to load where none is given."""
    mapper: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Published row -> ``id``, ``question``, ``answers`` and metadata; columns that reveal the answer are left out."""


#: Layouts as published on the Hugging Face hub: TriviaQA (Joshi et al. 2017), NQ-Open (Lee et al. 2019) and
#: MedMCQA (Pal et al. 2022). Any other dataset is read through ``pool.columns``.
KNOWN_DATASETS: dict[str, KnownDataset] = {
    "mandarjoshi/trivia_qa": KnownDataset("rc.nocontext", _trivia_qa),
    "trivia_qa": KnownDataset("rc.nocontext", _trivia_qa),
    "google-research-datasets/nq_open": KnownDataset(None, _nq_open),
    "nq_open": KnownDataset(None, _nq_open),
    "openlifescienceai/medmcqa": KnownDataset(None, _medmcqa),
    "medmcqa": KnownDataset(None, _medmcqa),
}


# ---------------------------------------------------------------------------------------------------- Hugging Face


def is_dataset(path: str) -> bool:
    """Whether ``path`` is a Hugging Face dataset: an id (``owner/name`` or a known name) or a saved directory.

    Whatever exists locally, has a scheme, a wildcard or a file ending is taken for files.
    """
    local = Path(path)
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        return True
    if local.exists() or path.endswith((*_JSONL, *_PARQUET, ".json")):
        return False
    return path in KNOWN_DATASETS or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None


def load_dataset(path: str, hf_name: str | None = None, hf_split: str = "train") -> datasets.Dataset:
    """Load one split of a Hugging Face dataset from the hub or from a directory made by ``save_to_disk``.

    Raises:
        PoolError: it is not there, has no such configuration or split, or cannot be reached.
    """
    import datasets

    try:
        if Path(path).exists() and is_dataset(path):
            loaded = datasets.load_from_disk(path)
            return loaded[hf_split] if isinstance(loaded, datasets.DatasetDict) else loaded
        known = KNOWN_DATASETS.get(path)
        name = hf_name if hf_name is not None or known is None else known.hf_name
        return datasets.load_dataset(path, name, split=hf_split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as err:
        detail = first_line(err)
        raise PoolError(
            f"pool.path {path!r} is not an existing path, and loading it as a Hugging Face dataset "
            f"(hf_name={hf_name!r}, hf_split={hf_split!r}) failed: {detail}",
            hint="check the path; for a dataset check its id, pool.hf_name, pool.hf_split and the network",
        ) from err


# ---------------------------------------------------------------------------------------------------- files


def find_pieces(path: str, required: tuple[str, ...]) -> list[Piece]:
    """The pieces of all files at ``path``, in the order of their names.

    The footer of every Parquet file is read here, so that a damaged file or a missing column is found at once.

    Args:
        path: a file, a directory (searched to any depth), a glob, or an fsspec URL of one.
        required: columns that every Parquet file must have.

    Raises:
        PoolError: nothing is there, a file is unreadable or of an unknown kind, or lacks a required column.
    """
    files = _list_files(path)
    with ThreadPoolExecutor(16) as threads:
        found = threads.map(lambda file: _file_pieces(file[0], file[1], required), files)
        return [piece for pieces in found for piece in pieces]


def content_identity(path: str) -> str:
    """A hash of what the files at ``path`` hold, wherever they lie and whatever they are called.

    All bytes of pools up to 4 GiB; of larger ones every file's size, first and last MiB, where Parquet keeps the
    statistics of its columns. A Hugging Face dataset on the hub is known by its name.

    Raises:
        PoolError: nothing is there.
    """
    if is_dataset(path) and not Path(path).exists():
        return path
    saved = sorted(str(file) for file in Path(path).glob("**/*.arrow")) if is_dataset(path) else []
    files = [(name, Path(name).stat().st_size) for name in saved] or _list_files(path)
    read_all = sum(size for _, size in files) <= _MAX_HASHED_BYTES
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(f"{size}\x1f".encode())
        with fsspec.open(name, "rb") as file:
            if read_all:
                while chunk := file.read(_MIB):
                    digest.update(chunk)
            else:
                digest.update(file.read(_MIB))
                file.seek(max(0, size - _MIB))
                digest.update(file.read(_MIB))
    return digest.hexdigest()[:16]


def count_rows(path: str, enough: int) -> int:
    """Rows of the files at ``path``, usable or not; reads no further than where there are ``enough``.

    Raises:
        PoolError: nothing is there.
    """
    num_rows = 0
    for name, _ in _list_files(path):
        if num_rows >= enough:
            break
        if name.endswith(_PARQUET):
            with fsspec.open(name, "rb") as file:
                num_rows += pq.read_metadata(file).num_rows
        else:
            num_rows += sum(1 for _ in islice(read_piece(Piece(name, 0, None, 0)), enough - num_rows))
    return num_rows


def _list_files(path: str) -> list[tuple[str, int]]:
    try:
        fs, root = fsspec.core.url_to_fs(path)
        if any(char in path for char in "*?[") and not fs.exists(root):
            infos = fs.glob(root, detail=True).values()
            files = [(info["name"], info.get("size") or 0) for info in infos if info["type"] == "file"]
            # fsspec matches hidden files as a shell would not.
            found = [file for file in files if not file[0].rpartition("/")[2].startswith(".")]
        elif fs.isdir(root):
            infos = fs.find(root, detail=True).values()
            files = [(info["name"], info.get("size") or 0) for info in infos]
            found = [file for file in files if file[0].endswith((*_JSONL, *_PARQUET)) and not _hidden(file[0], root)]
        else:
            info = fs.info(root)
            found = [(info["name"], info.get("size") or 0)]
        found = [(fs.unstrip_protocol(name) if "://" in path else name, size) for name, size in sorted(found)]
    except FileNotFoundError:
        found = []
    except (ImportError, ValueError, OSError) as err:
        raise PoolError(
            f"pool.path {path!r} cannot be opened: {err}",
            hint="check the URL and credentials; s3:// needs the package s3fs, gs:// needs gcsfs",
        ) from err
    if not found:
        raise PoolError(
            f"pool.path {path!r}: no JSONL or Parquet file there",
            hint="give a file, a directory, a glob, an fsspec URL, or a Hugging Face dataset id such as owner/name",
        )
    return found


def _hidden(name: str, root: str) -> bool:
    parts = Path(name).parts[len(Path(root).parts) :]
    return any(part.startswith((".", "_")) for part in parts)


def _file_pieces(path: str, num_bytes: int, required: tuple[str, ...]) -> list[Piece]:
    if path.endswith((*_JSONL, ".json")):
        return [Piece(path, 0, None, num_bytes)]
    if not path.endswith(_PARQUET):
        raise PoolError(
            f"pool.path: {path} is neither JSONL nor Parquet by its ending",
            hint=f"known endings: {', '.join((*_JSONL, '.json', *_PARQUET))}",
        )
    try:
        with fsspec.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
            footer, names = parquet.metadata, parquet.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as err:
        raise PoolError(
            f"{path} is not a readable Parquet file: {err}", hint="write the file again, or take it out of pool.path"
        ) from err
    check_columns(names, required, path)
    pieces: list[Piece] = []
    first_row = 0
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        if not pieces or pieces[-1].num_bytes + group.total_byte_size > _PIECE_BYTES:
            pieces.append(Piece(path, first_row, [], 0))
        last = pieces[-1]
        pieces[-1] = last._replace(
            row_groups=[*(last.row_groups or []), index], num_bytes=last.num_bytes + group.total_byte_size
        )
        first_row += group.num_rows
    return pieces


def check_columns(names: list[str], required: tuple[str, ...], where: str) -> None:
    """Raise a PoolError where a source lacks a column that the config names."""
    missing = [name for name in required if name not in names]
    if missing:
        raise PoolError(
            f"{where} has no column {', '.join(map(repr, missing))}; it has: {', '.join(names)}",
            hint="set pool.columns, for example {question: ..., answers: ...}",
        )


def read_piece(piece: Piece) -> Iterator[tuple[int, object]]:
    """Stream (position, row) pairs of a piece; a row that cannot be parsed comes as a BadRow.

    A file that fails while it is read ends with a BadRow whose reason starts with ``unreadable``.
    """
    position = piece.first_row - 1
    try:
        rows = _read_jsonl(piece.path) if piece.row_groups is None else _read_parquet(piece)
        for position, row in rows:
            yield position, row
    except (OSError, EOFError, zlib.error, pa.ArrowException) as err:
        yield position + 1, BadRow(f"unreadable: {piece.path}: {err}", "")


def _read_jsonl(path: str) -> Iterator[tuple[int, object]]:
    with fsspec.open(path, "rb", compression="infer") as file:
        for position, line in enumerate(file):
            if line.strip():
                yield position, parse_line(line.removeprefix(b"\xef\xbb\xbf") if position == 0 else line)


def parse_line(line: bytes) -> object:
    """The JSON value of one line, or a BadRow."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as err:
        return BadRow(f"malformed: invalid UTF-8 at byte {err.start}", line.decode("utf-8", "replace").strip())
    except (ValueError, RecursionError) as err:
        return BadRow(f"malformed: invalid JSON ({err})", line.decode("utf-8").strip())


def _read_parquet(piece: Piece) -> Iterator[tuple[int, object]]:
    position = piece.first_row
    with fsspec.open(piece.path, "rb") as file, pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=piece.row_groups):
            for row in batch.to_pylist():
                yield position, row
                position += 1
