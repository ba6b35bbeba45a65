"""Mine pairs: two drives along one path at different times (section 3.1).

A pair is a window of `num_frames` consecutive captures of drive a, and the capture of
drive b nearest to its first place, such that b follows the window: mean distance below
`max_mean_distance_m`, the same direction, and progress along b that never turns back.
The mean runs over the window's captures, each to the nearest capture of b, or of that
pass of b where it comes along more than once. Nearness is that of a map: satellites err
more in height, by an offset that is a pair of drives' own.
"""

import hashlib

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from cityrag_jax.data.captures import Captures
from cityrag_jax.data.pairs import PairConfig, Pairs
from cityrag_jax.geo.following import Track, follow_drive, follow_pass, make_track
from cityrag_jax.geo.retrieval import build_tree

AGAINST = -0.5  # the cosine of two courses, of which one goes the other way
JUMPS = 4  # distances; matches that are farther apart are of two passes


def choose_held_out(
    neighbourhood: Int32[np.ndarray, " N"], name: str, config: PairConfig
) -> Int32[np.ndarray, " H"]:
    """Choose neighbourhoods to hold out, the same ones for a city and seed always.

    A fraction above 0 holds out at least one, and below 1 leaves at least one, where
    the city has two or more.
    """
    known = np.unique(neighbourhood)
    if config.held_out is not None:
        unknown = sorted(set(config.held_out) - set(known.tolist()))
        if unknown:
            raise ValueError(
                f"{name} has no neighbourhoods {unknown}; it has {known.tolist()}."
            )
        return np.array(sorted(config.held_out), np.int32)
    if not 0 <= config.held_out_fraction <= 1:
        raise ValueError(
            f"held_out_fraction is {config.held_out_fraction}; give 0 to 1."
        )
    count = round(config.held_out_fraction * len(known))
    if 0 < config.held_out_fraction < 1 and len(known) > 1:
        count = min(max(count, 1), len(known) - 1)
    draws = [
        hashlib.sha256(f"{name}/{config.seed}/{k}".encode()).digest()
        for k in known.tolist()
    ]
    order = sorted(range(len(known)), key=draws.__getitem__)
    return np.sort(known[order[:count]])


def mine_pairs(captures: Captures, name: str, config: PairConfig) -> Pairs:
    """Find all pairs of a city, in the order of drive a's captures.

    Raises ValueError with the parameters tried and the nearest miss if there are none.
    """
    chosen = choose_held_out(captures.neighbourhood, name, config)
    track = make_track(captures.ecef_from_camera, captures.drive, config.max_step_m)
    starts = _window_starts(track.edges, config)
    window, anchor = _candidates(captures, track, starts, config)
    drive = captures.drive[anchor]
    order = np.argsort(drive, kind="stable")
    found, misses = [], []
    for group in np.split(order, np.flatnonzero(np.diff(drive[order])) + 1):
        if len(group) == 0:
            continue
        first = starts[window[group]]
        match, distance_m = _follow(track, first, anchor[group], config)
        fits = _fits(track, first, match, config)
        fits[fits] = _same_level(track, first[fits], match[fits], config)
        near = distance_m <= config.max_mean_distance_m
        keep = fits & near
        found.append(np.stack([first[keep], match[keep, 0], distance_m[keep]]))
        misses.append(distance_m[fits & ~near])
    start_a, start_b, distance_m = np.concatenate(found or [np.empty((3, 0))], axis=1)
    if len(start_a) == 0:
        reason = _why_none(config, len(starts), len(window), misses)
        raise ValueError(f"{name} has no pairs: {reason}")
    # In order; two passes that meet at a start are one pair.
    _, order = np.unique(np.stack([start_a, start_b]), axis=1, return_index=True)
    start_a, start_b = (s[order].astype(np.int64) for s in (start_a, start_b))
    held_out, clean = _hold_out(captures, track, chosen, start_a, start_b, config)
    pairs = Pairs(
        drive_a=captures.drive[start_a],
        start_a=start_a,
        drive_b=captures.drive[start_b],
        start_b=start_b,
        mean_distance_m=distance_m[order],
        neighbourhood=captures.neighbourhood[start_a],
        held_out=held_out,
        num_frames=config.num_frames,
    )
    return pairs.select(clean)


