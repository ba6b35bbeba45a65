"""Steps that repeat the last residual of the blocks instead of running them.

A transformer maps its tokens x to x + r, and r changes little between many steps of the
solver. Whether a step is computed depends on the schedule alone, so that the list of
computed steps is made on the host, once; it is the same for all passes of guidance.

TeaCache (arXiv 2411.19108, ali-vilab/TeaCache, TeaCache4Wan2.1) adds up a polynomial of
how far the time embedding moved since the step before, and computes when the sum
reaches a threshold. MagCache (arXiv 2506.09045, Zehong-Ma/MagCache, MagCache4Wan2.1)
multiplies measured ratios of residuals' lengths and computes when the errors that they
imply reach a threshold, or after so many repeats.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class TeaCache(NamedTuple):
    """How TeaCache chooses: coefficients from x^4 down, and steps always computed.

    `projected` looks at the six projected vectors (what the authors call retention
    steps), else at the time embedding. Fitted on Wan, 40 steps, shift 3 (480P) or 5.
    """

    coefficients: tuple[float, ...]
    projected: bool
    first: int
    last: int


# Published in teacache_generate.py. I2V-14B by size, and T2V by size of the model.
_PROJECTED = {
    "i2v_14b_480p": (
        *(2.57151496e05, -3.54229917e04, 1.40286849e03),
        *(-1.35890334e01, 1.32517977e-01),
    ),
    "i2v_14b_720p": (
        *(8.10705460e03, 2.13393892e03, -3.72934672e02),
        *(1.66203073e01, -4.17769401e-02),
    ),
    "t2v_14b": (
        *(-3.03318725e05, 4.90537029e04, -2.65530556e03),
        *(5.87365115e01, -3.15583525e-01),
    ),
    "t2v_1_3b": (
        *(-5.21862437e04, 9.23041404e03, -5.28275948e02),
        *(1.36987616e01, -4.99875664e-02),
    ),
}
_EMBEDDED = {
    "i2v_14b_480p": (
        *(-3.02331670e02, 2.23948934e02, -5.25463970e01),
        *(5.87348440e00, -2.01973289e-01),
    ),
    "i2v_14b_720p": (
        *(-114.36346466, 65.26524496, -18.82220707),
        *(4.91518089, -0.23412683),
    ),
    "t2v_14b": (
        *(-5784.54975374, 5449.50911966, -1811.16591783),
        *(256.27178429, -13.02252404),
    ),
    "t2v_1_3b": (
        *(2.39676752e03, -1.31110545e03, 2.01331979e02),
        *(-8.29855975e00, 1.37887774e-01),
    ),
}
TEACACHE = {
    (name, True): TeaCache(numbers, True, first=5, last=0)
    for name, numbers in _PROJECTED.items()
} | {
    (name, False): TeaCache(numbers, False, first=1, last=1)
    for name, numbers in _EMBEDDED.items()
}

# Published in magcache_generate.py: I2V-14B 480P, 40 steps, with the conditions.
I2V_14B_480P_RATIOS = (
    *(1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957),
    *(0.99052, 0.99383, 0.98857, 0.99065, 0.98845, 0.99057, 0.98957, 0.98601),
    *(0.98823, 0.98756, 0.98808, 0.98721, 0.98571, 0.98543, 0.98157, 0.98411),
    *(0.97952, 0.98149, 0.9774, 0.97825, 0.97355, 0.97085, 0.97056, 0.96588),
    *(0.96113, 0.9567, 0.94961, 0.93973, 0.93217, 0.91878, 0.90955, 0.92617),
)


class MagCache(NamedTuple):
    """When MagCache computes: the error allowed, repeats in a row, the share before."""

    threshold: float
    most_repeats: int
    retention: float = 0.2


# From exact to quick. Of 40 steps with the published ratios 40, 19 and 15 are computed.
PRESETS = {
    "final": None,
    "standard": MagCache(0.12, 2),
    "draft": MagCache(0.24, 6),
}


def teacache_steps(
    kind: TeaCache, embeddings: Float[np.ndarray, "n D"], threshold: float
) -> Bool[np.ndarray, " n"]:
    """Say which steps TeaCache computes.

    `embeddings` are what `kind` looks at, float32, one row a step. A polynomial may be
    negative and is not clamped, as published.
    """
    num_steps, total = len(embeddings), 0.0
    compute = np.ones(num_steps, bool)
    for i in range(kind.first, num_steps - kind.last):
        before = embeddings[i - 1]
        moved = np.abs(embeddings[i] - before).mean() / np.abs(before).mean()
        total += float(np.polyval(kind.coefficients, float(moved)))
        compute[i] = total >= threshold
        total = 0.0 if compute[i] else total
    return compute


def magcache_steps(
    kind: MagCache, ratios: Sequence[float], num_steps: int
) -> Bool[np.ndarray, " {num_steps}"]:
    """Say which steps MagCache computes.

    `ratios` hold the mean over tokens of |residual of a step| / |that of the step
    before|; of another number of steps, the nearest are taken.
    """
    nearest = np.linspace(0, len(ratios) - 1, num_steps).round().astype(int)
    compute = np.ones(num_steps, bool)
    ratio, error, repeats = 1.0, 0.0, 0
    for i in range(max(1, int(num_steps * kind.retention)), num_steps):
        ratio *= ratios[nearest[i]]
        repeats += 1
        error += abs(1 - ratio)
        compute[i] = not (error < kind.threshold and repeats <= kind.most_repeats)
        if compute[i]:
            ratio, error, repeats = 1.0, 0.0, 0
    return compute
