"""What a person sees of a training, and what is kept of it.

A progress bar with loss, speed and time left; `metrics.jsonl` in the workdir, one line
for each report; TensorBoard files if asked for.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tqdm

TIMED_BAR = "{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} s{postfix}"


class NoLog:
    """What the processes that are not the writer report to."""

    def report(
        self, step: int, metrics: Mapping[str, float], seconds: float = 0.0
    ) -> None:
        """Do nothing, as all else here."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class TrainingLog(NoLog):
    """Reports of a training; one that is resumed goes on in the same files.

    The bar counts steps, or seconds where `max_seconds` limits the time.
    """

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        last_step: int,
        *,
        max_seconds: float = 0.0,
        tensorboard: bool,
    ):
        self._path = Path(workdir) / "metrics.jsonl"
        _forget_after(self._path, first_step)
        self._file = self._path.open("a")
        self._timed = max_seconds > 0
        counted = dict(total=last_step, initial=first_step, unit="step")
        if self._timed:
            counted = dict(total=round(max_seconds), unit="s", bar_format=TIMED_BAR)
        self._bar = tqdm.tqdm(**counted, dynamic_ncols=True)
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(workdir))
        self._step, self._time = first_step, time.monotonic()

    def report(
        self, step: int, metrics: Mapping[str, float], seconds: float = 0.0
    ) -> None:
        """Write the numbers of a step, with the speed since the last report.

        `seconds` is what is spent of the limit of time. Of `data_wait_s`, the seconds
        that a step waited for its clips, the bar shows what can be noticed.
        """
        now = time.monotonic()
        speed = (step - self._step) / max(now - self._time, 1e-9)
        done = min(round(seconds), self._bar.total) if self._timed else step
        self._bar.update(done - self._bar.n)
        shown = {"step": str(step)} if self._timed else {}
        shown |= {k: f"{metrics[k]:.4f}" for k in ("loss", "held_out") if k in metrics}
        if metrics.get("data_wait_s", 0) >= 0.01:
            shown["data wait"] = f"{metrics['data_wait_s']:.2f} s"
        self._bar.set_postfix(shown)
        self._step, self._time = step, now
        self.write(step, {**metrics, "steps_per_second": speed})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write numbers without moving the bar."""
        numbers = {k: float(v) for k, v in metrics.items()}
        line = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text)

    def close(self) -> None:
        """Close bar and files."""
        self._bar.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(workdir: Path | str) -> list[dict[str, Any]]:
    """Read all lines of `metrics.jsonl`, oldest first."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _forget_after(path: Path, step: int) -> None:
    """Drop reports behind the checkpoint that a training goes on from."""
    if path.exists():
        kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
