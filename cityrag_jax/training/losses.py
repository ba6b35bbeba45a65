"""Losses on their way from the devices to a report."""

import collections
from typing import NamedTuple

import jax
import numpy as np

from cityrag_jax.parallel import fetch
from cityrag_jax.training.step import check_finite


class Losses:
    """Metrics of the steps since the last report, left on the device until then.

    Adding those of a call waits for the end of the call `AHEAD` before it, so that the
    host never puts more batches on the devices.
    """

    AHEAD = 2

    SPIKES_AFTER, SPIKES_OF = 20, 100  # losses that a median is taken of

    def __init__(self, patience: int, spike: float = 0.0):
        self.patience, self.spike = patience, spike
        self.healthy = True
        self._steps, self._metrics = [], []
        self._bad: list[int] = []
        self._clips: dict[int, str] = {}  # of refused updates
        self._last = collections.deque(maxlen=self.SPIKES_OF)
        self._remarks: list[Remark] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keep the metrics of the updates of one call, the first of them `step`."""
        self._steps.extend(range(step, step + len(metrics["loss"])))
        self._metrics.append(metrics)
        if len(self._metrics) > self.AHEAD:
            jax.block_until_ready(self._metrics[-1 - self.AHEAD])

    @property
    def count(self) -> int:
        """The number of updates since the last report."""
        return len(self._steps)

    def collect(self) -> dict[str, float]:
        """Average over the finite steps; raise after `patience` bad ones in a row."""
        calls = fetch(self._metrics)
        metrics = {n: np.concatenate([call[n] for call in calls]) for n in calls[0]}
        bad = metrics.pop("refused").astype(bool)
        clips = metrics.pop("clips", np.zeros((len(bad), 0), np.uint32))
        steps = self._bad + self._steps
        refused = [True] * len(self._bad) + bad.tolist()
        self._look(metrics["loss"], bad, clips)
        check_finite(steps, refused, self.patience, self._clips)
        good = len(refused) - refused[::-1].index(False) if False in refused else 0
        self._bad = steps[good:]
        self._clips = {step: self._clips[step] for step in self._bad}
        self.healthy = not self._bad
        mean = {
            name: float(np.mean(x[~bad])) if not bad.all() else np.nan
            for name, x in metrics.items()
        }
        self._steps, self._metrics = [], []
        return mean | {"refused": float(bad.sum())}

    def take_remarks(self) -> "list[Remark]":
        """Give the updates that deserve a look, since this was last asked."""
        remarks, self._remarks = self._remarks, []
        return remarks

    def _look(self, losses, bad, clips) -> None:
        """Note refused updates, and losses far above the median of those before."""
        for step, loss, refused, ids in zip(
            self._steps, losses.tolist(), bad.tolist(), clips.tolist(), strict=True
        ):
            names = " ".join(f"{number:08x}" for number in ids)
            if refused:
                self._clips[step] = names
                self._remarks.append(Remark(step, "was not finite", loss, names))
                continue
            if self.spike and len(self._last) >= self.SPIKES_AFTER:
                usual = float(np.median(self._last))
                if loss > self.spike * usual:
                    told = f"is a spike, usual is {usual:.4f}"
                    self._remarks.append(Remark(step, told, loss, names))
            self._last.append(loss)


class Remark(NamedTuple):
    """An update whose loss deserves a look: what of it, and its clips."""

    step: int
    told: str
    loss: float
    clips: str

    def __str__(self) -> str:
        return f"step {self.step}: loss {self.loss:.4f} {self.told}; clips {self.clips}"


def mean_losses(losses: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Average the losses of clips over batches and probes, name by name."""
    return {name: float(np.mean(np.concatenate(x))) for name, x in losses.items()}