def _window_starts(
    edges: Int64[np.ndarray, " D"], config: PairConfig
) -> Int64[np.ndarray, " W"]:
    parts = [
        np.arange(low, high - config.num_frames + 1, config.stride)
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    return np.concatenate(parts).astype(np.int64)


def _candidates(
    captures: Captures,
    track: Track,
    starts: Int64[np.ndarray, " W"],
    config: PairConfig,
) -> tuple[Int64[np.ndarray, " C"], Int64[np.ndarray, " C"]]:
    """List (window, capture of another drive near its start) that may be pairs.

    One for each pass of a drive that does not go the other way. Drives are thinned to
    a capture every half of the distance, which finds the same passes with a small
    fraction of the neighbours.
    """
    reach_m = config.max_mean_distance_m
    bucket = np.floor(track.along_m / (reach_m / 2)).astype(np.int64)
    new = np.diff(bucket, prepend=-1) != 0
    new[track.edges[:-1]] = True
    thin = np.flatnonzero(new)
    tree = build_tree(track.position_m[thin])
    near = tree.query_ball_point(track.position_m[starts], 2.5 * reach_m)
    counts = np.fromiter(map(len, near), np.int64, len(near))
    window = np.repeat(np.arange(len(starts)), counts)
    capture = thin[np.concatenate([*near, []]).astype(np.int64)]
    gap_s = np.abs(captures.time_s[starts[window]] - captures.time_s[capture])
    other = captures.drive[starts[window]] != captures.drive[capture]
    facing = np.einsum(
        "ck,ck->c", track.direction[starts[window]], track.direction[capture]
    )
    kept = np.flatnonzero(other & (gap_s >= config.min_gap_s) & (facing > AGAINST))
    kept = kept[np.lexsort([capture[kept], window[kept]])]
    window, capture = window[kept], capture[kept]
    begins = (np.diff(window) != 0) | (np.diff(captures.drive[capture]) != 0)
    if config.every_pass:
        begins |= np.diff(track.along_m[capture]) > 2 * reach_m
    run = np.concatenate([[0], np.cumsum(begins)])[: len(window)]
    steps_m = track.position_m[starts[window]] - track.position_m[capture]
    order = np.lexsort([np.linalg.norm(steps_m, axis=1), run])
    _, first = np.unique(run[order], return_index=True)
    return window[order[first]], capture[order[first]]


def _follow(
    track: Track,
    first: Int64[np.ndarray, " W"],
    anchor: Int64[np.ndarray, " W"],
    config,
) -> tuple[Int64[np.ndarray, "W N"], Float64[np.ndarray, " W"]]:
    """Match windows to the drive of their anchors, pass by pass where it comes twice.

    Where a window has two anchors, or its matches jump from one pass to another or go
    against it, only what the drive does near the anchor counts.
    """
    reach_m = config.max_mean_distance_m
    match, distance_m = follow_drive(track, first, int(anchor[0]), config.num_frames)
    if not config.every_pass:
        return match, distance_m
    windows = first[:, None] + np.arange(config.num_frames)[None]
    jump_m = np.abs(np.diff(track.along_m[match], axis=1)).max(1, initial=0)
    facing = np.einsum("wnk,wnk->w", track.direction[windows], track.direction[match])
    _, where, counts = np.unique(first, return_inverse=True, return_counts=True)
    again = (counts[where] > 1) | (jump_m > JUMPS * reach_m) | (facing < 0)
    for row in np.flatnonzero(again).tolist():
        match[row], distance_m[row] = follow_pass(
            track, windows[row], int(anchor[row]), reach_m
        )
    return match, distance_m


def _fits(
    track: Track,
    first: Int64[np.ndarray, " W"],
    match: Int64[np.ndarray, "W N"],
    config: PairConfig,
) -> Bool[np.ndarray, " W"]:
    """Say whether the other drive goes along: steadily, as far, and the same way."""
    windows = first[:, None] + np.arange(config.num_frames)[None]
    # A little back is noise of the position, more is another direction.
    ahead_m = np.diff(track.along_m[match], axis=1)
    steady = ahead_m.min(1, initial=0) >= -config.max_back_m
    steady &= match[:, -1] > match[:, 0]
    for places in (windows, match):
        ends = track.leaps[places[:, [0, -1]]]
        steady &= ends[:, 0] == ends[:, 1]
    ours_m = track.along_m[windows[:, -1]] - track.along_m[windows[:, 0]]
    theirs_m = track.along_m[match[:, -1]] - track.along_m[match[:, 0]]
    as_far = theirs_m <= 2 * ours_m + 2 * config.max_mean_distance_m
    agreement = np.einsum(
        "wni,wni->wn", track.direction[windows], track.direction[match]
    ).mean(1)
    same_way = agreement >= np.cos(np.deg2rad(config.max_turn_deg))
    stop = track.edges[np.searchsorted(track.edges, match[:, 0], "right")]
    enough = stop - match[:, 0] >= config.min_condition
    return steady & as_far & same_way & enough


def _same_level(
    track: Track,
    first: Int64[np.ndarray, " W"],
    match: Int64[np.ndarray, "W N"],
    config: PairConfig,
) -> Bool[np.ndarray, " W"]:
    """Say whether windows keep the offset in height that their drives have throughout.

    All matches are of one drive; the offset is the median over a pair of drives.
    """
    windows = first[:, None] + np.arange(config.num_frames)[None]
    apart_m = track.height_m[windows] - track.height_m[match]
    drive = np.searchsorted(track.edges, first, "right")
    level = np.zeros(len(first), bool)
    for number in np.unique(drive):
        rows = np.flatnonzero(drive == number)
        offset_m = np.median(apart_m[rows])
        off_m = np.abs(apart_m[rows] - offset_m).mean(1)
        level[rows] = off_m <= config.max_height_m
        level[rows] &= abs(offset_m) <= config.max_offset_m
    return level


def _hold_out(
    captures: Captures,
    track: Track,
    chosen: Int32[np.ndarray, " H"],
    start_a: Int64[np.ndarray, " P"],
    start_b: Int64[np.ndarray, " P"],
    config: PairConfig,
) -> tuple[Bool[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
    """Say which pairs are held out, and which lie wholly on one side of the line.

    Held out: the window lies within held-out neighbourhoods. Training: neither the
    window nor the captures of b that a condition may show come near them. Others go.
    """
    edges, kept_back = track.edges, np.isin(captures.neighbourhood, chosen)
    inside = np.concatenate([[0], np.cumsum(kept_back)])
    if kept_back.any() and config.buffer_m > 0:
        tree = build_tree(track.position_m[kept_back])
        apart_m, _ = tree.query(
            track.position_m, distance_upper_bound=config.buffer_m, workers=-1
        )
        kept_back |= np.isfinite(apart_m)
    held = np.concatenate([[0], np.cumsum(kept_back)])
    in_a = held[start_a + config.num_frames] - held[start_a]
    stop_b = edges[np.searchsorted(edges, start_b, "right")]
    # Conditions are at most a few captures longer than windows; twice is safe.
    in_b = held[np.minimum(start_b + 2 * config.num_frames, stop_b)] - held[start_b]
    within = inside[start_a + config.num_frames] - inside[start_a]
    held_out = within == config.num_frames
    return held_out, held_out | ((in_a == 0) & (in_b == 0))


def _why_none(
    config: PairConfig, num_windows: int, num_candidates: int, misses: list
) -> str:
    tried = (
        f"tried num_frames={config.num_frames}, "
        f"max_mean_distance_m={config.max_mean_distance_m}, "
        f"min_gap_s={config.min_gap_s}, max_turn_deg={config.max_turn_deg}, "
        f"min_condition={config.min_condition}. "
    )
    if num_windows == 0:
        return tried + "No drive is as long as num_frames; lower it or join drives."
    if num_candidates == 0:
        return tried + (
            f"None of {num_windows} windows has a capture of another drive and time "
            "nearby; lower min_gap_s or add drives along the same streets."
        )
    nearest_m = min((float(m.min()) for m in misses if len(m)), default=None)
    if nearest_m is None:
        return tried + (
            f"{num_candidates} neighbouring drives go another way or end too early; "
            "lower num_frames or min_condition, or raise max_turn_deg."
        )
    return tried + (
        f"The nearest miss of {num_candidates} neighbouring drives keeps "
        f"{nearest_m:.2f} m on average; raise max_mean_distance_m."
    )
