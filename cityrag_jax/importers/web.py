"""A patient client of public picture services: JSON and files over HTTP.

Waits as long as it is told (Retry-After, RFC 9110 section 10.2.3), backs off where it
is not, keeps to a number of requests a second for each host, and gives up on one thing
without giving up on the others. Threads share one client.
"""

import contextlib
import email.utils
import hashlib
import json
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

TRIES = 6  # with waits of 1, 2, 4, 8 and 16 s: half a minute of trouble is survived
LONGEST_S = 600.0  # that a service may ask us to wait
TIMEOUT_S = (10.0, 60.0)  # to connect; between two packets
PER_S = 10.0  # requests to one host
BLOCK = 1 << 18
AGENT = "cityrag-jax (importer of street panoramas)"


class Refused(ValueError):
    """What a service answers about this one thing, and will answer again."""

    def __init__(self, message: str, status: int, body: str):
        super().__init__(message)
        self.status, self.body = status, body


class Unreachable(ValueError):
    """A service that gives no whole answer, however often it is asked."""


class Client:
    """Gets JSON and files; `clock` and `sleep` are those of `time`, or a test's."""

    def __init__(
        self,
        *,
        tries: int = TRIES,
        per_s: float = PER_S,
        timeout_s: tuple[float, float] = TIMEOUT_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._tries, self._spacing_s = tries, 1 / per_s
        self._timeout_s, self._sleep, self._clock = timeout_s, sleep, clock
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}  # when a host may be asked again
        self._local = threading.local()

    def read_json(
        self, url: str, headers: dict[str, str] | None = None, **query: Any
    ) -> dict[str, Any]:
        """Get a JSON object; Refused for 4xx, Unreachable when all tries fail."""

        def read(response: requests.Response) -> dict[str, Any]:
            document = json.loads(response.content)
            if not isinstance(document, dict):
                raise ValueError(f"{type(document).__name__} instead of an object")
            return document

        return self._try(url, read, headers, query)

    def save(self, url: str, path: Path, check: Callable[[Path], Any]) -> None:
        """Get a file, under a temporary name until it is whole.

        `check` raises ValueError if what came is not what was wanted: it is tried
        again.
        """

        def read(response: requests.Response) -> None:
            token = hashlib.sha256(url.encode()).hexdigest()[:8]
            part = path.with_name(f".{path.name}-{os.getpid()}-{token}")
            try:
                with part.open("wb") as file:
                    for block in response.iter_content(BLOCK):
                        file.write(block)
                    size = file.tell()
                wanted = response.headers.get("Content-Length", "")
                encoded = "Content-Encoding" in response.headers
                if size == 0 or wanted.isdigit() and not encoded and size < int(wanted):
                    raise ValueError(f"{size} of {wanted or 'some'} bytes came")
                check(part)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

        self._try(url, read, None, {})

    def _try(self, url: str, read: Callable, headers: dict | None, query: dict) -> Any:
        host, why = urllib.parse.urlsplit(url).netloc, ""
        for number in range(self._tries):
            self._take_turn(host)
            wait_s = 2.0**number * (1 + random.random() / 4)
            try:
                with self._ask(url, headers, query) as response:
                    if response.status_code < 400:
                        return read(response)
                    why = f"status {response.status_code}"
                    body = response.content[:2000].decode(errors="replace")
                    if _is_final(response.status_code):
                        told = " ".join(body.split())[:200]
                        message = f"{_plain(url)}: {why} ({told or 'no words'})."
                        raise Refused(message, response.status_code, body)
                    told_s = _retry_after(response.headers.get("Retry-After"))
                    wait_s = wait_s if told_s is None else told_s
            except Refused:
                raise
            # requests and urllib3 raise many kinds; JSON and short bodies ValueError.
            except (requests.RequestException, ValueError) as error:
                # The last cause alone: before it stand addresses with their queries.
                cause = str(error).rsplit(": ", 1)[-1].strip("'\")> ")
                why = f"{type(error).__name__}: {cause}"
            if wait_s > LONGEST_S:
                raise Unreachable(
                    f"{host} asks to be left alone for {wait_s / 60:.0f} minutes; give "
                    "the same command again then, it goes on where it stopped."
                )
            if number + 1 < self._tries:
                self._pause(host, wait_s)
        raise Unreachable(
            f"{_plain(url)}: no answer in {self._tries} tries ({why}). Look at the "
            "network, and give the same command again: it goes on where it stopped."
        )

    @contextlib.contextmanager
    def _ask(self, url: str, headers, query) -> Iterator[requests.Response]:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.headers["User-Agent"] = AGENT
        kinds = dict(params=query, timeout=self._timeout_s, stream=True)
        with self._local.session.get(url, headers=headers, **kinds) as response:
            yield response

    def _take_turn(self, host: str) -> None:
        """Wait until this host may be asked, and put the next one behind us."""
        with self._lock:
            turn = max(self._next.get(host, 0.0), self._clock())
            self._next[host] = turn + self._spacing_s
        wait_s = turn - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)

    def _pause(self, host: str, wait_s: float) -> None:
        """Let nobody ask a host for a while: it told one, and means all."""
        with self._lock:
            later = self._clock() + wait_s
            self._next[host] = max(self._next.get(host, 0.0), later)


def _is_final(status: int) -> bool:
    return status < 500 and status not in (408, 425, 429)


def _retry_after(told: str | None) -> float | None:
    """Read seconds, or the seconds until a date."""
    if told is None:
        return None
    if told.strip().isdigit():
        return float(told)
    try:
        moment = email.utils.parsedate_to_datetime(told)
    except ValueError:
        return None
    return max(0.0, moment.timestamp() - time.time())


def _plain(url: str) -> str:
    """Leave out what follows the path: signatures and tokens stand there."""
    return urllib.parse.urlsplit(url)._replace(query="", fragment="").geturl()
