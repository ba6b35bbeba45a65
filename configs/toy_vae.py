"""The toy city's video autoencoder: Wan's architecture, about 3.5 M parameters.

    python -m cityrag_jax.train --config=configs/toy_vae.py:gpu \\
        --config.data.city=DIR --workdir=DIR

gpu     one H200, about 5 minutes; 30 to 31 dB on unseen clips after a second round by
        --config.train.init_from
demo    two CPU cores, a few minutes: shows falling losses only
test    seconds, for the tests

The shipped one was then taught texture with its encoder frozen, so that its latents
stay what they were (--config.train.texture_weight=4, 1,500 updates): on 32 unseen clips
29.6 dB instead of 30.3, but 0.80 of the truth's gradients instead of 0.46, their cosine
0.645 instead of 0.675 (H200, 28 November 2026). Fewer nats in the latents (kl_weight
0.02, 0.97 a number instead of 3.2) cost as much and did not help the transformer.

L1 + 0.5 L1 of gradients + MSE + a small KL, Adam 2e-3. At the end mean and standard
deviation of the latents are measured and stored with the model.
"""

from ml_collections import ConfigDict

from cityrag_jax.commands.config_defaults import trainer_defaults


def get_config(variant: str | None = None) -> ConfigDict:
    """Give the config of a variant: gpu (default), demo or test."""
    variants = {None: dict, "gpu": dict, "demo": _demo, "test": _test}
    if variant not in variants:
        raise ValueError(f"configs/toy_vae.py has gpu, demo and test, not {variant!r}.")
    config = _gpu()
    config.update(variants[variant]())
    return config.lock()


def _gpu() -> ConfigDict:
    config = trainer_defaults()
    config.task = "VAEReconstruction"
    config.data.update(
        num_frames=33,
        height=96,
        width=160,
        condition_frames=(29, 37),
        yaw_rate_deg=(0.0, 4.0),
    )
    autoencoder = dict(
        base_dim=16,
        z_dim=16,
        dim_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        temporal_downsample=(False, True, True),
        patch=1,
        dtype="bfloat16",
    )
    config.model = ConfigDict(dict(autoencoder=autoencoder))
    config.optimizer.update(
        learning_rate=2e-3,
        adam_learning_rate=2e-3,
        warmup_steps=100,
        decay_fraction=0.6,
        newton_schulz_dtype="float32",
    )
    config.train.update(
        steps=5000,
        batch_size=8,
        pool=4096,
        pool_start=1024,
        fresh=32,
        encode_batch=32,
        updates_per_call=25,
        # Whole clips: trained on 9 frames it gave 32 dB on those and 14 behind them.
        window_frames=33,
        kl_weight=4e-4,
        latent_noise=0.0,
        texture_weight=0.0,
        ema_decay=0.998,
        log_interval=50,
        checkpoint_interval=2000,
    )
    config.eval.update(interval=500, clips=64)
    return config


def _demo() -> dict:
    """Two cores."""
    return dict(
        data=dict(threads=2),
        model=dict(autoencoder=dict(dtype="float32")),
        train=dict(
            steps=400,
            batch_size=2,
            pool=32,
            pool_start=0,
            fresh=0,
            encode_batch=2,
            updates_per_call=1,
            window_frames=9,
            max_seconds=120.0,
            log_interval=1,
            checkpoint_interval=100,
        ),
        eval=dict(interval=100, clips=4),
    )


def _test() -> dict:
    """The smallest: base width 4, 9 frames of 32x48."""
    return dict(
        data=dict(
            num_frames=9,
            height=32,
            width=48,
            condition_frames=(5, 13),
            threads=2,
        ),
        model=dict(autoencoder=dict(base_dim=4, dtype="float32")),
        optimizer=dict(warmup_steps=5),
        train=dict(
            steps=20,
            batch_size=4,
            pool=16,
            pool_start=8,
            fresh=4,
            encode_batch=4,
            updates_per_call=1,
            window_frames=5,
            log_interval=5,
            checkpoint_interval=5,
            save_dtype="bfloat16",
        ),
        eval=dict(interval=10, clips=4),
    )
