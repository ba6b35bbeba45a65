"""Clips in, videos out: a trained model with its encoders, sampler and mesh.

The one way in which generation and evaluation run networks. All programs are compiled
once and serve every clip; on a mesh each runs on all of its devices. Noise is the same
on any mesh, pictures nearly: sums in another order differ by rounding.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, UInt8, UInt32
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip, Conditions
from cityrag_jax.checkpoint import COMPUTING, Bundle, computing_in, latest_model
from cityrag_jax.data.store import City
from cityrag_jax.encode import encode_conditions, encode_videos, to_pixels
from cityrag_jax.model.vae import WanVAE
from cityrag_jax.parallel import (
    MESH_AXES,
    Rules,
    fetch,
    fill_mesh,
    layout,
    loading_dtype,
    make_mesh,
    spread_places,
)
from cityrag_jax.sampling import Sampler, draw_noise, read_sampler
from cityrag_jax.training.origin import check_cities, check_model

MESH = (
    "devices to generate on, such as sequence:4 (tokens over 4 devices) or "
    "data:2,sequence:-1; what config.sample.mesh says if not given"
)
Videos = UInt8[np.ndarray, "B T H W 3"]
Begun = Float[Array, "B s h w z"]

encode = jax.jit(encode_conditions)
encode_latents = jax.jit(lambda vae, frames: encode_videos(vae, frames)[0])


@jax.jit
def decode(
    vae: WanVAE, latents: Float[Array, "B t h w z"]
) -> tuple[UInt8[Array, "B T H W 3"], Bool[Array, " B"]]:
    """Decode latents to 8-bit frames, and say of which clips all numbers are finite."""
    video = spread_places(vae.decode, latents, 1)
    sound = jnp.isfinite(latents).all((1, 2, 3, 4))
    return to_pixels(video), sound & jnp.isfinite(video).all((1, 2, 3, 4))


@partial(jax.jit, static_argnames="shape")
def _noise(
    key: UInt32[Array, " 2"], clip_id: UInt32[Array, " B"], shape: tuple[int, ...]
) -> Float32[Array, "B ..."]:
    return draw_noise(jax.random.wrap_key_data(key), clip_id, shape)


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained bundle with a sampler, on a mesh or one device."""

    bundle: Bundle
    sampler: Sampler
    mesh: Mesh | None = None
    rules: Rules = dataclasses.field(default_factory=dict)

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

    def _layout(self) -> contextlib.AbstractContextManager:
        return layout(self.mesh, self.rules)

    def __call__(self, clip: Clip, seed: int, begun: Begun | None = None) -> Videos:
        """Generate a batch of clips; `frames[:, 0]` of each is its first image."""
        return self.sample(self.encode(clip, begun), clip, seed)

    def begin(self, clip: Clip) -> Begun:
        """Start on what does not need a batch's first images: its retrieved videos.

        The devices encode them while the host does something else.
        """
        with self._layout():
            return encode_latents(self.bundle.modules["vae"], clip.condition)

    def encode(self, clip: Clip, begun: Begun | None = None) -> Conditions:
        """Encode what is given of a batch of clips, but for what was `begun`."""
        begun = self.begin(clip) if begun is None else begun
        with self._layout():
            modules = self.bundle.modules
            given = self.bundle.text, modules.get("clip"), begun
            return encode(modules["vae"], clip, *given)

    def sample(self, conditions: Conditions, clip: Clip, seed: int) -> Videos:
        """Generate clips from conditions, theirs or others; noise goes by their ids.

        A seed has up to 64 bits; one of 32 gives the noise of `jax.random.key(seed)`.
        Raises FloatingPointError if anything is not finite: never makes a video of it.
        """
        key = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)  # as JAX's, of 64
        with self._layout():
            modules = self.bundle.modules
            channels = modules["vae"].config.z_dim
            shape = (*conditions.first_frame.shape[1:4], channels)
            noise = _noise(key, clip.clip_id, shape)
            latents = self.sampler(modules["transformer"], conditions, noise)
            return self._decode(latents)[:, : clip.first_from_camera.shape[1]]

    def reconstruct(self, frames: Videos) -> Videos:
        """Encode and decode: what no model behind this autoencoder can pass."""
        with self._layout():
            return self._decode(encode_latents(self.bundle.modules["vae"], frames))

    def _decode(self, latents: Float[Array, "B t h w z"]) -> Videos:
        video, sound = fetch(decode(self.bundle.modules["vae"], latents))
        if not sound.all():
            raise FloatingPointError(
                f"{np.sum(~sound)} of {len(sound)} clips came out with numbers that "
                f"are not finite from {self.bundle.origin}; verify the checkpoint, or "
                "sample in float32."
            )
        return video


