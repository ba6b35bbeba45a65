"""A path and a first image to a video of any length: clips chained frame to frame.

Every clip gets its own retrieved condition; the last frame and pose of a clip start the
next one (section 3.3). The last clip ends with the path: it reaches back into the one
before, which is cut where it starts, so that no pose is repeated and none is lost.
Conditions come from the path alone, never from a pair table.

A job is planned before a model is read; clips come one at a time, so that a video of
any length takes the memory of one clip, and can go on from the last frame of any.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from cityrag_jax.batch import Clip
from cityrag_jax.data.clips import ClipConfig, path_clip, stack_clips
from cityrag_jax.data.store import City
from cityrag_jax.geo.grounding import GapError, Retrieval, Views, ground_clips

# A `Generator`, or anything called like one: clips and a seed in, videos out. What its
# `begin`, if it has one, makes of clips without their first images is given back to it.
Generate = Callable[..., UInt8[np.ndarray, "B T H W 3"]]


class Span(NamedTuple):
    """Where a clip stands: it starts at pose `first` and gives frames `begin` to `end`.

    All count from the start of the path, `end` is not included. Frame `first` is the
    last of the clip before.
    """

    first: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a video is made of besides the model. Make it with `plan_job`."""

    city: City
    first_frame: UInt8[np.ndarray, "H W 3"]
    ecef_from_camera: Float64[np.ndarray, "N 4 4"]
    config: ClipConfig
    spans: tuple[Span, ...]
    views: tuple[Views, ...]
    seed: int = 0

    def clip(self, number: int, frame: UInt8[np.ndarray, "H W 3"]) -> Clip:
        """Make what is given of a clip that starts with `frame`."""
        poses = clip_poses(self.ecef_from_camera, self.spans[number], self.config)
        views = self.views[number]
        return path_clip(self.city, frame, poses, views, self.config, number)


@dataclasses.dataclass(frozen=True)
class MadeClip:
    """One clip's share of a video, and what it was grounded on.

    `frames` are those of its span: the first clip's begin with the given image, and
    any other's behind the frame that it shares with the clip before.
    """

    number: int
    span: Span
    frames: UInt8[np.ndarray, "T H W 3"]
    condition: UInt8[np.ndarray, "F H W 3"]
    views: Views
    seconds: float


def spans(num_poses: int, num_frames: int) -> tuple[Span, ...]:
    """Split a path into clips of `num_frames`: one frame for every pose.

    A path shorter than a clip is one clip, cut to it.
    """
    last = max(0, num_poses - num_frames)
    starts = [*range(0, last, num_frames - 1), last]
    ends = [*(first + 1 for first in starts[1:]), num_poses]
    return tuple(map(Span, starts, [0, *ends], ends))


def clip_poses(
    ecef_from_camera: Float64[np.ndarray, "N 4 4"], span: Span, config: ClipConfig
) -> Float64[np.ndarray, "T 4 4"]:
    """Give the poses of a clip; behind a path shorter than one, the camera stands."""
    index = np.arange(span.first, span.first + config.num_frames)
    return ecef_from_camera[np.minimum(index, len(ecef_from_camera) - 1)]


def plan_job(
    city: City,
    first_frame: UInt8[np.ndarray, "H W 3"],
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    config: ClipConfig,
    *,
    seed: int = 0,
    retrieval: Retrieval | None = None,
) -> Job:
    """Split a path into clips and find what shows each.

    Raises ValueError naming the clip for which the city holds nothing.
    """
    parts = spans(len(ecef_from_camera), config.num_frames)
    firsts, longest = [span.first for span in parts], config.condition_frames[1]
    retrieval = retrieval or Retrieval()
    try:
        views = ground_clips(city.index, ecef_from_camera, firsts, longest, retrieval)
    except GapError as error:
        number = sum(span.end <= error.pose for span in parts)
        where = describe_clip(number, parts[number])
        raise ValueError(f"{city.folder}, {where}: {error}") from error
    return Job(city, first_frame, ecef_from_camera, config, parts, views, seed)


def describe_clip(number: int, span: Span) -> str:
    """Name a clip for people."""
    return f"clip {number} of the path (frames {span.first} to {span.end - 1})"


def rollout(
    generate: Generate,
    job: Job,
    *,
    start: int = 0,
    last_frame: UInt8[np.ndarray, "H W 3"] | None = None,
) -> Iterator[MadeClip]:
    """Generate clip after clip. Same arguments, same bytes.

    Going on from clip `start`, `last_frame` is the last one of the clip before: the
    rest is then what an uninterrupted rollout gives. Raises FloatingPointError with the
    clip's number where the generator does. While a clip is generated, a thread crops
    the views of the next; while that clip's frames are used, devices encode these.
    """
    frame = job.first_frame if start == 0 else last_frame
    if frame is None:
        raise ValueError(f"Clip {start} starts from the last frame before it; give it.")
    with ThreadPoolExecutor(1) as ahead:
        following, begun = ahead.submit(job.clip, start, frame), ()
        for number in range(start, len(job.spans)):
            began, span = time.monotonic(), job.spans[number]
            clip = dataclasses.replace(following.result(), frames=frame[None])
            more = number + 1 < len(job.spans)
            if more:
                following = ahead.submit(job.clip, number + 1, frame)
            frames = _generate_span(generate, job, clip, number, begun)
            # What cannot be cropped is said when it is needed: this clip is whole.
            if more and following.exception() is None:
                begun = _begin(generate, following.result())
            yield MadeClip(
                number,
                span,
                frames,
                clip.condition[: max(1, clip.condition_length)],
                job.views[number],
                time.monotonic() - began,
            )
            frame = frames[-1]


def _begin(generate: Generate, clip: Clip) -> tuple[Any, ...]:
    """Give what the generator is given back with the clip: nothing, or one thing."""
    if not hasattr(generate, "begin"):
        return ()
    return (generate.begin(stack_clips([clip])),)


def _generate_span(
    generate: Generate, job: Job, clip: Clip, number: int, begun: tuple[Any, ...]
) -> UInt8[np.ndarray, "T H W 3"]:
    span = job.spans[number]
    try:
        made = generate(stack_clips([clip]), job.seed, *begun)[0]
    except FloatingPointError as error:
        where = describe_clip(number, span)
        raise FloatingPointError(f"{where}: {error}") from error
    frames = made[span.begin - span.first : span.end - span.first]
    if number == 0:
        return np.concatenate([clip.frames, frames[1:]])
    return frames
