"""A process that lives but gets no further is named, and the training ends.

One that died leaves the others waiting, too, until JAX ends them without a word on who
it was (100 s). So each is listened to: the first process by all, all by the first.
One that hangs (a disk that does not answer, a worker
without an end) leaves the others waiting inside a collective for ever. So each process
says in a file of the workdir how far it is, touched as long as it lives, and one that
has got no further for the limit reads what all say: the culprits are those that have
stopped touching theirs, or else those behind the others.
"""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import jax

from cityrag_jax.parallel import is_peer_lost

STUCK = 75  # exit code: try again (EX_TEMPFAIL)
LOST_S = 60.0  # of silence, before JAX's own 100 s are over


class Watchdog:
    """Context: ends this process when nothing new is said for `limit_s`; 0: never.

    `folder` is one that all processes see.
    """

    def __init__(self, folder: Path, limit_s: float):
        self._folder, self._limit_s = folder, limit_s
        self._file = folder / f"{jax.process_index()}.json"
        self._count, self._doing = 0, "starting"
        self._since = time.monotonic()
        self._heard: dict[int, tuple[float, float, int]] = {}
        self._look_s = min(1.0, limit_s / 10)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        if self._limit_s > 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, _):
        if self._limit_s > 0 and error is not None and is_peer_lost(error):
            self._end(describe_lost(self._silent(), "its connection broke"))
        self._closed.set()
        if self._limit_s > 0:
            self._thread.join()
            self._file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still in it
                self._folder.rmdir()

    def at(self, doing: str) -> None:
        """Say what begins now; all processes say the same things in the same order."""
        self._count += 1
        self._doing, self._since = doing, time.monotonic()

    def _watch(self) -> None:
        count = -1
        while not self._closed.wait(self._look_s):
            if self._count != count:
                count = self._count
                with contextlib.suppress(OSError):  # is the disk full, a save says so
                    self._tell(count)
            with contextlib.suppress(OSError):
                os.utime(self._file)
            told = self._lost() if jax.process_count() > 1 else None
            if told is None and time.monotonic() - self._since > self._limit_s:
                told = self._verdict()
            if told is not None:
                self._end(told)

    @staticmethod
    def _end(told: str) -> None:
        """End at once: JAX's own end waits for all, and aborts without them."""
        print(told, file=sys.stderr, flush=True)
        os._exit(STUCK)

    def _tell(self, count: int) -> None:
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"count": count, "doing": self._doing}))
        os.replace(temporary, self._file)

    def _lost(self) -> str | None:
        """Say which process has fallen silent since it was heard of; None if none.

        Counted in looks, not in time, in which all may have been suspended.
        """
        peers = [0] if jax.process_index() else range(1, jax.process_count())
        for peer in peers:
            try:  # opening it makes NFS ask for the newest
                with (self._folder / f"{peer}.json").open() as file:
                    touched = os.fstat(file.fileno()).st_mtime
            except OSError:  # not begun, or at its end
                self._heard.pop(peer, None)
                continue
            first, last, looks = self._heard.get(peer, (touched, touched, 0))
            looks = looks + 1 if touched == last else 0
            self._heard[peer] = first, touched, looks
            if touched != first and looks * self._look_s > LOST_S:
                return describe_lost([peer], f"no sign of life for {LOST_S:.0f} s")
        return None

    def _silent(self) -> list[int]:
        """Watch for a moment which processes touch their file no more."""

        def touched() -> dict[int, float]:
            found = {}
            for number in range(jax.process_count()):
                with contextlib.suppress(OSError):
                    file = self._folder / f"{number}.json"
                    found[number] = file.stat().st_mtime
            return found

        before = touched()
        time.sleep(4 * self._look_s)
        after = touched()
        return [number for number in before if before[number] == after.get(number)]

    def _verdict(self) -> str:
        """Say who is stuck; times are compared on the file system's own clock."""
        os.utime(self._file)
        now = self._file.stat().st_mtime
        places = {jax.process_index(): {"count": self._count, "doing": self._doing}}
        for file in self._folder.glob("*.json"):
            if int(file.stem) < jax.process_count():  # not of a larger training before
                silent = now - file.stat().st_mtime > self._limit_s / 2
                told = json.loads(file.read_text()) | {"silent": silent}
                places.setdefault(int(file.stem), told)
        return describe_stuck(places, self._limit_s)


def describe_lost(peers: list[int], reason: str) -> str:
    """Say that a process is gone, and what to do."""
    name = f"process {', '.join(map(str, peers))}" if peers else "another process"
    return (
        f"error: {name} is lost ({reason}), and no update can end without it. The "
        "training ends here; look at its machine and at what it said last, end what is "
        "left of it, and the same command goes on from the last checkpoint."
    )


def describe_stuck(places: dict[int, dict], limit_s: float) -> str:
    """Name those that are silent, else those behind all others, and what they do."""
    least = min(place["count"] for place in places.values())
    silent = {n: p for n, p in sorted(places.items()) if p.get("silent")}
    behind = silent or {n: p for n, p in sorted(places.items()) if p["count"] == least}
    if len(behind) == len(places):
        culprits = f"all processes, {next(iter(behind.values()))['doing']}"
    else:
        culprits = ", ".join(f"process {n}, {p['doing']}" for n, p in behind.items())
    return (
        f"error: no progress for {limit_s:.0f} s: stuck is {culprits}. The training "
        "ends here; end what is left of that process, look at its machine and disks, "
        "and the same command goes on from the last checkpoint. "
        "(config.train.stuck_s is the limit.)"
    )
