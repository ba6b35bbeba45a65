"""From pairs to clips: yaw augmentation, facing conditions, crops.

A plan says which captures a clip shows and how they face: pure geometry, and the
provenance that evaluation needs. `make_clip` turns a plan into pictures. Training and
generation crop their conditions by the same `City.crops`.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped, UInt8

from cityrag_jax.batch import Clip
from cityrag_jax.data.masks import Shown, cover_views
from cityrag_jax.data.pairs import Pairs
from cityrag_jax.data.store import City
from cityrag_jax.geo.grounding import Views
from cityrag_jax.geo.retrieval import drive_stop
from cityrag_jax.geo.trajectory import (
    draw_yaw,
    facing_yaw,
    headings,
    relative_poses,
    yaw_rotation,
)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of a clip. Defaults are the paper's.

    `condition_frames` bounds the drawn length of the condition, both ends included;
    every condition is padded to the longer. `yaw_rate_deg` bounds the rotation added
    between frames; the field of view is horizontal.
    """

    num_frames: int = 73
    height: int = 480
    width: int = 832
    fov_deg: float = 65.0
    condition_frames: tuple[int, int] = (61, 81)
    yaw_rate_deg: tuple[float, float] = (0.0, 2.0)

    def __post_init__(self):
        shortest, longest = self.condition_frames
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"condition_frames is {self.condition_frames}; give 1 <= shortest <= "
                "longest."
            )
        if min(self.num_frames, self.height, self.width) < 1:
            raise ValueError(
                f"A clip of {self.num_frames} frames of {self.width}x{self.height}: "
                "give 1 or more of each in the config's data section."
            )
        if not 0 < self.fov_deg < 180:
            raise ValueError(
                f"data.fov_deg is {self.fov_deg}; a view has between 0 and 180 degrees."
            )


@dataclasses.dataclass(frozen=True)
class ClipPlan:
    """Which captures a clip shows and how they face, before any picture is read.

    `ecef_from_camera` are the target's poses with their yaw. Yaws are relative to the
    captures' own frames.
    """

    target_captures: Int64[np.ndarray, " T"]
    target_yaw_rad: Float64[np.ndarray, " T"]
    ecef_from_camera: Float64[np.ndarray, "T 4 4"]
    condition_captures: Int64[np.ndarray, " n"]
    condition_yaw_rad: Float64[np.ndarray, " n"]
    clip_id: int

    @property
    def rotation_deg(self) -> float:
        """The range of headings that the target sees."""
        return float(np.rad2deg(np.ptp(np.unwrap(headings(self.ecef_from_camera)))))


def plan_clip(
    city: City,
    pairs: Pairs,
    pair: int,
    config: ClipConfig,
    rng: np.random.Generator,
) -> ClipPlan:
    """Draw a clip of a pair: yaw of the target, length of the condition.

    The condition is shorter than drawn only where its drive ends.
    """
    if pairs.num_frames < config.num_frames:
        raise ValueError(
            f"{city.folder}: pairs are {pairs.num_frames} frames long, clips "
            f"{config.num_frames}; mine pairs again for {config.num_frames} frames."
        )
    start_a, start_b = int(pairs.start_a[pair]), int(pairs.start_b[pair])
    yaw = draw_yaw(rng, config.num_frames, config.yaw_rate_deg)
    shortest, longest = config.condition_frames
    stop = start_b + int(rng.integers(shortest, longest + 1))
    stop = min(stop, drive_stop(city.drive_edges, start_b))
    target = np.arange(start_a, start_a + config.num_frames)
    condition = np.arange(start_b, stop)
    poses = city.captures.ecef_from_camera
    ecef_from_camera = poses[target] @ yaw_rotation(yaw)
    return ClipPlan(
        target_captures=target,
        target_yaw_rad=yaw,
        ecef_from_camera=ecef_from_camera,
        condition_captures=condition,
        condition_yaw_rad=facing_yaw(ecef_from_camera, poses[condition]),
        clip_id=clip_id(city.name, start_a, start_b),
    )


def clip_id(city: str, start_a: int, start_b: int) -> int:
    """Give the number of a pair's clips, of which their noise is drawn."""
    return zlib.crc32(f"{city}/{start_a}/{start_b}".encode())


def make_clip(city: City, plan: ClipPlan, config: ClipConfig) -> Clip:
    """Read the pictures of a plan."""
    seen = plan.condition_captures, plan.condition_yaw_rad
    condition = _views(city, *seen, config)
    return Clip(
        frames=_views(city, plan.target_captures, plan.target_yaw_rad, config),
        first_from_camera=relative_poses(plan.ecef_from_camera),
        condition=pad_condition(condition, config),
        condition_length=np.asarray(len(condition), np.int32),
        clip_id=np.asarray(plan.clip_id, np.uint32),
        first_from_view=_poses_from(plan.ecef_from_camera[0], city, *seen, config),
    )


