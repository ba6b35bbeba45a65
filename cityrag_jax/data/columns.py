"""captures.parquet: the columns of `Captures` and `Provenance`, one row a panorama.

GeoParquet, with STAC's names where it has one, and Panoramax's `pers:pitch` and
`pers:roll`; what is derived of the pose (geometry, azimuth, pitch, roll) is written for
others and never read. `ecef_from_camera` holds the upper three rows of the pose.
Numbers are loaded whole, provenance when it is asked for.
"""

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int32

from cityrag_jax.data import tables
from cityrag_jax.data.captures import REBUILD, Captures, CityHeader, check_captures
from cityrag_jax.data.provenance import KINDS, Provenance, check_provenance
from cityrag_jax.geo.ecef import geodetic_from_ecef
from cityrag_jax.geo.poses import attitudes

CAPTURES = "captures.parquet"

WORDS = pa.dictionary(pa.int32(), pa.string())  # which repeat
# Type and shape of a row of every column, or Arrow's type where it stays there.
COLUMNS = {
    "ecef_from_camera": (np.float64, (12,)),
    "datetime": (np.datetime64, ()),
    "drive": (np.int32, ()),
    "neighbourhood": (np.int32, ()),
    "license": WORDS,
    "attribution": WORDS,
    "anonymised": (np.bool_, ()),
}


def write_columns(
    folder: Path, header: CityHeader, captures: Captures, provenance: Provenance
) -> None:
    """Write captures.parquet, of columns that are as they must be."""
    check_captures(captures, header, header.name)
    check_provenance(provenance, len(captures), header.name)
    latitude, longitude, height_m = geodetic_from_ecef(
        captures.ecef_from_camera[:, :3, 3]
    )
    azimuth, pitch, roll = attitudes(captures.ecef_from_camera)
    columns = {
        "id": provenance.id,
        "collection": provenance.collection.dictionary_encode(),
        "datetime": pa.array(_to_nanoseconds(captures.time_s)).cast(
            pa.timestamp("ns", "UTC")
        ),
        "view:azimuth": np.remainder(azimuth, 360),
        "pers:pitch": pitch,
        "pers:roll": roll,
        "license": _worded(captures.licence, header.licences),
        "attribution": _worded(captures.attribution, header.attributions),
        "href": provenance.href,
        "drive": captures.drive,
        "neighbourhood": captures.neighbourhood,
        "anonymised": captures.anonymised,
        "levelled": provenance.levelled,
        "height_datum": provenance.height_datum.dictionary_encode(),
        "accuracy_m": provenance.accuracy_m,
        "ecef_from_camera": captures.ecef_from_camera[:, :3],
    }
    places = np.stack([longitude, latitude, height_m], axis=1)
    notes = {"digest": columns_digest(captures)}
    tables.write_table(folder / CAPTURES, columns, notes, places)


def _worded(numbers: Int32[np.ndarray, " N"], words: tuple[str, ...]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(numbers, pa.array(words, pa.string()))


def _to_nanoseconds(time_s: Float64[np.ndarray, " N"]) -> np.ndarray:
    """Give Unix seconds as whole nanoseconds, exact to the last bit of today's."""
    whole = np.floor(time_s)
    rest = np.rint((time_s - whole) * 1e9).astype(np.int64)
    return (whole.astype(np.int64) * 10**9 + rest).view("datetime64[ns]")


def _to_seconds(datetime: np.ndarray) -> Float64[np.ndarray, " N"]:
    whole, rest = np.divmod(datetime.view(np.int64), 10**9)
    return whole + rest / 1e9


def plan_digest(
    header: CityHeader, captures: Captures, provenance: Provenance, quality: int
) -> int:
    """Give the crc32 of all that decides what a city will hold, but the pictures."""
    ids = zlib.crc32("\n".join(provenance.id.to_pylist()).encode())
    words = json.dumps([dataclasses.asdict(header), quality, ids], sort_keys=True)
    return zlib.crc32(words.encode(), columns_digest(captures))


def columns_digest(captures: Captures) -> int:
    """Give the crc32 of all columns, by which pairs know what they were mined from."""
    return tables.digest(vars(captures).values())


def read_captures(folder: Path, header: CityHeader) -> Captures:
    """Read the columns of captures.parquet.

    They were checked when they were written, and a digest says that they are the same;
    what another program wrote is checked now.
    """
    path = _existing(folder)
    columns = tables.read_columns(path, COLUMNS, REBUILD)
    rows = columns.pop("ecef_from_camera").reshape(-1, 3, 4)
    poses = np.zeros((len(rows), 4, 4))
    poses[:, :3], poses[:, 3, 3] = rows, 1
    captures = Captures(
        ecef_from_camera=poses,
        time_s=_to_seconds(columns.pop("datetime")),
        licence=_numbered(columns.pop("license"), header.licences, path),
        attribution=_numbered(columns.pop("attribution"), header.attributions, path),
        **columns,
    )
    notes = tables.read_notes(path, REBUILD)
    if "digest" in notes:
        tables.check_digest(path, notes, columns_digest(captures), REBUILD)
    else:
        check_captures(captures, header, str(path))
    return captures


def read_provenance(folder: Path) -> Provenance:
    """Read where a city's captures came from."""
    path = _existing(folder)
    provenance = Provenance(**tables.read_columns(path, KINDS, REBUILD))
    check_provenance(provenance, len(provenance), str(path))
    return provenance


def captures_digest(folder: Path) -> int | None:
    """Give `columns_digest` of a city on disk; None where another program wrote it."""
    return tables.read_notes(_existing(folder), REBUILD).get("digest")


def _existing(folder: Path) -> Path:
    path = folder / CAPTURES
    if not path.exists():
        raise ValueError(f"{path} is missing; {REBUILD}.")
    return path


def _numbered(
    column: pa.DictionaryArray, words: tuple[str, ...], path: Path
) -> Int32[np.ndarray, " N"]:
    """Give each word's place in the table that city.json holds of them."""
    place = pc.index_in(column.dictionary, value_set=pa.array(words, pa.string()))
    if column.null_count or place.null_count:
        unknown = column.dictionary.filter(place.is_null()).to_pylist() or [None]
        raise ValueError(
            f"{path.parent / 'city.json'} lists {list(words)}, but {path.name} names "
            f"{unknown[0]!r}; add it there, or {REBUILD}."
        )
    indices = column.indices.to_numpy(zero_copy_only=False)
    return place.to_numpy(zero_copy_only=False)[indices].astype(np.int32)
