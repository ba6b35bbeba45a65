"""Take captures out of a city: their tiles, their rows, the pairs that show them.

The city is written anew beside the old one and takes its place when it is whole; files
of tiles that hold nothing of what goes are linked, so that it costs what the others
cost. What rests on the captures elsewhere (videos, encoded clips) is found, too.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64

from cityrag_jax.data.captures import write_header
from cityrag_jax.data.clips import clip_id
from cityrag_jax.data.columns import CAPTURES, write_columns
from cityrag_jax.data.pairs import (
    PAIRS,
    PairConfig,
    Pairs,
    load_pairs,
    read_rules,
    save_pairs,
)
from cityrag_jax.data.records import APART
from cityrag_jax.data.remote import refuse_remote
from cityrag_jax.data.shards import copy_shards
from cityrag_jax.data.store import City
from cityrag_jax.data.writing import sole_writer, take_place
from cityrag_jax.files import write_whole
from cityrag_jax.geo.retrieval import drive_edges

SIDECAR, LATENTS = "generate.json", "latents.json"
TAKEN = "taken_down.txt"  # beside pictures that are imported: ids, one a line
WRITTEN = ("city.json", CAPTURES, PAIRS, *APART)  # anew; all else is copied


def find_captures(city: City, ids: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """Give the captures of ids; ValueError names those that the city does not have."""
    known = city.provenance.id
    rows = pc.index_in(pa.array(ids, pa.string()), value_set=known)
    missing = [
        name for name, row in zip(ids, rows.to_pylist(), strict=True) if row is None
    ]
    if missing:
        raise ValueError(
            f"{city.folder} has no capture {', '.join(map(repr, missing))}; ids are "
            f"those of {CAPTURES}, such as {known[0].as_py()!r}."
        )
    return np.unique(rows.to_numpy(zero_copy_only=False).astype(np.int64))


def remove_captures(city: City, rows: Int64[np.ndarray, " n"]) -> dict[str, int]:
    """Remove captures from a city on disk; say what went."""
    refuse_remote(city.folder)
    kept = np.ones(len(city), bool)
    kept[rows] = False
    if not kept.any():
        raise ValueError(
            f"{city.folder} would hold no capture any more; remove the folder instead."
        )
    pairs = load_pairs(city.folder) if (city.folder / PAIRS).exists() else None
    remaining = without_rows(pairs, city, kept) if pairs else None
    temporary = city.folder.parent / f".{city.folder.name}.takedown"
    shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
    temporary.mkdir()
    with sole_writer(temporary):
        copy_shards(city.folder, temporary, set(rows.tolist()))
        captures = city.captures.select(kept)
        write_columns(temporary, city.header, captures, city.provenance.select(kept))
        write_header(temporary, city.header, len(captures))
        if remaining:
            rules = read_rules(city.folder)
            save_pairs(temporary, remaining, PairConfig(**rules) if rules else None)
        for path in city.folder.iterdir():
            if path.name not in WRITTEN:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, temporary / path.name)
        City(temporary)
        take_place(temporary, city.folder)
    gone = len(pairs) - len(remaining) if pairs and remaining else 0
    return {"captures": len(rows), "pairs": gone}


def without_rows(pairs: Pairs, city: City, kept: Bool[np.ndarray, " N"]) -> Pairs:
    """Give the pairs that show none of the captures that go, by their new numbers."""
    before = np.concatenate([[0], np.cumsum(~kept)])
    left = pairs.select(show_none(pairs, city, kept))
    return dataclasses.replace(
        left,
        start_a=left.start_a - before[left.start_a],
        start_b=left.start_b - before[left.start_b],
    )


def show_none(
    pairs: Pairs, city: City, kept: Bool[np.ndarray, " N"]
) -> Bool[np.ndarray, " P"]:
    """Say which pairs show none of the captures that go."""
    before = np.concatenate([[0], np.cumsum(~kept)])
    edges = drive_edges(city.captures.drive)
    stop_a = pairs.start_a + pairs.num_frames
    # Conditions are at most a few captures longer than windows; twice is safe.
    stop_b = edges[np.searchsorted(edges, pairs.start_b, "right")]
    stop_b = np.minimum(pairs.start_b + 2 * pairs.num_frames, stop_b)
    whole = before[stop_a] == before[pairs.start_a]
    return whole & (before[stop_b] == before[pairs.start_b])


def name_clips(city: City, rows: Int64[np.ndarray, " n"]) -> dict[int, int | None]:
    """Give, for the clips of a city's training pairs, the numbers that they will have.

    None for those that show some of the captures `rows`, which go.
    """
    if not (city.folder / PAIRS).exists():
        return {}
    kept = np.ones(len(city), bool)
    kept[rows] = False
    pairs = load_pairs(city.folder).training
    left = without_rows(pairs, city, kept)
    names = [
        [clip_id(city.name, *x) for x in zip(a.tolist(), b.tolist(), strict=True)]
        for a, b in ((pairs.start_a, pairs.start_b), (left.start_a, left.start_b))
    ]
    new: dict[int, int | None] = dict.fromkeys(names[0])
    whole = np.flatnonzero(show_none(pairs, city, kept)).tolist()
    return new | {names[0][k]: name for k, name in zip(whole, names[1], strict=True)}


def find_videos(folder: Path, city: str, ids: Iterable[str]) -> Iterator[Path]:
    """Give the folders of videos below one that were made from some of the captures."""
    wanted = set(ids)
    for path in sorted(folder.rglob(SIDECAR)):
        facts = _read(path)
        if facts.get("city") != city:
            continue
        kinds = [kind for clip in facts.get("clips", ()) for kind in clip["captures"]]
        if any(not wanted.isdisjoint(map(str, kind["ids"])) for kind in kinds):
            yield path.parent


def holds_latents(folder: Path, city: str) -> bool:
    """Say whether a folder's encoded clips are of a city (`training/latents`)."""
    path = folder / LATENTS
    if not path.exists():
        raise ValueError(f"{folder} holds no latents: {LATENTS} is missing.")
    return city in _read(path).get("pairs", {})


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); look at it by hand.") from error
    return facts if isinstance(facts, dict) else {}


def read_taken(folder: Path) -> set[str]:
    """Read the ids below `folder` that must not be imported again."""
    path = folder / TAKEN
    return set(path.read_text().splitlines()) if path.exists() else set()


def note_taken(folder: Path, ids: Sequence[str]) -> None:
    """Note ids that must not be imported again, and remove their pictures there."""
    ordered = sorted(read_taken(folder) | set(ids))
    write_whole(folder / TAKEN, "".join(f"{name}\n" for name in ordered))
    for path in list(folder.rglob("*")):
        if path.is_file() and names_of(path, folder) & set(ids):
            path.unlink()


def names_of(path: Path, folder: Path) -> set[str]:
    """Give the ids that a picture in a folder may have: its path, or its name."""
    return {path.relative_to(folder).as_posix(), path.stem}
