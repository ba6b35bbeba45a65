"""Which steps are computed: the published schedules, and what they rest on."""

import numpy as np
import pytest

from cityrag_jax.diffusion.step_cache import (
    I2V_14B_480P_RATIOS,
    PRESETS,
    TEACACHE,
    MagCache,
    TeaCache,
    magcache_steps,
    teacache_steps,
)


@pytest.mark.parametrize(
    "kind, computed",
    [
        (MagCache(0.12, 4), [*range(8), 12, 17, 21, 25, 28, 31, 34, 36, 38]),
        (MagCache(0.24, 6), [*range(8), 14, 20, 25, 30, 34, 37, 39]),
        (MagCache(0.12, 2), 19),
        (MagCache(0.06, 3), 23),
    ],
)
def test_magcache_computes_the_steps_of_the_published_curve(kind, computed):
    """Simulated from the published curve by the authors' loop: 40 steps."""
    steps = np.flatnonzero(magcache_steps(kind, I2V_14B_480P_RATIOS, 40))
    if isinstance(computed, int):
        assert len(steps) == computed
    else:
        assert steps.tolist() == computed


def test_presets_go_from_exact_to_quick():
    assert PRESETS["final"] is None
    counts = [
        int(magcache_steps(PRESETS[name], I2V_14B_480P_RATIOS, 40).sum())
        for name in ("standard", "draft")
    ]
    assert counts == [19, 15]


@pytest.mark.parametrize("num_steps", (1, 2, 7, 20, 100))
def test_any_number_of_steps_begins_with_computed_ones(num_steps):
    """A fifth of them at least, and never more repeats in a row than allowed."""
    compute = magcache_steps(MagCache(9.0, 3), I2V_14B_480P_RATIOS, num_steps)
    assert len(compute) == num_steps
    assert compute[: max(1, num_steps // 5)].all()
    runs = "".join("x" if x else "." for x in compute).split("x")
    assert max(map(len, runs)) <= 3


def test_residuals_that_do_not_change_are_repeated_as_long_as_allowed():
    compute = magcache_steps(MagCache(0.1, 4, 0.1), [1.0] * 40, 40)
    assert np.flatnonzero(compute).tolist() == [0, 1, 2, 3, 8, 13, 18, 23, 28, 33, 38]


def slow_teacache(kind, embeddings, threshold):
    """The published loop for one branch, call by call."""
    num_steps, accumulated, before, made = len(embeddings), 0.0, None, []
    polynomial = np.poly1d(kind.coefficients)
    for count, now in enumerate(embeddings):
        if count < kind.first or count >= num_steps - kind.last:
            compute, accumulated = True, 0.0
        else:
            change = np.abs(now - before).mean() / np.abs(before).mean()
            accumulated += polynomial(float(change))
            compute = accumulated >= threshold
            accumulated = 0.0 if compute else accumulated
        before = now
        made.append(bool(compute))
    return made


@pytest.mark.parametrize("kind", TEACACHE.values(), ids=map(str, TEACACHE))
def test_teacache_is_the_published_loop(kind, rng):
    """On embeddings that move as far as Wan's: 2 to 8 % a step."""
    rates = rng.uniform(0.02, 0.08, (40, 1)).astype(np.float32)
    noise = rng.normal(size=(40, 64)).astype(np.float32)
    embeddings = 1 + np.cumsum(rates * noise, axis=0, dtype=np.float32)
    for threshold in (0.13, 0.2, 0.26):
        steps = teacache_steps(kind, embeddings, threshold)
        assert steps.tolist() == slow_teacache(kind, embeddings, threshold)


def test_teacache_counts_with_a_polynomial_that_is_the_change():
    """A tenth a step, threshold 0.25: every third behind the first ones."""
    kind = TeaCache((0.0, 0.0, 0.0, 1.0, 0.0), False, first=1, last=1)
    embeddings = 1.1 ** np.arange(11, dtype=np.float32)[:, None]
    steps = np.flatnonzero(teacache_steps(kind, embeddings, 0.25)).tolist()
    assert steps == [0, 3, 6, 9, 10]
