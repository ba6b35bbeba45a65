"""CityRAG on the toy city: 18.3 M parameters, trained from scratch in minutes.

    python -m cityrag_jax.train --config=configs/toy_city.py:gpu \\
        --config.data.city=DIR --config.model.vae=VAE_WORKDIR --workdir=DIR

gpu     two H200, 21 minutes from the weights before (README: what that looks like)
demo    two CPU cores, goes on for two minutes from --config.train.init_from=DIR: shows
        that the loss falls, not a trained model
test    seconds, for the tests

The recipe: all conditions from the first step, Muon at 2e-3 and Adam at 1e-3, linear
decay over the last 60 %, averaged parameters; clips join the pool while training goes
on. Clips of 33 frames at 96x160. A token is 16 pixels high and 8 wide, for what moves
in a street moves along its width.
"""

from ml_collections import ConfigDict

from cityrag_jax.commands.config_defaults import cityrag_defaults


def get_config(variant: str | None = None) -> ConfigDict:
    """Give the config of a variant: gpu (default), demo or test."""
    variants = {None: dict, "gpu": dict, "demo": _demo, "test": _test}
    if variant not in variants:
        raise ValueError(
            f"configs/toy_city.py has gpu, demo and test, not {variant!r}."
        )
    config = _gpu()
    config.update(variants[variant]())
    return config.lock()


def _gpu() -> ConfigDict:
    config = cityrag_defaults()
    config.data.update(
        num_frames=33,
        height=96,
        width=160,
        condition_frames=(29, 37),
        yaw_rate_deg=(0.0, 4.0),
    )
    transformer = dict(
        dim=384,
        num_heads=6,
        num_layers=7,
        ffn_dim=768,
        in_channels=36,
        out_channels=16,
        patch=(2, 1),
        freq_dim=128,
        text_dim=32,
        text_len=1,
        dtype="bfloat16",
        remat=False,
    )
    config.model.update(
        preset="",
        transformer=transformer,
        pose=dict(hidden=128),
        geo=dict(latent_channels=16, same_place_bias=1.0),
        text="constant",
    )
    config.optimizer.update(
        learning_rate=2e-3,
        adam_learning_rate=1e-3,
        warmup_steps=250,
        decay_fraction=0.6,
    )
    config.train.update(
        steps=19_500,
        shift=5.0,
        batch_size=128,
        pool=32_768,
        pool_start=4096,
        fresh=192,
        encode_batch=32,
        unroll_blocks=7,
        updates_per_call=50,
        mismatch_probability=0.02,
        stream_dtype="bfloat16",
        ema_decay=0.998,
        log_interval=500,
        checkpoint_interval=5000,
    )
    config.eval.update(
        interval=1000,
        clips=64,
        noise_levels=(0.1, 0.3, 0.5, 0.7, 0.9),
        draws=4,
        batch_size=32,
    )
    # Guidance: scale 1, that is none, was best for PSNR.
    config.sample.update(num_steps=20, keep_keys=True, spacing_m=0.375)
    return config


def _demo() -> dict:
    """Two cores: small batches, a small pool, a constant small rate."""
    return dict(
        data=dict(threads=2),
        model=dict(transformer=dict(dtype="float32")),
        optimizer=dict(
            learning_rate=1e-4,
            adam_learning_rate=1e-4,
            warmup_steps=10,
            decay_fraction=0.0,
            newton_schulz_dtype="float32",
        ),
        train=dict(
            stream_dtype="float32",
            batch_size=2,
            pool=12,  # encoding a clip takes some seconds
            pool_start=0,
            fresh=0,
            encode_batch=2,
            unroll_blocks=1,
            updates_per_call=1,
            max_seconds=120.0,
            log_interval=1,
            checkpoint_interval=50,
        ),
        eval=dict(
            interval=50,
            clips=2,
            draws=4,
            noise_levels=(),
            table_clips=8,
            batch_size=4,
        ),
    )


def _test() -> dict:
    """The smallest that has every part: 9 frames of 32x48."""
    return dict(
        data=dict(
            num_frames=9,
            height=32,
            width=48,
            condition_frames=(5, 13),
            threads=2,
        ),
        model=dict(
            transformer=dict(
                dim=32,
                num_heads=8,
                num_layers=2,
                ffn_dim=48,
                freq_dim=32,
                text_dim=8,
                dtype="float32",
            ),
            pose=dict(hidden=16),
        ),
        optimizer=dict(warmup_steps=5, newton_schulz_dtype="float32"),
        train=dict(
            stream_dtype="float32",
            steps=20,
            batch_size=4,
            pool=16,
            pool_start=8,
            fresh=4,
            encode_batch=4,
            unroll_blocks=1,
            updates_per_call=1,
            log_interval=5,
            checkpoint_interval=5,
            save_dtype="float32",
        ),
        eval=dict(
            interval=10,
            clips=4,
            draws=2,
            noise_levels=(0.5,),
            table_clips=4,
            batch_size=2,
        ),
        sample=dict(num_steps=4),
    )
