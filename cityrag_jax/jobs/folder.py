"""The folder of a list of jobs: all that processes know of each other stands here.

    run.json            what every video is made by: model, city, config
    videos/ID/          a finished video; it appears whole
    work/ID.NUMBER/     one in the making, by the lease of that number (`jobs.leases`)
    failed/ID.json      why a job cannot be done
    leases/             who is at work
    logs/HOST-PID.jsonl a line for every job that a process ended
    status.json         the count of all, for people and monitors

Who takes a job over renames its work to his own number: the clips that are there stay,
and a process that was thought dead writes beside it, never into it.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cityrag_jax import report
from cityrag_jax.files import named, open_folder
from cityrag_jax.jobs.lines import JobLine
from cityrag_jax.leases import LOCK, Leases
from cityrag_jax.parallel import on_writer
from cityrag_jax.recording import CLIPS

RUN, STATUS, LINE = "run.json", "status.json", "line.json"


class JobsFolder:
    """The jobs of a list, and what has become of them. Threads may share it.

    Of joined processes the writer alone has `leases` and acts. Raises ValueError where
    the folder's videos are made by something else.
    """

    def __init__(
        self, out: Path | str, lines: Sequence[JobLine], made_by: dict[str, Any]
    ):
        self.out, self.lines = Path(out), lines
        self.videos, self.failed = self.out / "videos", self.out / "failed"
        self._work, self._logs = self.out / "work", self.out / "logs"
        self._log = self._logs / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        self._lock, self._settled = threading.Lock(), {}
        on_writer(lambda: self._open(json.loads(json.dumps(made_by))))

    def _open(self, made_by: dict[str, Any]) -> None:
        open_folder(self.out)
        for folder in (self.videos, self.failed, self._work, self._logs):
            folder.mkdir(exist_ok=True)
        self.leases = Leases(self.out / "leases")
        if not self._has_begun():  # who was refused may have been here
            (self.out / RUN).unlink(missing_ok=True)
        self._claim(made_by)

    def next(self) -> tuple[int | None, bool]:
        """Take the lease of the first job that is open: its place in the list.

        None where there is none; the second value says if any is still open then, held
        by somebody else.
        """
        waits = False
        for place, line in enumerate(self.lines):
            if self.outcome(line) is not None:
                continue
            if not self.leases.take(line.name):
                waits = True
            elif self.outcome(line) is None:
                return place, True
            else:  # settled between the two looks
                self.leases.release(line.name, settled=True)
        return None, waits

    def outcome(self, line: JobLine) -> str | None:
        """Say whether a job is "done" or "failed"; None while it is open.

        A job that failed is open again once its line or its files change.
        """
        if line.name in self._settled:
            return self._settled[line.name]
        found = None
        if (self.videos / line.name).exists() and not self.changed(line):
            found = "done"
        elif (self.failed / f"{line.name}.json").exists():
            told = read_record(self.failed / f"{line.name}.json")
            found = "failed" if told.get("line") == line.facts() else None
        if found is not None:
            self._settled[line.name] = found
        return found

    def changed(self, line: JobLine) -> str:
        """Say how a finished video is another than the line asks for; else empty."""
        stored = read_record(self.videos / line.name / LINE)
        return report.describe_differences(stored, line.facts())

    def explain_other(self, line: JobLine) -> str:
        """Say that there is another video under a line's id; empty if there is none."""
        folder = self.videos / line.name
        if not folder.exists():
            return ""
        return (
            f"{folder} is the video of another line: {self.changed(line)}. Give this "
            "one another id, or delete that folder."
        )

    def work(self, line: JobLine, number: int) -> Path:
        """Give the folder that the holder of a lease's number works in."""
        return self._work / f"{line.name}.{number:06}"

    def open_work(self, line: JobLine, number: int) -> None:
        """Make that folder: of what others left of the same video, or a new one."""
        own = self.work(line, number)
        left = sorted(self._work.glob(f"{line.name}.{'[0-9]' * 6}"))
        if left and left[-1] != own:
            left[-1].rename(own)
        for other in left[:-1]:
            shutil.rmtree(other, ignore_errors=True)
        facts = line.facts()
        if own.exists() and read_record(own / LINE) != facts:
            shutil.rmtree(own)
        own.mkdir(exist_ok=True)
        shutil.rmtree(own / LOCK, ignore_errors=True)  # of the holder before
        report.write_text(own / LINE, json.dumps(facts, indent=1) + "\n")

    def finish(self, line: JobLine) -> None:
        """Let the finished video appear."""
        number = self.leases.number(line.name)
        self.work(line, number).rename(self.videos / line.name)
        (self.failed / f"{line.name}.json").unlink(missing_ok=True)
        self._settle(line, "done")

    def fail(self, line: JobLine, reason: str) -> None:
        """Record why a job cannot be done."""
        told = {"reason": reason, "number": line.number, "line": line.facts()}
        text = json.dumps(told, indent=1) + "\n"
        report.write_text(self.failed / f"{line.name}.json", text)
        for work in self._work.glob(f"{line.name}.{'[0-9]' * 6}"):
            shutil.rmtree(work, ignore_errors=True)
        self._settle(line, "failed")

    def let_go(self, line: JobLine) -> None:
        """Leave a job to whoever comes next, or has come."""
        if not self.leases.holds(line.name):
            work = self.work(line, self.leases.number(line.name))
            shutil.rmtree(work, ignore_errors=True)  # his is another
        self.leases.release(line.name, settled=False)

    def close(self) -> None:
        """Let go of all, and leave the last status."""
        self.leases.close()
        self.write_status()

    def log(self, line: JobLine, state: str, **facts: Any) -> None:
        """Write and print the line of a job that this process ended, and the status."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        told = {"time": when, "id": line.name, "state": state, **facts}
        with self._lock, named(self._log), self._log.open("a") as file:
            file.write(json.dumps(told) + "\n")
        shown = ", ".join(f"{key} {value}" for key, value in facts.items())
        print(f"job {line.name} {state}: {shown}", flush=True)
        self.write_status()

    def write_status(self) -> dict[str, Any]:
        """Count all jobs, write the count, and give it."""
        with self._lock:
            outcomes = {line.name: self.outcome(line) for line in self.lines}
            failed = [name for name, state in outcomes.items() if state == "failed"]
            open_jobs = [name for name, state in outcomes.items() if state is None]
            running = {k: x for k, x in self.leases.holders().items() if k in open_jobs}
            records = {k: read_record(self.failed / f"{k}.json") for k in failed}
            status = {
                "jobs": len(self.lines),
                "done": len(self.lines) - len(failed) - len(open_jobs),
                "waiting": len(open_jobs) - len(running),
                "running": running,
                "failed": {k: told.get("reason") for k, told in records.items()},
            }
            report.write_text(self.out / STATUS, json.dumps(status, indent=1) + "\n")
        return status

    def _settle(self, line: JobLine, outcome: str) -> None:
        self._settled[line.name] = outcome
        self.leases.release(line.name, settled=True)

    def _has_begun(self) -> bool:
        """Say whether anything was made here, or is about to be."""
        made = (*self.videos.iterdir(), *self.failed.iterdir())
        clips = self._work.glob(f"*/{CLIPS}")
        return any(made) or any(clips) or bool(self.leases.holders())

    def _claim(self, made_by: dict[str, Any]) -> None:
        file = self.out / RUN
        if not file.exists():
            temporary = file.with_name(f".{file.name}-{os.getpid()}")
            temporary.write_text(json.dumps(made_by, indent=1) + "\n")
            try:
                os.link(temporary, file)  # fails where another process was first
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        differ = report.describe_differences(read_record(file), made_by)
        if differ:
            raise ValueError(
                f"{self.out} holds videos made otherwise: {differ}. Choose another "
                "--out, or delete that folder."
            )


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none, or nothing that is whole."""
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
