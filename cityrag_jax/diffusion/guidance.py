"""Guidance as a weighted sum of passes that differ in the conditions they see.

Every mode is a linear combination of velocities whose weights sum to 1. v(p, g) is the
velocity with poses and with the geo condition, 0 stands for a dropped one:

    none        v(p,g)
    joint       v(0,0) + w [v(p,g) - v(0,0)]              no geo in its second pass
    trajectory  v(0,g) + w [v(p,g) - v(0,g)]
    geo         v(p,0) + w [v(p,g) - v(p,0)]
    nested      v(0,0) + w_p [v(p,0) - v(0,0)] + w_g [v(p,g) - v(p,0)]
    text        v(negative prompt) + w [v(prompt) - v(negative prompt)]    official Wan

Text is the same in all passes but in the mode `text`; the image is the same in all.
The paper is silent on which conditions are guided and how far: *assumed*.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32


class Pass(NamedTuple):
    """One evaluation of the network: the names of the conditions that it lacks."""

    without: frozenset[str] = frozenset()
    negative_text: bool = False


WeightedPass = tuple[float, Pass]

_FULL = Pass()
_NEITHER = Pass(frozenset({"pose", "geo"}))
_NO_POSE = Pass(frozenset({"pose"}))
_NO_GEO = Pass(frozenset({"geo"}))
_NEGATIVE = Pass(negative_text=True)

# For each mode the passes from least to most guided: scale k leads from k to k + 1.
_LADDERS = {
    "none": (_FULL,),
    "joint": (_NEITHER, _FULL),
    "trajectory": (_NO_POSE, _FULL),
    "geo": (_NO_GEO, _FULL),
    "nested": (_NEITHER, _NO_GEO, _FULL),
    "text": (_NEGATIVE, _FULL),
}
MODES = tuple(_LADDERS)


def passes(
    mode: str,
    scales: Sequence[float | int] = (),
    without: Collection[str] = (),
) -> tuple[WeightedPass, ...]:
    """List the passes of a guidance mode with their weights, the full pass first.

    `scales` holds (w,), for `nested` (w_p, w_g) and for `none` nothing. `without` names
    conditions that there are not, "pose" or "geo": no pass sees them. Passes
    that become equal are merged, and those with weight 0 dropped: scale 1 costs one
    pass. Raises ValueError for an unknown mode or a wrong number of scales.
    """
    if mode not in _LADDERS:
        raise ValueError(
            f"No guidance mode {mode!r}; choose one of {', '.join(MODES)}."
        )
    ladder = _LADDERS[mode]
    if len(scales) != len(ladder) - 1:
        raise ValueError(
            f"Guidance {mode!r} takes {len(ladder) - 1} scales, got {tuple(scales)}; "
            "'nested' takes two (pose, geo), 'none' takes none, the others take one."
        )
    # Telescoped: v_0 + sum_k w_k (v_{k+1} - v_k) gives v_k the weight w_{k-1} - w_k.
    around = (1.0, *(float(scale) for scale in scales), 0.0)
    weights: dict[Pass, float] = {}
    for k in reversed(range(len(ladder))):
        seen = ladder[k]._replace(without=ladder[k].without | frozenset(without))
        weights[seen] = weights.get(seen, 0.0) + around[k] - around[k + 1]
    return tuple((weight, seen) for seen, weight in weights.items() if weight != 0)


def guide(
    velocities: Iterable[Float[Array, "*shape"]],
    weights: Float[Array | np.ndarray, " passes"],
) -> Float32[Array, "*shape"]:
    """Sum the velocities of the passes by their weights, in float32.

    Weights may be arguments of a jitted function: other scales do not compile again.
    """
    total = None
    for weight, velocity in zip(weights, velocities, strict=True):
        term = weight * velocity.astype(jnp.float32)
        total = term if total is None else total + term
    if total is None:
        raise ValueError("No passes to guide with; passes(mode, scales) lists them.")
    return total