def path_clip(
    city: City,
    first_frame: UInt8[np.ndarray, "H W 3"],
    ecef_from_camera: Float64[np.ndarray, "T 4 4"],
    views: Views,
    config: ClipConfig,
    clip_id: int = 0,
) -> Clip:
    """Make the clip to generate: a first frame, a path and the views that ground it.

    At most as many views are used as the longest condition holds. Without any the
    condition is black and has length 0, which drops it.
    """
    wanted = (config.height, config.width, 3)
    if first_frame.shape != wanted:
        raise ValueError(
            f"The first frame is {first_frame.shape}, clips are {wanted}; resize it."
        )
    views = views[: config.condition_frames[1]]
    condition = show_views(city, views, config)
    seen = views.captures, view_yaws(city, views)
    view_poses = _poses_from(ecef_from_camera[0], city, *seen, config)
    if len(views) == 0:
        condition = np.zeros((1, *wanted), np.uint8)
    return Clip(
        frames=first_frame[None],
        first_from_camera=relative_poses(ecef_from_camera),
        condition=pad_condition(condition, config),
        condition_length=np.asarray(len(views), np.int32),
        clip_id=np.asarray(clip_id, np.uint32),
        first_from_view=view_poses,
    )


def show_views(
    city: City, views: Views, config: ClipConfig
) -> UInt8[np.ndarray, "n H W 3"]:
    """Crop the captures that ground a path, each facing as the path does there."""
    return _views(city, views.captures, view_yaws(city, views), config)


def view_yaws(city: City, views: Views) -> Float64[np.ndarray, " n"]:
    """Give by what each view is turned right from its capture's own heading."""
    poses = city.captures.ecef_from_camera[views.captures]
    return views.heading_rad - headings(poses)


def cover_people(
    city: City,
    views: Views,
    frames: UInt8[np.ndarray, "n H W 3"],
    config: ClipConfig,
) -> tuple[UInt8[np.ndarray, "n H W 3"], Shown]:
    """Mask people and plates in `show_views`, for whoever looks at them."""
    yaw_rad = view_yaws(city, views)
    return cover_views(city, views.captures, yaw_rad, frames, config.fov_deg)


def pad_condition(
    condition: Shaped[np.ndarray, "n ..."], config: ClipConfig
) -> Shaped[np.ndarray, "F ..."]:
    """Repeat the last frame up to the longest condition: one static shape."""
    longest = config.condition_frames[1]
    index = np.minimum(np.arange(longest), len(condition) - 1)
    return condition[index]


def _poses_from(
    ecef_from_first: Float64[np.ndarray, "4 4"],
    city: City,
    captures: Int64[np.ndarray, " n"],
    yaw_rad: Float64[np.ndarray, " n"],
    config: ClipConfig,
) -> Float32[np.ndarray, "F 4 4"]:
    """Give the views' poses from the target's first camera, padded as they are.

    Where there are none they are the first camera's own.
    """
    if len(captures) == 0:
        return pad_condition(np.eye(4, dtype=np.float32)[None], config)
    poses = city.captures.ecef_from_camera[captures] @ yaw_rotation(yaw_rad)
    return pad_condition(relative_poses(poses, ecef_from_first), config)


def _views(city: City, captures, yaw_rad, config: ClipConfig) -> np.ndarray:
    return city.crops(
        captures,
        yaw_rad,
        height=config.height,
        width=config.width,
        fov_deg=config.fov_deg,
    )


def stack_clips(clips: Sequence[Clip]) -> Clip:
    """Join clips into a batch."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *clips)


def held_out_plans(
    city: City,
    pairs: Pairs,
    config: ClipConfig,
    count: int,
    *,
    seed: int = 0,
    min_rotation_deg: float = 45.0,
) -> list[ClipPlan]:
    """Choose held-out clips for evaluation, the same ones for a seed always.

    As in the paper, those drawn at random that turn at least `min_rotation_deg`.
    """
    held_out = pairs.evaluation
    order = np.random.default_rng(seed).permutation(len(held_out))
    chosen = []
    for pair in order.tolist():
        start = int(held_out.start_a[pair]), int(held_out.start_b[pair])
        rng = np.random.default_rng([seed, *start])
        plan = plan_clip(city, held_out, pair, config, rng)
        if plan.rotation_deg >= min_rotation_deg:
            chosen.append(plan)
        if len(chosen) == count:
            return chosen
    raise ValueError(
        f"{city.folder} has {len(held_out)} held-out pairs, {len(chosen)} of them turn "
        f"{min_rotation_deg} degrees or more, but {count} clips are wanted; ask for "
        "fewer or hold out more of the city."
    )


def held_out_clips(
    city: City, pairs: Pairs, config: ClipConfig, count: int, **kwargs
) -> list[Clip]:
    """Read the clips of `held_out_plans`."""
    plans = held_out_plans(city, pairs, config, count, **kwargs)
    return [make_clip(city, plan, config) for plan in plans]
