"""The toy city's autoencoder: trained to give back the frames that it is shown."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from cityrag_jax.checkpoint import (
    Bundle,
    Description,
    describe,
    read_config,
    with_parameters,
)
from cityrag_jax.diffusion import flow
from cityrag_jax.encode import to_unit
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.parallel import fetch
from cityrag_jax.training.task import Task

STATISTICS_BATCHES = 32  # of training clips, for mean and deviation of the latents
TILE = 8  # pixels: the side of a latent place


def describe_autoencoder(config: ConfigDict) -> Description:
    """Describe the config's autoencoder, its latents not yet measured."""
    sizes = config.model.autoencoder
    plain = dict(latent_mean=(0.0,) * sizes.z_dim, latent_std=(1.0,) * sizes.z_dim)
    return describe(WanVAE, VAEConfig(**sizes, **plain))


class VAEReconstruction(Task):
    """A video autoencoder of the Wan architecture from scratch, for toy cities.

    L1 + 0.5 L1 of spatial gradients + MSE + `texture_weight` times what local contrast
    differs by + a KL to the unit normal. The decoder sees `latent_noise` times the
    latents' deviation in noise besides the posterior's own, so that it forgives the
    transformer's errors. Mean and deviation of the latents, the posterior's noise
    included, are measured at the end and stored in the config: a channel that carries
    nothing stays near 0 instead of being blown up. Where the encoder is frozen they
    stay what they were, and so does every transformer behind it.
    """

    part = "vae"

    def __init__(self, config: ConfigDict, start: Bundle | None):
        description = describe_autoencoder(config)
        self.same_latents = "encoder.*" in config.optimizer.frozen
        if self.same_latents:
            if start is None or self.part not in start.descriptions:
                raise ValueError(
                    "optimizer.frozen has encoder.*, but there is no autoencoder to "
                    "start from; give --config.train.init_from=DIR."
                )
            given = read_config(start.descriptions[self.part])
            statistics = ("latent_mean", "latent_std")
            kept = {name: getattr(given, name) for name in statistics}
            sizes = dataclasses.replace(read_config(description), **kept)
            description = describe(WanVAE, sizes)
        super().__init__(config, description, encoders={})
        self.window = config.train.window_frames
        self.kl_weight = config.train.kl_weight
        self.latent_noise = config.train.latent_noise
        self.texture_weight = config.train.texture_weight

    def encode(self, encoders, clip):
        """Keep the target's 8-bit frames."""
        return {
            "frames": jnp.asarray(clip.frames),
            "clip_id": jnp.asarray(clip.clip_id),
        }

    def loss(self, params, encoders, examples, step):
        """Reconstruct `train.window_frames` at a random place of each clip."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        place_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(
            flow.clip_keys(key, examples["clip_id"])
        )
        frames = examples["frames"]
        last = frames.shape[1] - self.window
        places = jax.vmap(lambda k: jax.random.randint(k, (), 0, last + 1))(place_keys)
        windows = jax.vmap(
            lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, self.window)
        )(frames, places)
        return self._reconstruction_loss(params, to_unit(windows), noise_keys)

    def held_out_loss(self, params, encoders, examples, probe):
        """Reconstruct whole clips from the mean of their latents."""
        video = to_unit(examples["frames"])
        vae = with_parameters(self._abstract, params)
        decoded = vae.decode_raw(vae.posterior(video)[0])
        return reconstruction_errors(decoded, video)

    def _reconstruction_loss(self, params, video, noise_keys):
        vae = with_parameters(self._abstract, params)
        mean, log_variance = vae.posterior(video)
        log_variance = jnp.clip(log_variance, -30, 20)
        variance = jnp.exp(log_variance)
        if self.latent_noise:
            spread = jax.lax.stop_gradient(mean.var((0, 1, 2, 3), keepdims=True))
            variance += self.latent_noise**2 * spread
        noise = flow.draw_noise(noise_keys, mean.shape[1:])
        decoded = vae.decode_raw(mean + jnp.sqrt(variance) * noise)
        errors = reconstruction_errors(decoded, video).mean()
        if self.texture_weight:
            errors += self.texture_weight * texture_error(decoded, video)
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()
        mse = jnp.mean((jnp.clip(decoded, -1, 1) - video) ** 2)
        psnr = 10 * jnp.log10(4 / mse)
        return errors + self.kl_weight * kl, {"kl": kl, "psnr": psnr}

    def finish(self, params, encoders, clips):
        """Measure the latents' statistics and store them with the autoencoder."""
        if self.same_latents:
            return super().finish(params, encoders, clips)
        measure = jax.jit(self._moments)
        some = itertools.islice(clips, STATISTICS_BATCHES)
        moments = [fetch(measure(params, clip.frames)) for clip in some]
        first = np.mean([m[0] for m in moments], axis=0, dtype=np.float64)
        second = np.mean([m[1] for m in moments], axis=0, dtype=np.float64)
        config = dataclasses.replace(
            read_config(self.description),
            latent_mean=tuple(first.tolist()),
            latent_std=tuple(np.sqrt(second - first**2).tolist()),
        )
        return self._bundle(params, encoders, describe(WanVAE, config))

    def _moments(self, params, frames):
        vae = with_parameters(self._abstract, params)
        mean, log_variance = vae.posterior(to_unit(frames))
        axes = tuple(range(mean.ndim - 1))
        return mean.mean(axes), (mean**2 + jnp.exp(log_variance)).mean(axes)


def reconstruction_errors(
    decoded: Float[Array, "B T H W 3"], video: Float[Array, "B T H W 3"]
) -> Float[Array, " B"]:
    """Give L1 + 0.5 L1 of the gradients along H and W + MSE, for each clip."""
    difference = decoded - video
    gradients = sum(
        jnp.abs(jnp.diff(difference, axis=axis)).mean((1, 2, 3, 4)) for axis in (2, 3)
    )
    flat = jnp.abs(difference).mean((1, 2, 3, 4))
    return flat + 0.5 * gradients + (difference**2).mean((1, 2, 3, 4))


def texture_error(
    decoded: Float[Array, "B T H W 3"], video: Float[Array, "B T H W 3"]
) -> Float[Array, ""]:
    """Say how much local contrast differs: root mean squared gradients of 8x8 pixels.

    Errors of pixels alone are least where what cannot be known is left out; this term
    asks for as much texture as the truth has, wherever its edges lie.
    """
    contrasts = [_contrast(decoded), _contrast(video)]
    return jnp.abs(contrasts[0] - contrasts[1]).mean()


def _contrast(video):
    along_w = jnp.diff(video, axis=3)[:, :, :-1] ** 2
    along_h = jnp.diff(video, axis=2)[:, :, :, :-1] ** 2
    B, T, H, W, C = video.shape
    squares = jnp.pad(along_w + along_h, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))
    tiles = squares.reshape(B, T, H // TILE, TILE, W // TILE, TILE, C)
    return jnp.sqrt(tiles.mean((3, 5, 6)) + 1e-5)
