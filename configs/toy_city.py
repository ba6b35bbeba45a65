"""CityRAG on the toy city: 18.3 M parameters, trained from scratch in minutes.

    python -m cityrag_jax.train --config=configs/toy_city.py:gpu \\
        --config.data.city=DIR --config.model.vae=VAE_WORKDIR --workdir=DIR

gpu     one H100, about 14 minutes; held-out loss 0.529 (README: what that looks like)
demo    two CPU cores, goes on for two minutes from --config.train.init_from=DIR: shows
        that the loss falls, not a trained model
test    seconds, for the tests

The recipe: all conditions from the first step, Muon at 2e-3 and Adam at 1e-3, linear
decay over the last 60 %, averaged parameters; clips join the pool while training goes
on. Clips of 33 frames at 96x160.
"""

from ml_collections import ConfigDict


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
    config = ConfigDict()
    config.task = "CityRAG"
    config.seed = 0

    config.data = ConfigDict()
    config.data.city = ""  # folders, separated by commas
    config.data.num_frames = 33
    config.data.height = 96
    config.data.width = 160
    config.data.fov_deg = 65.0
    config.data.condition_frames = (29, 37)
    config.data.yaw_rate_deg = (0.0, 4.0)
    config.data.threads = 16
    config.data.workers = 0

    config.model = ConfigDict()
    config.model.preset = ""
    config.model.transformer = ConfigDict(
        dict(
            dim=384,
            num_heads=6,
            num_layers=7,
            ffn_dim=768,
            in_channels=36,
            out_channels=16,
            freq_dim=128,
            text_dim=32,
            text_len=1,
            dtype="bfloat16",
            remat=False,
        )
    )
    config.model.pose = ConfigDict(dict(hidden=128))
    config.model.geo = ConfigDict(dict(latent_channels=16, same_place_bias=1.0))
    # LoRA: patterns such as "blocks.self_attention.*"; freeze their base beside it.
    config.model.adapters = ConfigDict(dict(linears=(), rank=32, alpha=32.0))
    config.model.vae = ""  # a folder; empty: that of train.init_from
    config.model.vae_dtype = ""  # of its arithmetic; empty: as stored
    config.model.text = "constant"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-3
    config.optimizer.adam_learning_rate = 1e-3
    config.optimizer.warmup_steps = 250
    config.optimizer.decay_fraction = 0.6
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.frozen = ()
    config.optimizer.newton_schulz_dtype = "bfloat16"
    config.optimizer.momentum_dtype = "float32"

    config.train = ConfigDict()
    config.train.steps = 10_200
    config.train.batch_size = 128
    config.train.micro_batches = 1  # parts of a batch whose gradients are added up
    config.train.pool = 32_768
    config.train.pool_start = 4096
    config.train.fresh = 128  # clips that join the pool after a call, the oldest leave
    config.train.encode_batch = 32
    config.train.latents = ""  # a folder of tools/encode_latents.py instead
    config.train.unroll_blocks = 7
    config.train.stream_dtype = "float32"
    config.train.frozen_dtype = ""  # as it computes; "int8" is half of bfloat16
    config.train.updates_per_call = 50
    config.train.shift = 3.0
    config.train.drop_probability = 0.1
    config.train.mismatch_probability = 0.04
    config.train.ema_decay = 0.998
    config.train.patience = 3
    config.train.spike = 4.0  # medians: a loss above is logged with its clips
    config.train.stuck_s = 1800.0  # without progress, then the job ends
    config.train.grace_s = 0.0  # between SIGTERM and SIGKILL, if known
    config.train.max_seconds = 0.0
    config.train.init_from = ""
    config.train.init_fitting = False  # take of it what has the same shape
    config.train.overfit = 0  # on so many clips alone, held out too
    config.train.mesh = ConfigDict(dict(data=1, fsdp=1, sequence=1))
    config.train.rules = ConfigDict(dict(embed=("fsdp",), heads=(), mlp=()))
    config.train.log_interval = 500
    config.train.checkpoint_interval = 5000
    config.train.checkpoint_minutes = 0.0  # or so often; 0: by steps alone
    config.train.keep = 2
    config.train.keep_every = 0  # steps of which one checkpoint stays for good
    config.train.save_dtype = "bfloat16"
    config.train.tensorboard = False

    config.eval = ConfigDict()
    config.eval.interval = 1000
    config.eval.clips = 64
    config.eval.min_rotation_deg = 0.0
    config.eval.videos = 0
    config.eval.video_steps = 10
    config.eval.seed = 0
    config.eval.noise_levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    config.eval.draws = 4
    config.eval.table_clips = 64
    config.eval.batch_size = 32

    config.sample = ConfigDict()
    config.sample.num_steps = 20
    config.sample.shift = 3.0
    config.sample.guidance = "none"  # scale 1 was best for PSNR
    config.sample.scales = ()
    config.sample.guided = (0.0, 1.0)  # from this share of the steps to that
    config.sample.mesh = ConfigDict(dict(data=1, fsdp=1, sequence=1))
    config.sample.rules = ConfigDict(dict(embed=("fsdp",), heads=(), mlp=()))
    config.sample.keep_keys = True
    config.sample.weights_dtype = ""  # as they compute; "int8": half, for time
    config.sample.preset = "final"  # every step; standard, draft, teacache: less
    config.sample.ratios = ()  # by tools/calibrate_cache.py; empty: Wan 2.1's
    config.sample.teacache = ("i2v_14b_480p", False, 0.26)  # preset teacache
    config.sample.spacing_m = 0.375  # between frames of a drawn path
    config.sample.radius_m = 15.0  # how far the first retrieved capture may be
    config.sample.fps = 10.0
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