def read_mesh(text: str) -> dict[str, int]:
    """Read the sizes of a mesh, such as "sequence:4" or "data:2,sequence:-1".

    Axes that are not named have size 1.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition(":")
        if name not in sizes or not size.removeprefix("-").isdecimal():
            raise ValueError(
                f"--mesh={text}: {part!r} is no axis:size; name axes of "
                f"{', '.join(MESH_AXES)}, as in --mesh=sequence:4."
            )
        sizes[name] = int(size)
    return sizes


def with_mesh(config: ConfigDict, text: str | None) -> ConfigDict:
    """Give the config with `sample.mesh` as --mesh says, if it was given."""
    if text is None:
        return config
    changed = config.copy_and_resolve_references()
    changed.sample.mesh.update(read_mesh(text))
    return changed


def split_devices(sizes: Mapping[str, int], count: int) -> list[Mesh]:
    """Build as many meshes of `count` devices as this machine's devices make.

    Where `sizes` are those of one device, a clip's tokens are split over all of them.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"--devices-per-job={count} splits the devices of a process that is alone; "
            f"this is one of {jax.process_count()} joined ones, whose jobs span all."
        )
    devices = jax.local_devices()
    if not 1 <= count <= len(devices):
        raise ValueError(f"--devices-per-job={count} of {len(devices)} devices.")
    if all(size == 1 for size in sizes.values()):
        sizes = dict(sizes) | {"sequence": -1}
    filled = fill_mesh(sizes, count)
    places = range(0, len(devices) - count + 1, count)
    return [make_mesh(**filled, devices=devices[k : k + count]) for k in places]


def open_mesh(sizes: Mapping[str, int]) -> Mesh | None:
    """Build the mesh to generate on; None for one device, which needs none.

    One process may use the first of its devices alone, several use all they have.
    """
    devices = jax.devices()
    sizes = fill_mesh(sizes, len(devices))
    count = int(np.prod(list(sizes.values())))
    alone = jax.process_count() == 1
    if min(sizes.values()) < 1 or (not alone and count != len(devices)):
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"Mesh {shown} for {len(devices)} devices of {jax.process_count()} "
            "processes: sizes are 1 or more, and several processes use all devices."
        )
    if count == 1:
        return None
    return make_mesh(**sizes, devices=devices[:count] if alone else devices)


def open_generator(
    config: ConfigDict,
    checkpoint: Path | str,
    *,
    mesh: Mesh | None = None,
    without: tuple[str, ...] = (),
    text: Float32[np.ndarray, "S E"] | None = None,
    cities: Iterable[City] = (),
) -> Generator:
    """Open the newest model of a folder with the sampler of a config.

    Parameters lie on the mesh as `sample.rules` say, linears in the type that they
    compute in, those of blocks as int8 where `sample.weights_dtype` says so. `text`
    holds the rows of a prompt in the place of the checkpoint's. Nothing is read before
    it is needed. Raises ValueError if model, config and `cities` do not belong
    together.
    """
    sampler = read_sampler(config.sample, without)
    int8 = _read_int8(config.sample)
    rules = {name: tuple(axes) for name, axes in config.sample.rules.items()}
    dtype = loading_dtype() or COMPUTING
    with layout(mesh, rules):
        bundle = latest_model(checkpoint, dtype=dtype, mesh=mesh, int8=int8)
    check_model(config, bundle)
    check_cities(bundle, cities)
    bundle = computing_in(bundle, "vae", config.model.vae_dtype)
    if text is not None:
        bundle = with_text(bundle, text)
    return Generator(bundle, sampler, mesh, rules)


def _read_int8(sample: ConfigDict) -> tuple[str, ...]:
    if sample.weights_dtype not in ("", "int8"):
        raise ValueError(
            f"sample.weights_dtype is {sample.weights_dtype!r}; choose int8, or "
            "nothing for the type that each computes in."
        )
    return ("transformer.*",) if sample.weights_dtype else ()


def with_text(bundle: Bundle, text: Float32[np.ndarray, "S E"]) -> Bundle:
    """Give a bundle whose fixed prompt is another; ValueError if that does not fit."""
    if "transformer" not in bundle.descriptions:
        raise ValueError(f"{bundle.origin} has no transformer to prompt.")
    told = bundle.descriptions["transformer"]["config"]
    most, width = told["text_len"], told["text_dim"]
    if len(text) > most or text.shape[1] != width:
        raise ValueError(
            f"The text has {text.shape[0]} rows of {text.shape[1]}, {bundle.origin} "
            f"takes at most {most} of {width}; encode it by that model's text encoder."
        )
    return dataclasses.replace(bundle, text=text)
