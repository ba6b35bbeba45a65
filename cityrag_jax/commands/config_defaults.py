"""What a config holds where its file says nothing else.

A file in `configs/` takes one of these and changes it; `config_keys.py` says what each
key means.
"""

from ml_collections import ConfigDict

ONE_DEVICE = dict(data=1, fsdp=1, sequence=1)
RULES = dict(embed=("fsdp",), heads=(), mlp=())


def trainer_defaults() -> ConfigDict:
    """Give what the trainer reads for every task; sizes and rates are the file's."""
    data = dict(city="", fov_deg=65.0, threads=16, workers=0)
    optimizer = dict(
        decay_fraction=0.0,
        weight_decay=0.0,
        clip_norm=1.0,
        frozen=(),
        newton_schulz_dtype="bfloat16",
        momentum_dtype="float32",
    )
    train = dict(
        micro_batches=1,
        pool=0,
        pool_start=0,
        fresh=0,
        encode_batch=1,
        latents="",
        frozen_dtype="",
        updates_per_call=1,
        ema_decay=0.0,
        patience=3,
        spike=4.0,
        stuck_s=1800.0,
        grace_s=0.0,
        max_seconds=0.0,
        init_from="",
        init_fitting=False,
        overfit=0,
        mesh=ONE_DEVICE,
        rules=RULES,
        checkpoint_minutes=0.0,
        keep=2,
        keep_every=0,
        save_dtype="bfloat16",
        tensorboard=False,
    )
    evaluation = dict(min_rotation_deg=0.0, seed=0)
    return ConfigDict(
        dict(seed=0, data=data, optimizer=optimizer, train=train, eval=evaluation)
    )


def cityrag_defaults() -> ConfigDict:
    """Give these and what a CityRAG model is trained, scored and sampled by."""
    config = trainer_defaults()
    config.task = "CityRAG"
    # LoRA: patterns such as "blocks.self_attention.*"; freeze their base beside it.
    adapters = dict(linears=(), rank=32, alpha=32.0)
    config.model = ConfigDict(dict(adapters=adapters, vae="", vae_dtype=""))
    config.train.update(
        unroll_blocks=1,
        stream_dtype="float32",
        shift=3.0,
        drop_probability=0.1,
        mismatch_probability=0.0,
    )
    config.eval.update(
        noise_levels=(), draws=1, videos=0, video_steps=10, table_clips=64
    )
    config.sample = ConfigDict(
        dict(
            shift=3.0,
            guidance="none",
            scales=(),
            guided=(0.0, 1.0),
            mesh=ONE_DEVICE,
            rules=RULES,
            keep_keys=False,
            weights_dtype="",
            preset="final",
            ratios=(),
            teacache=("i2v_14b_480p", False, 0.26),
            radius_m=15.0,
            fps=10.0,  # assumed: captures come at about 10 a second (3.1)
        )
    )
    return config
