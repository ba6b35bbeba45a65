"""The columns of a city: poses, times, drives and licences of its panoramas.

city.json holds format, name, panorama height, anchor, tables of licences and
attributions and the settings of the generator; captures.parquet the columns
(`columns`). Both are checked when written and when read.
"""

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from cityrag_jax.data import capture_checks as checks
from cityrag_jax.geo.ecef import geodetic_from_ecef
from cityrag_jax.geo.retrieval import drive_edges

FORMAT_VERSION = 3
READABLE = (2, 3)  # before 3 the tiles of all rows lay together
CAPTURES = "captures.parquet"
REBUILD = "rebuild it with tools/build_city.py"


@dataclasses.dataclass(frozen=True)
class Captures:
    """Everything about a city's panoramas but the pictures, one row each.

    Captures of a drive are consecutive and in order of time. `time_s` is Unix time.
    `licence` and `attribution` index the city's tables. That all have the same length
    is for `check_captures` to see.
    """

    ecef_from_camera: Float64[np.ndarray, "_ 4 4"]
    time_s: Float64[np.ndarray, " _"]
    drive: Int32[np.ndarray, " _"]
    neighbourhood: Int32[np.ndarray, " _"]
    licence: Int32[np.ndarray, " _"]
    attribution: Int32[np.ndarray, " _"]
    anonymised: Bool[np.ndarray, " _"]

    def __len__(self) -> int:
        return len(self.time_s)

    def select(self, which: Bool[np.ndarray, " _"] | Int64[np.ndarray, " _"]):
        """Keep the captures of a mask, or put some into another order."""
        fields = dataclasses.fields(self)
        return Captures(**{f.name: getattr(self, f.name)[which] for f in fields})


@dataclasses.dataclass(frozen=True)
class CityHeader:
    """The contents of city.json; the anchor is latitude, longitude, height."""

    name: str
    panorama_height: int
    anchor: tuple[float, float, float]
    licences: tuple[str, ...]
    attributions: tuple[str, ...]
    generator: dict = dataclasses.field(default_factory=dict)


def check_captures(captures: Captures, header: CityHeader, source: str) -> None:
    """Refuse columns that disagree, wrong poses, scattered drives, unknown licences.

    What real recordings get wrong is refused by `capture_checks`.
    """
    for field in dataclasses.fields(Captures):
        length = len(getattr(captures, field.name))
        if length != len(captures):
            raise ValueError(
                f"{source}: {len(captures)} times but {length} values of {field.name}; "
                f"{REBUILD}."
            )
    if len(captures) == 0:
        raise ValueError(f"{source} holds no captures; {REBUILD}.")
    _check_poses(captures.ecef_from_camera, source)
    edges = drive_edges(captures.drive)
    drives = captures.drive[edges[:-1]]
    if len(np.unique(drives)) != len(drives):
        ordered = np.sort(drives)
        again = ordered[np.argmax(ordered[1:] == ordered[:-1])]
        raise ValueError(
            f"{source}: captures of a drive must be consecutive, but those of drive "
            f"{again} stand in several places; sort by drive and time."
        )
    backwards = np.diff(captures.time_s) < 0
    backwards[edges[1:-1] - 1] = False
    if backwards.any():
        k = int(np.argmax(backwards))
        raise ValueError(
            f"{source}: capture {k + 1}, taken at {captures.time_s[k + 1]} s, follows "
            f"capture {k} of its drive at {captures.time_s[k]} s; sort by time."
        )
    position_m = captures.ecef_from_camera[:, :3, 3]
    checks.check_anchor(captures.ecef_from_camera, header.anchor, source)
    checks.check_precision(position_m, source)
    checks.check_upright(captures.ecef_from_camera, source)
    checks.check_times(captures.time_s, source)
    checks.check_speed(position_m, captures.time_s, edges, source)
    for name, table in (
        ("licence", header.licences),
        ("attribution", header.attributions),
    ):
        column = getattr(captures, name)
        if column.min() < 0 or column.max() >= len(table):
            raise ValueError(
                f"{source}: {name} runs from {column.min()} to {column.max()}, but the "
                f"table in city.json has {len(table)} entries; add the missing ones."
            )


