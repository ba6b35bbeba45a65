"""A table of scores in a folder, which grows row by row and survives kills.

    table.json      every clip's figures and what they are made of; no other is taken
    table.md        their means, over the clips that all rows have
    examples/       strips of videos, until examples.png is put together from them

What is in table.json is never computed again. Of several processes the writer alone
writes, all know the same.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from cityrag_jax import report
from cityrag_jax.data.video import read_image, write_image
from cityrag_jax.leases import FolderLock
from cityrag_jax.metrics.image import mean_defined
from cityrag_jax.parallel import from_writer, is_writer, on_writer

TABLE, PICTURE, STRIPS = "table.json", "examples.png", "examples"
DECIMALS = {"gradient cosine": 3}

Figures = dict[str, list[float]]


class Table:
    """The figures of `wanted` clips in some rows. Enter it, and add what it lacks.

    `made_of` are the settings that decide about the figures: a folder that holds those
    of others is refused with a ValueError, and so is one in which another process is.
    """

    def __init__(
        self, folder: Path | str, rows: Sequence[str], wanted: int, made_of: Mapping
    ):
        self.folder, self.rows, self.wanted = Path(folder), tuple(rows), wanted
        self.made_of = json.loads(json.dumps(dict(made_of)))
        self.scores: dict[str, Figures] = {}
        self.note = ""  # on the examples
        self._lock = FolderLock(self.folder)

    def __enter__(self) -> "Table":
        try:
            on_writer(self._open)
            self.scores = json.loads(_from_writer(json.dumps(self.scores)))
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_):
        self._lock.release()

    def has(self, row: str, clips: int) -> bool:
        """Say whether a row has the figures of the first `clips` clips."""
        return count_clips(self.scores.get(row, {})) >= clips

    @property
    def pictured(self) -> bool:
        """Say whether the examples are drawn."""
        return _writer_has(self.folder / PICTURE)

    @property
    def finished(self) -> bool:
        """Say whether nothing is left to do."""
        scored = all(self.has(row, self.wanted) for row in self.rows)
        return scored and self.pictured

    def add(self, row: str, figures: Mapping[str, Float64[np.ndarray, " B"]]) -> None:
        """Add a row's figures of the next clips, and write the table."""
        kept = self.scores.setdefault(row, {})
        for metric, values in figures.items():
            kept.setdefault(metric, []).extend(values.tolist())
        on_writer(self._write)

    def means(self) -> dict[str, dict[str, float]]:
        """Average over the clips that all rows have, rows in the table's order."""
        count = self._count()
        return {
            row: {
                metric: float(mean_defined(np.array(values[:count])))
                for metric, values in self.scores[row].items()
            }
            for row in self.rows
            if row in self.scores
        }

    def __str__(self) -> str:
        count = self._count()
        of = "" if count == self.wanted else f" of {self.wanted}"
        title = f"{count}{of} unseen clips, PSNR in dB"
        return report.table(self.means(), title, DECIMALS)

    def keep_strips(
        self, name: str, strips: Sequence[UInt8[np.ndarray, "H W 3"]]
    ) -> None:
        """Keep strips of equal size, one of each example, without loss."""
        if is_writer():
            (self.folder / STRIPS).mkdir(exist_ok=True)
            write_image(self._strips(name), np.concatenate(strips))

    def has_strips(self, name: str) -> bool:
        """Say whether strips are kept under this name."""
        return _writer_has(self._strips(name))

    def draw_examples(self, names: Sequence[str], count: int, note: str = "") -> None:
        """Put the strips of `count` examples together, each under its name.

        A `note` on them stands below the table.
        """
        self.note = note
        if is_writer():
            self._write()
            rows = {n: np.split(read_image(self._strips(n)), count) for n in names}
            pictures = [
                np.concatenate([report.label(rows[name][i], name) for name in names])
                for i in range(count)
            ]
            write_image(self.folder / PICTURE, report.sheet(pictures, 1, gap=12))
            shutil.rmtree(self.folder / STRIPS)

    def _strips(self, name: str) -> Path:
        return self.folder / STRIPS / f"{name.replace(' ', '_')}.png"

    def _count(self) -> int:
        return min(map(count_clips, self.scores.values()), default=0)

    def _open(self) -> None:
        self._lock.take()
        path = self.folder / TABLE
        if not path.exists():
            return
        stored = report.read_facts(path)
        made_of, clips = stored.get("made of"), stored.get("clips")
        if not isinstance(made_of, dict) or not _are_scores(clips, self.rows):
            raise ValueError(
                f"{path} is no table that can be gone on with; delete it, or choose "
                "another --out."
            )
        differ = report.describe_differences(made_of, self.made_of)
        if differ:
            raise ValueError(
                f"{self.folder} holds other scores: {differ}. Choose another --out, or "
                "delete that folder."
            )
        self.scores, self.note = clips, str(stored.get("note", ""))

    def _write(self) -> None:
        stored = {"made of": self.made_of, "mean": self.means(), "clips": self.scores}
        note = {"note": self.note} if self.note else {}
        report.write_text(self.folder / TABLE, json.dumps(stored | note))
        text = f"{self}\n" + (f"\n{PICTURE}: {self.note}\n" if self.note else "")
        report.write_text(self.folder / "table.md", text)


def count_clips(figures: Figures) -> int:
    """Give the clips that a row has figures of."""
    return min(map(len, figures.values()), default=0)


def _are_scores(clips: Any, rows: Sequence[str]) -> bool:
    """Say whether this is what a table stores: finite or not, but numbers."""
    if not isinstance(clips, dict) or not clips.keys() <= set(rows):
        return False
    lists = [x for row in clips.values() if isinstance(row, dict) for x in row.values()]
    whole = all(isinstance(x, list) for x in lists)
    whole = whole and all(isinstance(row, dict) for row in clips.values())
    return whole and all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for values in lists
        for value in values
    )


def _writer_has(path: Path) -> bool:
    return bool(from_writer(np.bool_(is_writer() and path.exists())))


def _from_writer(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    length = int(from_writer(np.int32(len(data))))
    given = data if is_writer() else np.zeros(length, np.uint8)
    return from_writer(given).tobytes().decode()
