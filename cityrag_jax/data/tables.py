"""Columns in Parquet files, and places in them as GeoParquet asks for it.

A file carries notes (JSON) beside its columns. Places are points of longitude, latitude
and height (GeoParquet 1.1.0, WKB; no `crs` means OGC:CRS84), so that QGIS, DuckDB and
geopandas open it. Pages have checksums, which are checked when read. What other
programs write of such a table is read, too, if its columns say the same.
"""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64

NOTES = b"cityrag"
POINT_Z = 1001  # ISO well-known binary
ROWS = 2**17  # of a group, which one thread reads


def write_table(
    path: Path,
    columns: dict[str, np.ndarray | pa.Array],
    notes: dict[str, Any],
    geometry: Float64[np.ndarray, "N 3"] | None = None,
) -> None:
    """Write columns, whole or not at all; `geometry` is longitude, latitude, height."""
    arrays = {name: _to_arrow(values) for name, values in columns.items()}
    metadata = {NOTES: json.dumps(notes).encode()}
    if geometry is not None:
        arrays["geometry"] = _points(geometry)
        metadata[b"geo"] = json.dumps(_geo(geometry)).encode()
    table = pa.table(arrays).replace_schema_metadata(metadata)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    short = [f.name for f in table.schema if pa.types.is_dictionary(f.type)]
    pq.write_table(
        table,
        temporary,
        compression="zstd",
        row_group_size=ROWS,
        use_dictionary=short,
        write_page_checksum=True,
    )
    os.replace(temporary, path)


def digest(columns: Iterable[np.ndarray]) -> int:
    """Give the crc32 of columns, which sees what checksums of pages do not cover."""
    crc = 0
    for column in columns:
        crc = zlib.crc32(np.ascontiguousarray(column), crc)
    return crc


def check_digest(path: Path, notes: dict[str, Any], found: int, remedy: str) -> None:
    """Refuse columns that are not those which this project wrote."""
    if notes.get("digest") != found:
        raise ValueError(
            f"{path} is damaged, or was changed: its columns have the digest {found}, "
            f"its notes say {notes.get('digest')}; {remedy}, or if it was changed on "
            f"purpose, write it without the note {NOTES.decode()!r}."
        )


def _to_arrow(values: np.ndarray | pa.Array) -> pa.Array:
    if isinstance(values, pa.Array) or values.ndim == 1:
        return values if isinstance(values, pa.Array) else pa.array(values)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))


def _points(places: Float64[np.ndarray, "N 3"]) -> pa.Array:
    """Give WKB points: byte order, kind, three numbers."""
    kind = [("order", "u1"), ("kind", "<u4"), ("place", "<f8", 3)]
    rows = np.zeros(len(places), kind)
    rows["order"], rows["kind"], rows["place"] = 1, POINT_Z, places
    stops = np.arange(len(rows) + 1, dtype=np.int32) * rows.itemsize
    buffers = [None, pa.py_buffer(stops), pa.py_buffer(rows.tobytes())]
    return pa.Array.from_buffers(pa.binary(), len(rows), buffers)


def _geo(places: Float64[np.ndarray, "N 3"]) -> dict[str, Any]:
    """Give the file's metadata, https://geoparquet.org/releases/v1.1.0."""
    box = [*places.min(0).tolist(), *places.max(0).tolist()]
    points = {"encoding": "WKB", "geometry_types": ["Point Z"], "bbox": box}
    return {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {"geometry": points},
    }


def read_columns(
    path: Path, kinds: dict[str, Any], remedy: str
) -> dict[str, np.ndarray | pa.Array]:
    """Read columns of a file; ValueError if it is damaged or they are of another kind.

    `kinds` gives type and shape of a row of each, or an Arrow type, which leaves the
    column in Arrow.
    """
    try:
        with _open(path) as file:
            table = file.read(columns=list(kinds))
        return {name: _from_arrow(table[name], kinds[name]) for name in kinds}
    except Exception as error:  # Arrow raises many kinds
        raise ValueError(f"{path} is damaged ({_first_line(error)}); {remedy}.") from (
            error
        )


def read_notes(path: Path, remedy: str) -> dict[str, Any]:
    """Read what a file carries beside its columns; nothing where others wrote it."""
    try:
        with _open(path) as file:
            metadata = file.schema_arrow.metadata or {}
        notes = json.loads(metadata.get(NOTES, b"{}"))
        return notes if isinstance(notes, dict) else {}
    except Exception as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}); {remedy}.") from (
            error
        )


def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, page_checksum_verification=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _from_arrow(column: pa.ChunkedArray, kind: tuple | pa.DataType):
    if isinstance(kind, pa.DictionaryType):
        column = column.cast(kind.value_type).dictionary_encode().unify_dictionaries()
        return column.combine_chunks()
    if isinstance(kind, pa.DataType):
        return column.cast(kind).combine_chunks()
    (dtype, row), array = kind, column.combine_chunks()
    # A missing float is NaN, which whoever asked for it may refuse.
    if array.null_count and not np.issubdtype(dtype, np.floating):
        raise ValueError(f"{array.null_count} values are missing")
    if row:
        size = int(np.prod(row))
        if len(array.flatten()) != size * len(array):
            raise ValueError(f"a row has not {size} numbers")
        array = array.flatten()
    if np.issubdtype(dtype, np.datetime64):
        array = array.cast(pa.timestamp("ns", "UTC")).cast(pa.int64())
        return array.to_numpy(zero_copy_only=False).view("datetime64[ns]")
    array = array.cast(pa.from_numpy_dtype(dtype))
    return array.to_numpy(zero_copy_only=False).reshape(-1, *row)
