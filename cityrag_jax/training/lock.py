"""One process at a time in a folder: a lock file whose owner shows that it lives.

The owner touches the file every `BEAT_S`. Whoever finds a lock takes it over if its
process is known to be dead, else watches it for `PATIENCE_S`: one that is touched
belongs to a living process and is respected, one that is not is taken over, as after a
job that was moved to another machine. No clocks of different machines are compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

BEAT_S = 5.0
PATIENCE_S = 30.0


class WorkdirLock:
    """The lock of one workdir, or of one video's folder; release it, or die.

    Raises ValueError, on taking it, if another process has it.
    """

    def __init__(self, workdir: Path):
        self.path = workdir / "lock.json"
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    def take(self) -> None:
        """Take the lock, if need be after watching whether another's owner lives."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            owner = _read_owner(self.path)
            if _is_alive(self.path, owner):
                raise ValueError(
                    f"{self.path.parent} is in use by process "
                    f"{owner.get('pid')} on {owner.get('host')}. Wait for its end, or "
                    "choose another folder."
                )
            self.path.unlink(missing_ok=True)
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Give the workdir free; nothing if it was not taken."""
        if self._beating is not None:
            self._released.set()
            self._beating.join()
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        try:
            with self.path.open("x") as file:
                file.write(json.dumps(owner) + "\n")
        except FileExistsError:
            return False
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path)


def _read_owner(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # just released, or just being written
        return {}


def _is_alive(path: Path, owner: dict) -> bool:
    if owner.get("host") == socket.gethostname() and not is_running(owner.get("pid")):
        return False
    before, deadline = _touched(path), time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(BEAT_S / 10)
        if not path.exists():
            return False
        if _touched(path) != before:
            return True
    return False


def is_running(pid: int | None) -> bool:
    """Say whether another process of this machine has that number."""
    if pid is None or pid == os.getpid():  # a container gives the same to its next one
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _touched(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
