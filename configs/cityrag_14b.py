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


def get_config(variant: str | None = None) -> ConfigDict:
    """Give the config for a machine, by default for 64 devices of 80 GB or more."""
    if variant is not None and variant not in VARIANTS:
        raise ValueError(
            f"configs/cityrag_14b.py has no variant {variant!r}; choose of "
            f"{', '.join(VARIANTS)}, or none."
        )
    config = ConfigDict()
    config.task = "CityRAG"
    config.seed = 0

    config.data = ConfigDict()
    config.data.city = ""  # folders, separated by commas
    config.data.num_frames = 73
    config.data.height = 480
    config.data.width = 832
    config.data.fov_deg = 65.0
    config.data.condition_frames = (61, 81)
    config.data.yaw_rate_deg = (0.0, 2.0)
    config.data.threads = 16
    config.data.workers = 4

    config.model = ConfigDict()
    config.model.preset = "i2v_14b"
    config.model.transformer = ConfigDict(
        dict(
            dtype="bfloat16",
            remat=True,
            keep=("self_attention", "geo_attention"),  # 24.3 GB a clip
            offload=(),  # to the host; "block_input" would be another 24.3 GB
        )
    )
    config.model.pose = ConfigDict(dict(hidden=512))
    config.model.geo = ConfigDict(
        dict(
            latent_channels=16,
            same_place_bias=0.0,
            # Or "copy", "scaled_copy". Muon at 1e-5 adds 2e-6 to an RMS an update: from
            # zero to 0.014, the size of the base's, takes 7,000 of 20,000 all one way.
            output="zero",
        )
    )
    # LoRA: patterns such as "blocks.self_attention.*"; freeze their base beside it.
    config.model.adapters = ConfigDict(dict(linears=(), rank=32, alpha=32.0))
    config.model.vae = ""  # a folder; empty: that of train.init_from
    config.model.vae_dtype = ""  # of its arithmetic; empty: as stored, Wan's bfloat16
    config.model.text = "from_checkpoint"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-5
    config.optimizer.adam_learning_rate = 1e-5
    config.optimizer.warmup_steps = 500
    config.optimizer.decay_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.frozen = (
        "blocks.cross_attention.*",
        "text_embedding.*",
        "image_embedding.*",
    )
    config.optimizer.newton_schulz_dtype = "bfloat16"
    config.optimizer.momentum_dtype = "float32"

    config.train = ConfigDict()
    config.train.steps = 20_000
    config.train.batch_size = 32
    config.train.micro_batches = 1  # parts of a batch whose gradients are added up
    config.train.pool = 0
    config.train.pool_start = 0
    config.train.fresh = 0
    config.train.encode_batch = 1
    config.train.latents = ""  # a folder of tools/encode_latents.py instead
    config.train.unroll_blocks = 1
    config.train.stream_dtype = "float32"
    config.train.frozen_dtype = ""  # as it computes; "int8" is half of bfloat16
    config.train.updates_per_call = 1
    config.train.shift = 3.0
    config.train.drop_probability = 0.1
    config.train.mismatch_probability = 0.0
    config.train.ema_decay = 0.0
    config.train.patience = 3
    config.train.spike = 4.0  # medians: a loss above is logged with its clips
    config.train.stuck_s = 1800.0  # without progress, then the job ends
    config.train.grace_s = 0.0  # between SIGTERM and SIGKILL, if known
    config.train.max_seconds = 0.0
    config.train.init_from = ""
    config.train.init_fitting = False  # take of it what has the same shape
    config.train.overfit = 0  # on so many clips alone, held out too
    config.train.mesh = ConfigDict(dict(data=1, fsdp=-1, sequence=8))
    config.train.rules = ConfigDict(dict(embed=("fsdp", "sequence"), heads=(), mlp=()))
    config.train.log_interval = 10
    config.train.checkpoint_interval = 500
    config.train.checkpoint_minutes = 30.0  # or so often; 0: by steps alone
    config.train.keep = 3
    config.train.keep_every = 0  # steps of which one checkpoint stays for good
    config.train.save_dtype = "bfloat16"
    config.train.tensorboard = True

    config.eval = ConfigDict()
    config.eval.interval = 500
    config.eval.clips = 32
    config.eval.min_rotation_deg = 0.0
    config.eval.videos = 1  # sampled where tensorboard is on: 20 forwards
    config.eval.video_steps = 10
    config.eval.seed = 0
    config.eval.noise_levels = ()
    config.eval.draws = 1
    config.eval.table_clips = 64
    config.eval.batch_size = 2  # another place needs a second clip

    config.sample = ConfigDict()
    config.sample.num_steps = 40
    config.sample.shift = 3.0
    config.sample.guidance = "joint"
    config.sample.scales = (5.0,)  # assumed
    config.sample.guided = (0.0, 1.0)  # from this share of the steps to that
    config.sample.mesh = ConfigDict(dict(data=1, fsdp=1, sequence=1))
    config.sample.rules = ConfigDict(dict(embed=("fsdp",), heads=(), mlp=()))
    config.sample.keep_keys = False  # 26.8 GB for 3 % of the time
    config.sample.weights_dtype = ""  # as they compute; "int8": half, for time
    config.sample.preset = "final"  # every step; standard, draft, teacache: less
    config.sample.ratios = ()  # by tools/calibrate_cache.py; empty: Wan 2.1's
    config.sample.teacache = ("i2v_14b_480p", False, 0.26)  # preset teacache
    config.sample.spacing_m = 0.5  # between frames of a drawn path
    config.sample.radius_m = 15.0  # how far the first retrieved capture may be
    config.sample.fps = 10.0  # assumed: captures come at about 10 a second (3.1)
    if variant is not None:
        VARIANTS[variant](config)
    return config.lock()


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
