"""Pairs of a city: windows of one drive, and where another one goes along them.

pairs.parquet holds a row for each, bound to the captures that it was mined from
(`mining`), and the rules. Neighbourhoods can be held out for evaluation: their pairs
are marked, and no training pair shows a capture of theirs or one near to theirs. Pairs
are ordered: (a, b) and (b, a) are two.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from cityrag_jax.data import tables
from cityrag_jax.data.columns import CAPTURES, captures_digest

PAIRS = "pairs.parquet"


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """What counts as a pair. Defaults are the paper's or *assumed* where it is silent.

    `min_gap_s` keeps the two captures of a place apart in time (*assumed* 2 hours:
    morning and afternoon). `stride` is the step between windows of a drive.
    `min_condition` captures must be left in drive b. `held_out` lists neighbourhoods;
    None draws `held_out_fraction` of them by `seed`. 1.0 holds out the whole city.
    Neither drive may go back by more than `max_back_m` of noise, or leap by more than
    `max_step_m`. Heights of two drives may differ by an offset of `max_offset_m` (a
    bridge is higher), and otherwise by `max_height_m` on average. Training keeps
    `buffer_m` away from what is held out. All these are *assumed*. `every_pass` tells
    the passes of a drive apart; without, a drive is one, as toy cities were mined for
    the figures that are published of them.
    """

    num_frames: int = 73
    max_mean_distance_m: float = 5.0
    min_gap_s: float = 7200.0
    max_turn_deg: float = 45.0
    stride: int = 8
    min_condition: int = 61
    max_back_m: float = 2.0
    max_step_m: float = 20.0
    max_offset_m: float = 15.0
    max_height_m: float = 3.0
    buffer_m: float = 0.0
    every_pass: bool = True
    held_out: tuple[int, ...] | None = None
    held_out_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.num_frames < 2 or self.stride < 1:
            raise ValueError(
                f"num_frames is {self.num_frames} and stride {self.stride}; a clip has "
                "2 frames or more, and windows lie 1 capture or more apart."
            )


# Type and shape of a row of every stored column.
COLUMNS = {
    "drive_a": (np.int32, ()),
    "start_a": (np.int64, ()),
    "drive_b": (np.int32, ()),
    "start_b": (np.int64, ()),
    "mean_distance_m": (np.float64, ()),
    "neighbourhood": (np.int32, ()),
    "held_out": (np.bool_, ()),
}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Columns of pairs; starts are indices into the city's captures.

    `neighbourhood` is that of the window's first capture.
    """

    drive_a: Int32[np.ndarray, " P"]
    start_a: Int64[np.ndarray, " P"]
    drive_b: Int32[np.ndarray, " P"]
    start_b: Int64[np.ndarray, " P"]
    mean_distance_m: Float64[np.ndarray, " P"]
    neighbourhood: Int32[np.ndarray, " P"]
    held_out: Bool[np.ndarray, " P"]
    num_frames: int

    def __len__(self) -> int:
        return len(self.start_a)

    def select(self, mask: Bool[np.ndarray, " P"]) -> "Pairs":
        """Keep the pairs of a mask, in order."""
        kept = {f.name: getattr(self, f.name)[mask] for f in _columns()}
        return Pairs(**kept, num_frames=self.num_frames)

    @property
    def training(self) -> "Pairs":
        return self.select(~self.held_out)

    @property
    def evaluation(self) -> "Pairs":
        return self.select(self.held_out)


def _columns() -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(Pairs) if f.name != "num_frames"]


def save_pairs(
    folder: str | Path, pairs: Pairs, config: PairConfig | None = None
) -> None:
    """Write a city's pairs.parquet, whole or not at all, bound to its captures.

    `config` is kept, for whoever mines the city again when it has grown.
    """
    columns = {f.name: getattr(pairs, f.name) for f in _columns()}
    notes = {
        "num_frames": pairs.num_frames,
        "captures": captures_digest(Path(folder)),
        "rules": dataclasses.asdict(config) if config else {},
        "digest": tables.digest([*columns.values(), np.array(pairs.num_frames)]),
    }
    tables.write_table(Path(folder) / PAIRS, columns, notes)


def read_rules(folder: str | Path) -> dict[str, Any]:
    """Give the values of `PairConfig` that a city was mined with; none, if not yet.

    Neighbourhoods that are held out stay so, whatever is added to the city.
    """
    path = Path(folder) / PAIRS
    if not path.exists():
        return {}
    again = f"mine pairs again with tools/build_city.py --mine={Path(folder)}"
    rules = tables.read_notes(path, again).get("rules", {})
    known = {f.name for f in dataclasses.fields(PairConfig)}
    if not isinstance(rules, dict) or not set(rules) <= known:
        raise ValueError(f"{path} is damaged: its rules are {rules!r}; {again}.")
    held_out = {"held_out": tuple(rules["held_out"])} if rules.get("held_out") else {}
    return rules | held_out


def load_pairs(folder: str | Path) -> Pairs:
    """Read a city's pairs; ValueError tells how to mine them."""
    path = Path(folder) / PAIRS
    if not path.exists():
        raise ValueError(
            f"{path} is missing; mine pairs with "
            f"tools/build_city.py --mine={Path(folder)}."
        )
    again = f"mine pairs again with tools/build_city.py --mine={Path(folder)}"
    columns = tables.read_columns(path, COLUMNS, again)
    notes = tables.read_notes(path, again)
    num_frames, stored = notes.get("num_frames"), captures_digest(Path(folder))
    if notes.get("captures") != stored:
        raise ValueError(
            f"{path} was mined from other captures (digest {notes.get('captures')}) "
            f"than {CAPTURES} holds ({stored}); {again}."
        )
    if type(num_frames) is not int or not 0 < num_frames < 2**16:
        raise ValueError(f"{path} is damaged: clips of {num_frames} frames; {again}.")
    found = tables.digest([*columns.values(), np.array(num_frames)])
    tables.check_digest(path, notes, found, again)
    return Pairs(**columns, num_frames=num_frames)