def _check_poses(poses: np.ndarray, source: str) -> None:
    finite = np.isfinite(poses).all((1, 2))
    rotation = np.where(finite[:, None, None], poses, 0)[:, :3, :3]
    product = np.einsum("nji,njk->nik", rotation, rotation)
    error = np.where(finite, np.abs(product - np.eye(3)).max((1, 2)), np.nan)
    last_row = np.all(poses[:, 3] == np.array([[0, 0, 0, 1]]), axis=1)
    good = (error < 1e-6) & last_row & (np.linalg.det(rotation) > 0)
    if not good.all():
        k = int(np.argmin(good))
        raise ValueError(
            f"{source}: the pose of capture {k} is not a rotation and translation "
            f"(R^T R differs from 1 by {error[k]:.3g}, determinant "
            f"{np.linalg.det(rotation[k]):.6f}); {int(np.sum(~good))} such poses. "
            "Orthonormalise rotations and write camera axes as columns."
        )
    height_m = geodetic_from_ecef(poses[:, :3, 3])[2]
    far = ~(np.abs(height_m) < 100_000)
    if far.any():
        k = int(np.argmax(far))
        raise ValueError(
            f"{source}: capture {k} stands at {poses[k, :3, 3].tolist()}, "
            f"{height_m[k]:.0f} m above the ellipsoid; positions must be ECEF metres "
            "(geo.ecef.ecef_from_enu places local ones)."
        )


def write_header(folder: Path, header: CityHeader, count: int) -> None:
    """Write city.json of a city of `count` captures."""
    document = {
        "format": FORMAT_VERSION,
        "captures": count,
        **dataclasses.asdict(header),
    }
    document["digest"] = _digest(document)
    (folder / "city.json").write_text(json.dumps(document, indent=2) + "\n")


def _digest(document: dict) -> int:
    """Give the crc32 of a JSON object, whatever the spaces between its words."""
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def read_header(folder: Path) -> CityHeader:
    """Read city.json; ValueError names what is missing or damaged."""
    path = folder / "city.json"
    if not path.exists():
        raise ValueError(f"{path} is missing: {folder} is not a city; {REBUILD}.")
    try:
        document = json.loads(path.read_text())
        version = document["format"]
        if version not in READABLE:
            raise ValueError(
                f"{path} has format {version}, this program reads {FORMAT_VERSION}; "
                f"{REBUILD}."
            )
        if "digest" not in document:
            raise ValueError(f"{path} is of an older form, without digest; {REBUILD}.")
        if document.pop("digest") != _digest(document):
            raise ValueError(f"{path} is damaged: its checksum differs; {REBUILD}.")
        fields = {f.name: document[f.name] for f in dataclasses.fields(CityHeader)}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {REBUILD}.") from error
    _check_header(fields, path)
    fields["anchor"] = tuple(map(float, fields["anchor"]))
    for name in ("licences", "attributions"):
        fields[name] = tuple(fields[name])
    return CityHeader(**fields)


def _check_header(fields: dict, path: Path) -> None:
    """Raise ValueError that names the key whose value cannot be."""

    def are(values, kinds) -> bool:
        return isinstance(values, list) and all(type(x) in kinds for x in values)

    anchor, height = fields["anchor"], fields["panorama_height"]
    good = {
        "name": isinstance(fields["name"], str),
        "panorama_height": type(height) is int and 0 < height < 2**16,
        "anchor": are(anchor, (int, float))
        and len(anchor) == 3
        and all(
            abs(x) < limit for x, limit in zip(anchor, (91, 181, 1e5), strict=True)
        ),
        "licences": are(fields["licences"], (str,)),
        "attributions": are(fields["attributions"], (str,)),
        "generator": isinstance(fields["generator"], dict),
    }
    for name, right in good.items():
        if not right:
            raise ValueError(
                f"{path} is damaged: {name} is {fields[name]!r}, which cannot be; "
                f"{REBUILD}."
            )
