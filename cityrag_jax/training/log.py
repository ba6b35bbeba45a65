"""What a person sees of a training, and what is kept of it.

On a terminal a progress bar; where stdout is none (a file, a pipe, a cluster's log)
plain lines instead, each with the time of the day, written at once. `metrics.jsonl` in
the workdir has one line for each report; TensorBoard files if asked for.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from jaxtyping import UInt8

from cityrag_jax.files import named, write_whole
from cityrag_jax.parallel import is_writer
from cityrag_jax.progress import describe_time
from cityrag_jax.report import gif

Videos = UInt8[np.ndarray, "n T H W 3"]

TIMED_BAR = "{percentage:3.0f}%|{bar}| {n_fmt} of {total_fmt} s{postfix}"
# What a line says of a report, in order, and how.
SHOWN = {
    "loss": "loss {:.4f}",
    "held_out": "held-out {:.4f}",
    "seconds_per_step": "{:.2f} s a step",
    "mfu": "MFU {:.1%}",
    "data_wait_s": "data wait {:.2f} s",
    "memory_gib": "memory {:.1f} GiB",
    "learning_rate": "rate {:.2g}",
}


def say(text: str) -> None:
    """Print a line, of one process, above any bar."""
    if is_writer():
        with tqdm.tqdm.external_write_mode():
            print(text, flush=True)


def announce(text: str) -> None:
    """Print what begins now, with the time: something that may take minutes."""
    say(f"{time.strftime('%H:%M:%S')} {text}")


class NoLog:
    """What the processes that are not the writer report to."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def report(
        self, step: int, metrics: Mapping[str, float], seconds: float = 0.0
    ) -> None:
        """Do nothing, as all else here."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def remark(self, step: int, text: str) -> None: ...
    def show(self, step: int, videos: Videos, fps: float) -> None: ...
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
        self._last_step, self._max_seconds = last_step, max_seconds
        counted = dict(total=last_step, initial=first_step, unit="step")
        if max_seconds > 0:
            counted = dict(total=round(max_seconds), unit="s", bar_format=TIMED_BAR)
        hidden = not sys.stderr.isatty()
        self._bar = tqdm.tqdm(**counted, dynamic_ncols=True, disable=hidden)
        self._plain = not sys.stdout.isatty()
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(workdir))

    def report(
        self, step: int, metrics: Mapping[str, float], seconds: float = 0.0
    ) -> None:
        """Write the numbers of a step; `seconds` is what is spent of the limit of time.

        Of `data_wait_s`, the seconds that a step waited for its clips, the bar shows
        what can be noticed.
        """
        done = min(round(seconds), round(self._max_seconds)) or step
        self._bar.update((done if self._max_seconds > 0 else step) - self._bar.n)
        shown = {"step": str(step)} if self._max_seconds > 0 else {}
        shown |= {k: f"{metrics[k]:.4f}" for k in ("loss", "held_out") if k in metrics}
        if "mfu" in metrics:
            shown["MFU"] = f"{metrics['mfu']:.1%}"
        if metrics.get("data_wait_s", 0) >= 0.01:
            shown["data wait"] = f"{metrics['data_wait_s']:.2f} s"
        self._bar.set_postfix(shown)
        if self._plain:
            left = (self._last_step - step) * metrics.get("seconds_per_step", 0.0)
            if self._max_seconds > 0:
                left = min(left, max(self._max_seconds - seconds, 0.0))
            announce(describe_report(step, self._last_step, metrics, left))
        self.write(step, metrics)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write numbers without moving the bar."""
        numbers = {k: float(v) for k, v in metrics.items()}
        line = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        self._put({"step": step, **line})
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def remark(self, step: int, text: str) -> None:
        """Say something of a step, and keep it among the reports."""
        self._put({"step": step, "remark": text})
        say(text)

    def _put(self, line: dict[str, Any]) -> None:
        with named(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def show(self, step: int, videos: Videos, fps: float) -> None:
        """Play videos among TensorBoard's images, if there is TensorBoard."""
        if self._writer is None:
            return
        from tensorboardX.proto.summary_pb2 import Summary

        for number, video in enumerate(videos):
            height, width, colorspace = video.shape[1:]
            image = Summary.Image(
                height=height,
                width=width,
                colorspace=colorspace,
                encoded_image_string=gif(video, fps=fps),
            )
            value = Summary.Value(tag=f"sample_{number}", image=image)
            # `add_video` wants moviepy for the same bytes.
            self._writer.file_writer.add_summary(Summary(value=[value]), step)

    def close(self) -> None:
        """Close bar and files."""
        self._bar.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def describe_report(
    step: int, last_step: int, metrics: Mapping[str, float], left_s: float
) -> str:
    """Put a report into a line."""
    said = [
        form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics
    ]
    if metrics.get("refused"):
        said.append(f"{metrics['refused']:.0f} updates refused: not finite")
    said.append(f"{describe_time(left_s)} left")
    return f"step {step}/{last_step}: {', '.join(said)}"


def read_metrics(workdir: Path | str) -> list[dict[str, Any]]:
    """Read all lines of `metrics.jsonl`, oldest first."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _forget_after(path: Path, step: int) -> None:
    """Drop reports behind the checkpoint that a training goes on from."""
    if path.exists():
        kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
