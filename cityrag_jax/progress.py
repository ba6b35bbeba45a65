"""How far something long is: a bar on a terminal, elsewhere a line each half minute.

The lines go where the bar would, to stderr, with the time of the day, what is done,
the speed and the time that is left, so that a cluster's log can be read.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

EVERY_S = 30.0

T = TypeVar("T")


class Progress:
    """Context: `update` says that more is done of `total` things named `unit`s."""

    def __init__(self, doing: str, total: int, unit: str, *, shown: bool = True):
        self._plain = shown and not sys.stderr.isatty()
        hidden = self._plain or not shown
        kinds = dict(desc=doing, unit=f" {unit}", dynamic_ncols=True)
        kinds |= dict(unit="B", unit_scale=True) if unit == "byte" else {}
        self._bar = tqdm.tqdm(total=total, disable=hidden, **kinds)
        self._doing, self._total, self._unit = doing, total, unit
        self._done, self._remark = 0, ""
        self._began = self._told = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def update(self, count: int = 1) -> None:
        """Say that so many more are done."""
        self._bar.update(count)
        self._done += count
        if self._plain and time.monotonic() - self._told >= EVERY_S:
            self._tell()

    def reach(self, count: int) -> None:
        """Say that so many are done in all."""
        self.update(count - self._done)

    def remark(self, text: str) -> None:
        """Show what is done just now behind the bar."""
        self._bar.set_postfix_str(text)
        self._remark = text

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with tqdm.tqdm.external_write_mode():
            print(text, flush=True)

    def close(self) -> None:
        """End the bar; say the end where lines were said before."""
        self._bar.close()
        if self._plain and self._told > self._began:
            self._tell()
        self._plain = False

    def _tell(self) -> None:
        self._told = time.monotonic()
        spent = self._told - self._began
        speed = self._done / spent
        done, total = self._done, f"{self._total} {self._unit}s"
        if self._unit == "byte":
            done, total = f"{done / 1e9:.2f}", f"{self._total / 1e9:.2f} GB"
        line = f"{time.strftime('%H:%M:%S')} {self._doing}: {done} of {total}, "
        line += describe_speed(speed, self._unit)
        if 0 < self._done < self._total:
            left = describe_time((self._total - self._done) / speed)
            line += f", {left} left"
        if self._remark and self._done < self._total:
            line += f" ({self._remark})"
        print(line, file=sys.stderr, flush=True)


def tracked(things: Iterable[T], doing: str, total: int, unit: str) -> Iterator[T]:
    """Give the things, and show how many were taken and dealt with."""
    with Progress(doing, total, unit) as progress:
        for thing in things:
            yield thing
            progress.update()


def describe_speed(per_second: float, unit: str) -> str:
    """Say how fast something goes: 3.2 a second, 12.5 s a clip, 0.31 GB a second."""
    if unit == "byte":
        return f"{per_second / 1e9:.2f} GB a second"
    if per_second >= 1 or per_second == 0:
        return f"{per_second:.1f} a second"
    return f"{1 / per_second:.1f} s a {unit}"


def describe_time(seconds: float) -> str:
    """Say how long something takes: 42 s, 17 min, 3 h 05 min, 6 d 14 h."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{hours // 24} d {hours % 24} h"
