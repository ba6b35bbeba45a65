"""What is due behind an update, the same on every process: report, save, stop.

SIGTERM (a scheduler takes the machine back) and SIGINT (Ctrl-C) end a training behind
the running step, with a checkpoint; a second SIGINT ends it at once. One process that
is told to stop stops them all.
"""

import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from cityrag_jax.parallel import any_process, is_writer

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A training was told to stop before its end; `code` is what to exit with."""

    def __init__(self, number: int, said: str):
        super().__init__(f"{signal.Signals(number).name}: {said}")
        self.code = 128 + number


class Signals:
    """Context: signals are noted instead of ending the process; the last is kept."""

    received = 0

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if number == self.received == signal.SIGINT:
            raise Stopped(number, "stopped at once, nothing was saved.")
        self.received = number


class Due(NamedTuple):
    """What is to be done behind an update; `signal` is the one that stops it, or 0."""

    report: bool
    evaluate: bool
    save: bool
    last: bool
    signal: int


class Schedule:
    """The intervals and limits of a config, in steps and in the writer's minutes."""

    def __init__(self, config: ConfigDict, signals: Signals):
        self._train, self._eval = config.train, config.eval
        self._signals = signals
        self.start()

    def start(self) -> None:
        """Start all clocks: the limit of time, and the time since a checkpoint."""
        self._began = self._saved = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds of training."""
        return time.monotonic() - self._began

    def after(self, step: int) -> Due:
        """Say what is due; with several processes all ask it, behind every call."""
        train = self._train
        minutes = (time.monotonic() - self._saved) / 60
        limits = (
            0 < train.max_seconds < self.spent,
            0 < train.checkpoint_minutes < minutes,
        )
        votes = [self._signals.received == number for number in SIGNALS]
        votes += [is_writer() and limit for limit in limits]
        *told, time_is_over, minutes_are_over = any_process(np.array(votes)).tolist()
        stopping = next((n for n, x in zip(SIGNALS, told, strict=True) if x), 0)
        last = step >= train.steps or time_is_over
        save = last or bool(stopping) or minutes_are_over
        save |= step % train.checkpoint_interval == 0
        evaluate = not stopping and (last or step % self._eval.interval == 0)
        report = save or evaluate or step % train.log_interval == 0
        if save:
            self._saved = time.monotonic()
        return Due(report, evaluate, save, last, int(stopping))


def describe_stop(number: int, step: int, saved: list[int], workdir: Path) -> Stopped:
    """Say where a training that was told to stop can go on."""
    kept = f"saved step {step}" if step in saved else f"step {step} was not saved"
    if saved and step not in saved:
        kept += f" (not finite), the last that was is {saved[-1]}"
    return Stopped(number, f"{kept}; the same command goes on in {workdir}.")
