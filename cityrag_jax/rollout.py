"""A path and a first image to a video of any length: clips chained frame to frame.

Every clip gets its own retrieved condition; the last frame and pose of a clip start the
next one (section 3.3). Conditions come from the path alone, never from a pair table.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jaxtyping import Array, Float, Float64, UInt8

from cityrag_jax.batch import Clip, Conditions
from cityrag_jax.checkpoint import Bundle
from cityrag_jax.data.clips import ClipConfig, path_clip, stack_clips
from cityrag_jax.data.store import City
from cityrag_jax.encode import encode_conditions, to_pixels
from cityrag_jax.geo.retrieval import Retrieval, follow_drive
from cityrag_jax.model.vae import WanVAE
from cityrag_jax.sampling import Sampler, draw_noise

# A `Generator`, or anything called like one: clips and a seed in, videos out.
Generate = Callable[[Clip, int], UInt8[np.ndarray, "B T H W 3"]]

encode = jax.jit(encode_conditions)


@jax.jit
def decode(vae: WanVAE, latents: Float[Array, "B t h w z"]) -> Array:
    """Decode latents to 8-bit frames."""
    return to_pixels(vae.decode(latents))


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained bundle with a sampler: clips in, videos out."""

    bundle: Bundle
    sampler: Sampler

    def __post_init__(self):
        missing = self._needed() - set(self.bundle.modules)
        if missing or self.bundle.text is None:
            lacks = sorted(missing) or ["text features"]
            raise ValueError(
                f"{self.bundle.origin} lacks {', '.join(lacks)}; generation needs a "
                "whole CityRAG model, as training saves it in WORKDIR/model."
            )

    def _needed(self) -> set[str]:
        needed = {"transformer", "vae"}
        description = self.bundle.descriptions.get("transformer")
        if description and description["config"].get("image_dim") is not None:
            needed.add("clip")
        return needed

    def __call__(self, clip: Clip, seed: int) -> UInt8[np.ndarray, "B T H W 3"]:
        """Generate a batch of clips; `frames[:, 0]` of each is its first image."""
        return self.sample(self.encode(clip), clip, seed)

    def encode(self, clip: Clip) -> Conditions:
        """Encode what is given of a batch of clips."""
        modules = self.bundle.modules
        return encode(modules["vae"], clip, self.bundle.text, modules.get("clip"))

    def sample(
        self,
        conditions: Conditions,
        clip: Clip,
        seed: int,
    ) -> UInt8[np.ndarray, "B T H W 3"]:
        """Generate clips from conditions, theirs or others; noise goes by their ids."""
        vae = self.bundle.modules["vae"]
        shape = conditions.first_frame.shape[1:4] + (vae.config.z_dim,)
        noise = draw_noise(jax.random.key(seed), clip.clip_id, shape)
        transformer = self.bundle.modules["transformer"]
        latents = self.sampler(transformer, conditions, noise)
        video = np.asarray(decode(vae, latents))
        return video[:, : clip.first_from_camera.shape[1]]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A generated video, the views that it was grounded on, and their captures."""

    frames: UInt8[np.ndarray, "N H W 3"]
    conditions: tuple[UInt8[np.ndarray, "F H W 3"], ...]
    retrievals: tuple[Retrieval, ...]


def segments(num_poses: int, num_frames: int) -> list[np.ndarray]:
    """Split a path into clips that share one pose; the last repeats the path's end."""
    starts = range(0, max(1, num_poses - 1), num_frames - 1)
    last = num_poses - 1
    return [np.minimum(np.arange(s, s + num_frames), last) for s in starts]


def retrieve(
    city: City,
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    config: ClipConfig,
    **limits,
) -> list[Retrieval]:
    """Find the captures for every clip of a path, before anything is generated.

    `limits` are those of `geo.retrieval.follow_drive`. Raises ValueError naming the
    clip for which the city holds nothing.
    """
    found = []
    for number, frames in enumerate(segments(len(ecef_from_camera), config.num_frames)):
        try:
            poses = ecef_from_camera[frames]
            longest = config.condition_frames[1]
            found.append(follow_drive(city.index, poses, longest, **limits))
        except ValueError as error:
            raise ValueError(
                f"{city.folder}, clip {number} of the path (frames {frames[0]} to "
                f"{frames[-1]}): {error}"
            ) from error
    return found


def rollout(
    generator: Generate,
    city: City,
    first_frame: UInt8[np.ndarray, "H W 3"],
    ecef_from_camera: Float64[np.ndarray, "N 4 4"],
    config: ClipConfig,
    *,
    seed: int = 0,
    limits: dict | None = None,
    progress: Callable[[list], Iterable] = list,
) -> Rollout:
    """Generate a frame for every pose of a path, clip after clip.

    `progress` wraps the list of clips, as tqdm does. Same arguments, same bytes.
    """
    retrievals = retrieve(city, ecef_from_camera, config, **(limits or {}))
    parts = segments(len(ecef_from_camera), config.num_frames)
    video, conditions = [first_frame[None]], []
    for number, frames in progress(list(enumerate(parts))):
        captures = retrievals[number].captures
        clip = path_clip(
            city, video[-1][-1], ecef_from_camera[frames], captures, config, number
        )
        made = generator(stack_clips([clip]), seed)[0]
        conditions.append(clip.condition[: clip.condition_length])
        video.append(made[1:])
    frames = np.concatenate(video)[: len(ecef_from_camera)]
    return Rollout(frames, tuple(conditions), tuple(retrievals))
