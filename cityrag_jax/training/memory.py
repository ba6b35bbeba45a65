"""What to do when the devices' memory is too small, cheapest first."""

import re

import jax
import numpy as np
from ml_collections import ConfigDict

from cityrag_jax.parallel import fill_mesh
from cityrag_jax.training.tasks import describe_model

EXHAUSTED = "RESOURCE_EXHAUSTED"
ASKED = re.compile(r"allocat\w* ([\d.]+ ?[KMGT]?i?B|\d+ bytes)")


def is_out_of_memory(error: Exception) -> bool:
    """Say whether XLA could not place something, when compiling or when running."""
    return isinstance(error, jax.errors.JaxRuntimeError) and EXHAUSTED in str(error)


def out_of_memory(error: Exception, config: ConfigDict) -> ValueError:
    """Turn XLA's error into advice for a config."""
    found = ASKED.search(str(error))
    asked = f" (asked for: {found[1]})" if found else ""
    kind = jax.devices()[0].device_kind
    steps = [f"  {i}. {text}" for i, text in enumerate(advise(config), 1)]
    return ValueError(
        f"the memory of {kind} is too small for this training{asked}. From the "
        "cheapest on:\n" + "\n".join(steps)
    )


def advise(config: ConfigDict) -> list[str]:
    """List what makes an update smaller, cheapest first, of what is not done yet."""
    advice = []
    train = config.train
    mesh = fill_mesh(dict(train.mesh), jax.device_count())
    ways = mesh["data"] * mesh["fsdp"]
    parts = _more_parts(train.batch_size // ways, train.micro_batches)
    if parts:
        advice.append(
            f"--config.train.micro_batches={parts} (now {train.micro_batches}): the "
            "same update, its clips one after the other."
        )
    if jax.default_backend() == "gpu":
        advice.append(
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment: JAX takes three "
            "quarters of a GPU's memory unless told."
        )
    if config.task == "CityRAG":
        advice += _advise_blocks(config, mesh)
    if train.pool:
        advice.append(
            f"--config.train.pool={max(train.pool // 2, train.batch_size)} (now "
            f"{train.pool}): fewer clips kept on the devices."
        )
    advice += [
        f"a smaller --config.train.batch_size (now {train.batch_size}; the update is "
        f"another one; a multiple of {ways}).",
        "more devices, or a config's variant made for fewer: --config=FILE:VARIANT.",
    ]
    return advice


def _advise_blocks(config: ConfigDict, mesh: dict[str, int]) -> list[str]:
    """Say what a transformer can compute again, keep elsewhere, or share."""
    sizes, advice = describe_model(config)["config"], []
    given = config.model.transformer
    prefix = "--config.model.transformer"
    if not sizes["remat"]:
        advice.append(f"{prefix}.remat=true: blocks compute again instead of keeping.")
    elif sizes["keep"] and "keep" in given:
        advice.append(
            f'{prefix}.keep="()" (now {tuple(sizes["keep"])}): attention is computed '
            "again, too."
        )
    if "block_input" not in given.get("offload", ("block_input",)):
        advice.append(
            f"{prefix}.remat=true {prefix}.offload=\"('block_input',)\": what blocks "
            "hand on waits in the host's memory."
        )
    if config.optimizer.frozen and not config.train.frozen_dtype:
        advice.append(
            "--config.train.frozen_dtype=int8: half of what is frozen of the blocks, "
            "rounded."
        )
    if config.optimizer.momentum_dtype == "float32":
        advice.append(
            "--config.optimizer.momentum_dtype=bfloat16: half of Muon's momentum, "
            "rounded."
        )
    devices, heads = int(np.prod(list(mesh.values()))), sizes["num_heads"]
    more = 2 * mesh["sequence"]
    if devices > 1 and devices % more == 0 and heads % more == 0:
        advice.append(
            f"--config.train.mesh.sequence={more} --config.train.mesh.fsdp=-1 (now "
            f"{mesh['sequence']}): more devices share a clip's tokens."
        )
    if devices > 1 and "sequence" not in tuple(config.train.rules.embed):
        advice.append(
            "--config.train.rules.embed=\"('fsdp','sequence')\": parameters over more "
            "devices."
        )
    return advice


def _more_parts(clips: int, parts: int) -> int:
    """Give the next number of parts that divides a device's clips; 0 if none does."""
    return next((n for n in range(parts + 1, clips + 1) if clips % n == 0), 0)
