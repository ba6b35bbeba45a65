"""Losses on their way from the devices to a report."""

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

    def __init__(self, patience: int):
        self.patience = patience
        self.healthy = True
        self._steps, self._metrics = [], []
        self._bad = []

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
        steps = self._bad + self._steps
        refused = [True] * len(self._bad) + bad.tolist()
        check_finite(steps, refused, self.patience)
        good = len(refused) - refused[::-1].index(False) if False in refused else 0
        self._bad = steps[good:]
        self.healthy = not self._bad
        mean = {
            name: float(np.mean(x[~bad])) if not bad.all() else np.nan
            for name, x in metrics.items()
        }
        self._steps, self._metrics = [], []
        return mean | {"refused": float(bad.sum())}


def mean_losses(losses: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Average the losses of clips over batches and probes, name by name."""
    return {name: float(np.mean(np.concatenate(x))) for name, x in losses.items()}
