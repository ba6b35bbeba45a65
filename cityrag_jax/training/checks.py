"""What is checked before anything trains: the config, and the workdir's own."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cityrag_jax.batch import latent_shape
from cityrag_jax.files import write_whole
from cityrag_jax.parallel import RULES, check_rules, fill_mesh, make_mesh
from cityrag_jax.training.examples import clips_at_once
from cityrag_jax.training.tasks import describe_model

# What a training that goes on may change: machines, limits, what is shown of it. Keys
# that begin so.
FREE_KEYS = (
    *("train.mesh.", "train.rules.", "train.max_seconds", "train.log_interval"),
    *("train.keep", "train.tensorboard", "train.micro_batches", "train.stuck_s"),
    *("train.spike", "train.grace_s"),
    *("train.checkpoint_minutes", "train.latents"),
    *("data.threads", "data.workers"),
    *("eval.table_clips", "eval.batch_size", "eval.noise_levels", "sample."),
)


def check_config(config: ConfigDict) -> None:
    """Raise ValueError with everything in the config that cannot work."""
    problems = []

    def require(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    t, data = config.train, config.data
    devices = jax.device_count()
    try:
        mesh = fill_mesh(dict(t.mesh), devices)
        check_rules(dict(t.rules))
    except ValueError as error:
        raise ValueError(_joined([f"train.mesh, train.rules: {error}"])) from error
    sizes = {f"train.mesh.{name}": size for name, size in mesh.items()}
    names = ("steps", "batch_size", "encode_batch", "updates_per_call", "keep")
    names += ("micro_batches", "log_interval", "checkpoint_interval", "patience")
    sizes |= {f"train.{name}": t[name] for name in names}
    sizes |= {f"eval.{name}": config.eval[name] for name in ("clips", "interval")}
    for name, size in sizes.items():
        require(size >= 1, f"{name} is {size}; it must be 1 or more.")
    if problems:  # the rest divides by them
        raise ValueError(_joined(problems))
    count = int(np.prod(list(mesh.values())))
    require(
        count in (1, devices),
        f"train.mesh {mesh} has {count} places for {devices} devices; its product must "
        f"be {devices} (a size of -1 is what remains), or 1 to use one device.",
    )
    require(
        count > 1 or jax.process_count() == 1,
        f"train.mesh {mesh} uses one device, but there are {jax.process_count()} "
        f"processes; its product must be {devices}.",
    )
    over = {**RULES, **dict(t.rules)}["batch"]
    ways = int(np.prod([mesh[name] for name in over]))
    together = clips_at_once(config)
    shared = {"eval.clips, encoded together,": together}
    if t.pool:
        shared["train.encode_batch"] = t.encode_batch
    for name, size in shared.items():
        require(
            size % ways == 0,
            f"{name} {size} does not divide over {' x '.join(over)} = {ways}.",
        )
    require(
        t.batch_size % (t.micro_batches * ways) == 0,
        f"train.batch_size {t.batch_size} does not divide over micro_batches x "
        f"{' x '.join(over)} = {t.micro_batches * ways}.",
    )
    require(
        config.eval.clips % together == 0,
        f"eval.clips {config.eval.clips} must be a multiple of {together}, the clips "
        "that are encoded together, or not more.",
    )
    require(
        not t.pool or t.pool >= t.batch_size,
        f"train.pool {t.pool} is smaller than train.batch_size {t.batch_size}; use 0 "
        "to stream.",
    )
    require(
        not t.latents or not t.pool,
        f"train.latents is {t.latents!r} and train.pool {t.pool}: what is read needs "
        "no pool; set it to 0.",
    )
    _check_calls(config, require)
    require(
        t.save_dtype in ("float32", "bfloat16", "int8"),
        f"train.save_dtype is {t.save_dtype!r}; choose float32, bfloat16 or int8.",
    )
    kinds = ("float32", "bfloat16")
    for name in ("momentum_dtype", "newton_schulz_dtype"):
        kind = config.optimizer[name]
        require(
            kind in kinds, f"optimizer.{name} is {kind!r}; choose {' or '.join(kinds)}."
        )
    require(
        t.frozen_dtype in ("", "int8"),
        f"train.frozen_dtype is {t.frozen_dtype!r}; choose int8, or nothing for the "
        "type that each computes in.",
    )
    require(
        0 <= t.ema_decay < 1, f"train.ema_decay {t.ema_decay} must be 0 (off) to 1."
    )
    for name in ("learning_rate", "adam_learning_rate"):
        rate = config.optimizer[name]
        require(
            rate is None or 0 < rate < 1,
            f"optimizer.{name} is {rate}; give one between 0 and 1.",
        )
    zeros = ("max_seconds", "checkpoint_minutes", "overfit", "keep_every", "stuck_s")
    for name in (*zeros, "spike", "grace_s"):
        require(t[name] >= 0, f"train.{name} is {t[name]}; 0 turns it off.")
    if config.task == "CityRAG":
        _check_transformer(config, mesh, require)
    try:
        latent_shape(data.num_frames, data.height, data.width)
    except ValueError as error:
        problems.append(f"data: {error}")
    if problems:
        raise ValueError(_joined(problems))


def training_mesh(config: ConfigDict) -> Mesh | None:
    """Build the mesh of a config that was checked; None to train on one device."""
    sizes = fill_mesh(dict(config.train.mesh), jax.device_count())
    return make_mesh(**sizes) if np.prod(list(sizes.values())) > 1 else None


def _joined(problems: list[str]) -> str:
    return "The config does not work:\n  " + "\n  ".join(problems)


def _check_calls(config, require):
    """One call makes several updates from the pool, and joins whole batches to it."""
    t = config.train
    each = t.updates_per_call
    require(
        each == 1 or t.pool > 0,
        f"train.updates_per_call is {each} but train.pool is 0: a stream gives one "
        "batch for an update; use 1.",
    )
    intervals = {f"train.{n}": t[n] for n in _INTERVALS}
    for name, value in (intervals | {"eval.interval": config.eval.interval}).items():
        require(
            value % each == 0,
            f"{name} {value} is not a multiple of train.updates_per_call {each}.",
        )
    require(
        t.fresh % t.encode_batch == 0,
        f"train.fresh {t.fresh} is not a multiple of train.encode_batch "
        f"{t.encode_batch}.",
    )
    require(
        t.pool_start == 0 or t.pool_start >= t.batch_size,
        f"train.pool_start {t.pool_start} is smaller than train.batch_size "
        f"{t.batch_size}; use 0 to fill the pool at once.",
    )


_INTERVALS = ("steps", "log_interval", "checkpoint_interval")


def _check_transformer(config, mesh, require):
    heads = describe_model(config)["config"]["num_heads"]
    require(
        heads % mesh["sequence"] == 0,
        f"The transformer's {heads} heads do not divide over train.mesh.sequence = "
        f"{mesh['sequence']}.",
    )
    for name in ("drop_probability", "mismatch_probability"):
        share = config.train[name]
        require(0 <= share < 1, f"train.{name} {share} must be 0 to 1.")


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Compare the config with that of what was trained in a workdir, if anything was.

    One without a checkpoint holds nothing to be lost, and takes any config.
    """
    if not _was_trained(workdir):
        return
    path = workdir / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} has checkpoints but no config.json; use another.")
    try:
        stored = json.loads(path.read_text())
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(
            f"{path} is damaged: it is not the JSON object that training writes; put "
            "it back from a copy, or choose another --workdir."
        )
    compare_configs(stored, flatten_config(config), workdir)


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Write the config of a training that begins."""
    text = json.dumps(flatten_config(config), indent=1, sort_keys=True) + "\n"
    write_whole(workdir / "config.json", text)


def _was_trained(workdir: Path) -> bool:
    saved = workdir / "checkpoints"
    names = [path.name for path in saved.iterdir()] if saved.exists() else []
    damaged = list(workdir.glob("damaged-*"))
    return bool(damaged) or any(name.isdigit() for name in names)


def flatten_config(config: ConfigDict) -> dict[str, Any]:
    """Give all values by dotted key, as JSON would return them."""
    flat = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, ConfigDict):
            for key in value:
                visit(f"{prefix}.{key}" if prefix else key, value[key])
        else:
            flat[prefix] = value

    visit("", config)
    return json.loads(json.dumps(flat))


def compare_configs(
    stored: dict[str, Any], given: dict[str, Any], workdir: Path
) -> None:
    """Raise ValueError that names every key whose value differs, with both values."""
    absent = "(absent)"
    lines = [
        f"{key}: {stored.get(key, absent)!r} there, {given.get(key, absent)!r} now"
        for key in sorted(stored.keys() | given.keys())
        if not key.startswith(FREE_KEYS)
        and stored.get(key, absent) != given.get(key, absent)
    ]
    if lines:
        raise ValueError(
            f"{workdir} was trained with another config:\n  "
            + "\n  ".join(lines)
            + "\nRepeat the old command to go on, or choose another --workdir (with "
            "--config.train.init_from to start from this model)."
        )
