"""A trace of some updates, to be opened by TensorBoard, xprof or ui.perfetto.dev."""

from pathlib import Path
from typing import Any

import jax

from cityrag_jax.training.log import announce


def parse_steps(text: str) -> range:
    """Read A:B, the first and the last update of a profile, counted from 1."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--profile={text} must be A:B, such as --profile=11:13.")
    steps = range(int(first), int(last) + 1)
    if not steps or steps[0] < 1:
        raise ValueError(f"--profile={text} must be 1 <= A <= B, counted from 1.")
    return steps


class Profile:
    """Traces the updates `steps` into `folder`, each process its own devices.

    The devices have nothing else to do when it starts and ends.
    """

    def __init__(self, folder: Path, steps: range):
        self._folder = folder
        self._steps = steps
        self._runs = False

    def before(self, step: int, state: Any) -> None:
        """Start if update `step` + 1 is the first, or behind it; `state` is waited for.

        A training that goes on further behind is not traced.
        """
        if not self._runs and step + 1 in self._steps:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._runs = True

    def after(self, step: int, metrics: Any) -> None:
        """End if update `step` was the last."""
        if self._runs and step >= self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """End a trace that runs."""
        if self._runs:
            self._runs, self._steps = False, range(0)
            jax.profiler.stop_trace()
            announce(f"a profile is in {self._folder}")
