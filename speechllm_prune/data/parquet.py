"""Audio in parquet shards (a local copy of a Hugging Face data set). No torch here; pyarrow is imported when needed.

A shard has a column `wav`, a struct with the field `bytes` (a whole audio file) as the data sets library writes it.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from speechllm_prune.data.audio import POINTER
from speechllm_prune.runtime import UserError

AUDIO = "wav"
"""The column with the audio."""

CACHE_BYTES = 256 << 20
"""Row groups that a process keeps: a row can only be read with its whole group, and batches sort rows by length."""

_groups: OrderedDict[tuple[str, int], Any] = OrderedDict()


def open_shard(path: str | Path, columns: Sequence[str] = ()) -> Any:
    """Open a shard (a `pyarrow.parquet.ParquetFile`) and check its columns.

    Raises
    ------
    UserError
        Naming the file: it cannot be read, is a git-lfs pointer, or lacks a column or has it in another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as stream:
            if stream.read(len(POINTER)) == POINTER:
                raise UserError(
                    f"{path} is a git-lfs pointer, not the data; run `git lfs pull` where it was cloned"
                )
        shard = pq.ParquetFile(path, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read the parquet file {path}: {error}; copy or download it again"
        ) from None
    schema = shard.schema_arrow
    missing = [name for name in (AUDIO, *columns) if name not in schema.names]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}; its columns are {', '.join(schema.names)}"
        )
    for name in columns:
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: the column {name} must hold text, it is {kind}")
    kind = schema.field(AUDIO).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise UserError(
            f"{path}: the column {AUDIO} must be a struct with the field bytes, it is {kind}"
        )
    return shard


def rows_of(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[list[Any], bytes | None]]:
    """Each row of a shard, one small batch in memory at a time.

    Yields
    ------
    list, bytes or None
        The cells of the (text) columns, and the audio file.
    """
    import pyarrow as pa

    shard = open_shard(path, columns)
    try:
        for batch in shard.iter_batches(
            32, columns=[*columns, f"{AUDIO}.bytes"], use_threads=False
        ):
            cells = [batch.column(name).to_pylist() for name in columns]
            for index, audio in enumerate(batch.column(AUDIO)):
                content = audio.as_py()
                yield [column[index] for column in cells], content and content["bytes"]
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read the parquet file {path}: {error}; copy or download it again"
        ) from None


def read_audio_bytes(path: str | Path, row: int) -> bytes:
    """The audio file in a row of a shard.

    Raises
    ------
    UserError
        If the shard has no such row, or nothing in it.
    """
    first_rows = _first_rows(str(path))
    if not 0 <= row < first_rows[-1]:
        raise UserError(f"{path} has {first_rows[-1]} rows, there is no row {row}")
    group = bisect_right(first_rows, row) - 1
    content = _group(str(path), group)[row - first_rows[group]].as_py()
    if not content or not content["bytes"]:
        raise UserError(f"row {row} of {path} holds no audio")
    return content["bytes"]


@functools.lru_cache(maxsize=4096)
def _first_rows(path: str) -> tuple[int, ...]:
    """First row of each row group, and last the number of rows."""
    metadata = open_shard(path).metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return (0, *accumulate(sizes))


def _group(path: str, group: int) -> Any:
    """The audio column of a row group, of the last ones used. A shard is opened anew: an open file outlives no fork."""
    import pyarrow as pa

    key = (path, group)
    if key not in _groups:
        try:
            table = open_shard(path).read_row_group(
                group, columns=[f"{AUDIO}.bytes"], use_threads=False
            )
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read the parquet file {path}: {error}") from None
        _groups[key] = table.column(AUDIO)
    _groups.move_to_end(key)
    while len(_groups) > 1 and sum(column.nbytes for column in _groups.values()) > CACHE_BYTES:
        _groups.popitem(last=False)
    return _groups[key]
