"""Leases: who of many processes, on one host or many, works on a job or in a folder.

A lease is a file NAME.NUMBER, made by the one call that no two can succeed in. Its
holder touches it every `BEAT_S`. Who finds the holder dead, or the file untouched for
`PATIENCE_S`, takes over by making the next number; of several that try one succeeds.
The file with the highest number counts. No clocks of different machines are compared.
`Leases` are many, of a list of jobs; a `FolderLock` is one, of a whole folder.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from cityrag_jax.files import is_running, machine, open_folder

BEAT_S = 5.0
PATIENCE_S = 60.0
LOCK = "lock"  # the folder in a folder whose lease says who works there


class Leases:
    """The leases that this process holds in a folder. Threads may share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._held: dict[str, int] = {}
        self._seen: dict[Path, tuple[int, float]] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._beating: threading.Thread | None = None

    def take(self, name: str) -> bool:
        """Take a lease, unless somebody alive holds it."""
        with self._lock:
            if name in self._held:
                return False
            last = self._last(name)
            if last is not None and not self._is_free(self._file(name, last)):
                return False
            number = 0 if last is None else last + 1
            if not _create(self._file(name, number)):
                return False
            self._held[name] = number
            self._beat()
        return True

    def number(self, name: str) -> int:
        """Give the number of a lease that is held."""
        return self._held[name]

    def holds(self, name: str) -> bool:
        """Say whether nobody has taken over, as from a process that was suspended."""
        number = self._held[name]
        taken = self._file(name, number + 1).exists()
        return not taken and self._file(name, number).exists()

    def release(self, name: str, *, settled: bool) -> None:
        """Let go: for good where the job is settled, else for whoever comes next."""
        with self._lock:
            number = self._held.pop(name)
            if settled:
                for each in range(number + 1):
                    self._file(name, each).unlink(missing_ok=True)
            elif not self._file(name, number + 1).exists():
                self._file(name, number).write_text(json.dumps({"released": True}))

    def close(self) -> None:
        """Let go of everything."""
        for name in list(self._held):
            self.release(name, settled=False)
        self._ended.set()

    def holders(self) -> dict[str, dict[str, Any]]:
        """Give host and process of every lease that is held."""
        numbers: dict[str, int] = {}
        for name, number in self._files():
            numbers[name] = max(number, numbers.get(name, 0))
        owners = {k: _read_owner(self._file(k, n))[0] for k, n in numbers.items()}
        kept = {k: x for k, x in owners.items() if "pid" in x}
        return {k: {"host": x["host"], "pid": x["pid"]} for k, x in kept.items()}

    def touched(self, name: str) -> int | None:
        """Give when a lease was last touched, by its file system; None if nobody's."""
        last = self._last(name)
        return None if last is None else _read_owner(self._file(name, last))[1]

    def _file(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number:06}"

    def _files(self) -> list[tuple[str, int]]:
        parts = (entry.rpartition(".") for entry in _names(self.folder))
        return [(name, int(n)) for name, _, n in parts if name and n.isdecimal()]

    def _last(self, name: str) -> int | None:
        numbers = [number for each, number in self._files() if each == name]
        return max(numbers, default=None)

    def _is_free(self, file: Path) -> bool:
        owner, touched = _read_owner(file)
        if owner.get("released"):
            return True
        if owner.get("machine") == machine() and not is_running(owner.get("pid")):
            return True
        now = time.monotonic()
        before, since = self._seen.get(file, (None, now))
        if before != touched:
            self._seen[file] = (touched, now)
            return False
        return now - since >= PATIENCE_S

    def _beat(self) -> None:
        if self._beating is None:
            self._beating = threading.Thread(target=self._touch, daemon=True)
            self._beating.start()

    def _touch(self) -> None:
        while not self._ended.wait(BEAT_S):
            with self._lock:
                files = [self._file(name, n) for name, n in self._held.items()]
            for file in files:
                with contextlib.suppress(OSError):  # gone, or a disk that fails
                    os.utime(file)


class FolderLock:
    """One process at a time in a workdir or a video's folder; release it, or die."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._leases: Leases | None = None
        self._made = False

    def take(self) -> None:
        """Take the lock, if need be after watching whether another's owner lives.

        Raises ValueError if it does.
        """
        self._made = not self.folder.exists()
        open_folder(self.folder)
        leases = Leases(self.folder / LOCK)
        first = leases.touched(LOCK)
        while not leases.take(LOCK):
            if leases.touched(LOCK) not in (None, first):
                owner = leases.holders().get(LOCK, {})
                raise ValueError(
                    f"{self.folder} is in use by process {owner.get('pid')} on "
                    f"{owner.get('host')}. Wait for its end, or choose another folder."
                )
            time.sleep(BEAT_S / 10)
        self._leases = leases

    def release(self) -> None:
        """Give the folder free; nothing if it was not taken."""
        if self._leases is not None:
            self._leases.release(LOCK, settled=True)
            self._leases.close()
            with contextlib.suppress(OSError):  # somebody waits in it, or it is gone
                self._leases.folder.rmdir()
                if self._made:  # for the lock, and nothing else came
                    self.folder.rmdir()
            self._leases = None


def _create(file: Path) -> bool:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine()}
    file.parent.mkdir(parents=True, exist_ok=True)  # the last holder takes it away
    try:
        with file.open("x") as opened:
            opened.write(json.dumps(owner) + "\n")
    except FileExistsError:
        return False
    except OSError as error:
        file.unlink(missing_ok=True)
        raise ValueError(
            f"{file.parent} cannot be written to ({error.strerror}); make room, or "
            "choose another folder."
        ) from error
    return True


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _read_owner(file: Path) -> tuple[dict[str, Any], int]:
    """Give owner and time of touching; opening it makes NFS ask for the newest."""
    try:
        with file.open() as opened:
            touched = os.fstat(opened.fileno()).st_mtime_ns
            return json.loads(opened.read()), touched
    except FileNotFoundError:
        return {}, 0
    except ValueError:  # just being written
        return {}, touched
