"""CityRAG on Wan 2.1 I2V-14B at 480P, as the paper trains it (appendix C).

    python -m cityrag_jax.train --config=configs/cityrag_14b.py \\
        --config.train.init_from=CONVERTED --config.data.city=DIR --workdir=DIR

73 frames of 832x480, Muon at a fixed 1e-5 with warm-up, 20,000 updates; the paper used
32 A100. Not trained by us yet. CONVERTED is a folder made by tools/convert_wan.py; its
CLIP tower sees the first image. Behind the file's name stands what it is laid out for:

    :gpu8       8 cards of 80 GB       62 GiB a card by formula     395 h on H100
    :gpu32      32 cards of 80 GB      66 GiB a card by formula     313 h on A100
    :h200x4     4 H200                 92 GiB a card by formula     790 h
    :v5p-128    64 chips, 4x4x4        50 GiB a chip, compiled      106 h
    :v6e-256    256 chips, 16x16       13 GiB a chip, compiled      20 h
    :tpu7x-128  64 chips, 4x4x4        22 GiB a half by formula     21 h
    :one_gpu    1 H200, branches alone, one clip an update
                                       117 GiB by formula           99 h
    :one_gpu80  1 H100 of 80 GB, the same upon an int8 base
                                       71 GiB by formula            116 h

Hours are planned, not measured: twice the roofline (cityrag_jax/plan/README.md, by
tools/plan_pod.py). GPUs want XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. Without a variant the
mesh is one for 64 devices: 8 share a clip's tokens, the rest splits the batch.

Text cross-attention is frozen as the paper says; its image twin and the embedders of
text and image too (*assumed*). Batch and warm-up are *assumed*.
"""

from ml_collections import ConfigDict

from cityrag_jax.commands.config_defaults import cityrag_defaults


def get_config(variant: str | None = None) -> ConfigDict:
    """Give the config for a machine, by default for 64 devices of 80 GB or more."""
    if variant is not None and variant not in VARIANTS:
        raise ValueError(
            f"configs/cityrag_14b.py has no variant {variant!r}; choose of "
            f"{', '.join(VARIANTS)}, or none."
        )
    config = _paper()
    if variant is not None:
        VARIANTS[variant](config)
    return config.lock()


def _paper() -> ConfigDict:
    config = cityrag_defaults()
    config.data.update(
        num_frames=73,
        height=480,
        width=832,
        condition_frames=(61, 81),
        yaw_rate_deg=(0.0, 2.0),
        workers=4,
    )
    transformer = dict(
        dtype="bfloat16",
        remat=True,
        keep=("self_attention", "geo_attention"),  # 24.3 GB a clip
        offload=(),  # to the host; "block_input" would be another 24.3 GB
    )
    config.model.update(
        preset="i2v_14b",
        transformer=transformer,
        pose=dict(hidden=512),
        # `output` or "copy", "scaled_copy". Muon at 1e-5 adds 2e-6 to an RMS an update:
        # from zero to 0.014, the base's size, takes 7,000 of 20,000 all one way.
        geo=dict(latent_channels=16, same_place_bias=0.0, output="zero", view_poses=0),
        text="from_checkpoint",
    )
    config.optimizer.update(
        learning_rate=1e-5,
        adam_learning_rate=1e-5,
        warmup_steps=500,
        frozen=(
            "blocks.cross_attention.*",
            "text_embedding.*",
            "image_embedding.*",
        ),
    )
    config.train.update(
        steps=20_000,
        batch_size=32,
        mesh=dict(fsdp=-1, sequence=8),
        rules=dict(embed=("fsdp", "sequence")),
        log_interval=10,
        checkpoint_interval=500,
        checkpoint_minutes=30.0,
        keep=3,
        tensorboard=True,
    )
    # `batch_size`: another place needs a second clip. A video takes 20 forwards.
    config.eval.update(interval=500, clips=32, batch_size=2, videos=1)
    # `scales` are assumed. Keys of all conditions are 26.8 GB, for 3 % of the time.
    config.sample.update(num_steps=40, guidance="joint", scales=(5.0,), spacing_m=0.5)
    return config


def _machine(fsdp: int, sequence: int, micro_batches: int):
    """Lay the training out over so many devices; the batch stays the paper's."""

    def change(config: ConfigDict) -> None:
        config.train.mesh.update(data=1, fsdp=fsdp, sequence=sequence)
        config.train.micro_batches = micro_batches

    return change


def _one_gpu(config: ConfigDict) -> None:
    """Train the branches alone; the base is frozen, in the types it computes in."""
    config.optimizer.frozen = (
        *("blocks.*", "head.*", "patch_embedding.*", "text_embedding.*"),
        *("image_embedding.*", "time_embedding.*", "time_projection.*"),
    )
    config.train.batch_size = 1
    config.train.mesh.update(data=1, fsdp=1, sequence=1)
    config.model.transformer.offload = ("block_input",)


def _one_gpu80(config: ConfigDict) -> None:
    """Train the branches alone in 80 GB: the base is int8, kernels run again."""
    _one_gpu(config)
    config.train.frozen_dtype = "int8"
    config.optimizer.momentum_dtype = "bfloat16"
    config.model.transformer.keep = ()


VARIANTS = {
    "gpu8": _machine(fsdp=4, sequence=2, micro_batches=8),
    "gpu32": _machine(fsdp=32, sequence=1, micro_batches=1),
    "h200x4": _machine(fsdp=2, sequence=2, micro_batches=16),
    "v5p-128": _machine(fsdp=8, sequence=8, micro_batches=1),
    "v6e-256": _machine(fsdp=32, sequence=8, micro_batches=1),
    "tpu7x-128": _machine(fsdp=16, sequence=8, micro_batches=1),
    "one_gpu": _one_gpu,
    "one_gpu80": _one_gpu80,
}
