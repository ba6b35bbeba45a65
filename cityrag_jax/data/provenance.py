"""Where a city's captures came from: ids, links, datums.

Training and generation need none of it, so it is read when somebody asks whose picture
this is, or wants one out. Columns are Arrow arrays: text of millions in little memory.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64

from cityrag_jax.data.captures import REBUILD, Captures
from cityrag_jax.geo.retrieval import drive_edges

DATUMS = ("ellipsoid", "geoid", "unknown")
KINDS = {
    "id": pa.string(),
    "collection": pa.string(),
    "href": pa.string(),
    "height_datum": pa.string(),
    "accuracy_m": pa.float32(),
    "levelled": pa.bool_(),
}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where captures came from, one row each: what takes them out or gives credit.

    `id` is the source's own and never changes, whatever is added or left out; `href`
    leads to the picture's page or file, null where there is none. `collection` is the
    source's sequence. Heights are above what `height_datum` names (`DATUMS`), places
    known to `accuracy_m`, null if nobody says. `levelled` pictures have their horizon
    in the middle row.
    """

    id: pa.Array
    collection: pa.Array
    href: pa.Array
    height_datum: pa.Array
    accuracy_m: pa.Array
    levelled: pa.Array

    def __len__(self) -> int:
        return len(self.id)

    def select(
        self, which: Bool[np.ndarray, " _"] | Int64[np.ndarray, " _"]
    ) -> "Provenance":
        """Keep the rows of a mask, or put some into another order."""
        rows = pa.array(np.flatnonzero(which) if which.dtype == bool else which)
        return Provenance(**{name: x.take(rows) for name, x in vars(self).items()})


def make_provenance(
    id: Sequence[str] | pa.Array,
    collection: Sequence[str] | pa.Array,
    href: Sequence[str | None] | str | None = None,
    *,
    height_datum: Sequence[str] | str = "ellipsoid",
    accuracy_m: Sequence[float | None] | float | None = None,
    levelled: Sequence[bool] | bool = True,
) -> Provenance:
    """Give lists, or one value for all, the form of columns."""
    given = {"id": id, "collection": collection, "href": href} | {
        "height_datum": height_datum,
        "accuracy_m": accuracy_m,
        "levelled": levelled,
    }
    columns = {}
    for name, kind in KINDS.items():
        values = given[name]
        if values is None or isinstance(values, str | float | int):
            columns[name] = pa.repeat(pa.scalar(values, kind), len(id))
        elif isinstance(values, pa.Array):
            columns[name] = values
        else:
            columns[name] = pa.array(values, kind, from_pandas=True)
    return Provenance(**columns)


def number_captures(captures: Captures) -> Provenance:
    """Name captures by drive and number in it, where no source has named them."""
    edges = drive_edges(captures.drive)
    place = np.arange(len(captures)) - np.repeat(edges[:-1], np.diff(edges))
    drive = pa.array(captures.drive).cast(pa.string())
    number = pc.utf8_lpad(pa.array(place).cast(pa.string()), 5, "0")
    return make_provenance(pc.binary_join_element_wise(drive, number, "-"), drive)


def check_provenance(provenance: Provenance, count: int, source: str) -> None:
    """Refuse columns of other lengths, ids that repeat, unknown datums."""
    for name, column in vars(provenance).items():
        if len(column) != count:
            raise ValueError(
                f"{source}: {count} captures but {len(column)} values of {name}; "
                f"{REBUILD}."
            )
    ids = provenance.id
    if ids.null_count or pc.any(pc.equal(ids, "")).as_py():
        raise ValueError(f"{source}: captures without an id; give each its own.")
    if pc.count_distinct(ids).as_py() != count:
        counts = ids.value_counts()
        again = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        raise ValueError(
            f"{source}: {len(again)} ids stand more than once, such as "
            f"{again[0].as_py()!r}; give each capture its own."
        )
    unknown = set(pc.unique(provenance.height_datum).to_pylist()) - set(DATUMS)
    if unknown:
        raise ValueError(
            f"{source}: height_datum {unknown.pop()!r} is unknown; use one of "
            f"{', '.join(DATUMS)}."
        )
