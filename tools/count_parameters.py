"""Print the parameters of a model, part by part, without allocating any.

    python tools/count_parameters.py --preset=i2v_14b
    python tools/count_parameters.py --config=configs/cityrag_14b.py[:variant]

A preset (i2v_14b, t2v_14b, t2v_1_3b) is Wan 2.1's transformer with both branches of
CityRAG, and Wan's autoencoder; a config is the module that it trains. `--config.` takes
the same changes as the trainer does.
"""

import argparse
import math

import jax
from flax import nnx
from ml_collections import ConfigDict

from cityrag_jax.checkpoint import abstract_model
from cityrag_jax.commands import Command
from cityrag_jax.model.dit import DiTConfig, WanDiT
from cityrag_jax.model.geo_branch import GeoBranch
from cityrag_jax.model.trajectory_encoder import TrajectoryEncoder
from cityrag_jax.model.vae import VAEConfig, WanVAE
from cityrag_jax.training.tasks import describe_model

PRESETS = ("i2v_14b", "t2v_14b", "t2v_1_3b")

# Parts in the order in which the forward pass meets them; others follow by name.
ORDER = (
    "patch_embedding",
    "text_embedding",
    "time_embedding",
    "time_projection",
    "image_embedding",
    "blocks",
    "head",
)
# Modules of one layer each: told apart below, their leading axis being the layer.
STACKED = ("blocks", "layers", "projection")

Parts = dict[str, tuple[int, int]]


def preset_models(name: str) -> dict[str, nnx.Module]:
    """Give a preset's networks without their values."""
    config = getattr(DiTConfig, name)()

    def transformer() -> WanDiT:
        rngs = nnx.Rngs(0)
        branches = (GeoBranch(config, rngs=rngs), TrajectoryEncoder(config, rngs=rngs))
        return WanDiT(config, branches=branches, rngs=rngs)

    return {
        "transformer": nnx.eval_shape(transformer),
        "autoencoder": nnx.eval_shape(lambda: WanVAE(VAEConfig(), rngs=nnx.Rngs(0))),
    }


def config_models(config: ConfigDict) -> dict[str, nnx.Module]:
    """Give the network that a config trains without its values."""
    model = abstract_model(describe_model(config))
    return {type(model).__name__: model}


def count_parts(model: nnx.Module) -> Parts:
    """Count parameters and layers (1 where nothing is stacked) of each part.

    Parts are the module's attributes; stacked layers and branches are split further.
    """
    parts: Parts = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        shape = variable.get_value().shape
        name, stacked = _part(model, path)
        count, _ = parts.get(name, (0, 1))
        parts[name] = (count + math.prod(shape), shape[0] if stacked else 1)
    return dict(sorted(parts.items(), key=lambda part: _place(part[0])))


def _part(model: nnx.Module, path: tuple[str | int, ...]) -> tuple[str, bool]:
    prefix = []
    if path[0] == "branches":
        prefix, path = [type(model.branches[path[1]]).__name__], path[2:]
    stacked = path[0] in STACKED
    deeper = stacked and path[1] not in ("kernel", "bias")
    return ".".join([*prefix, *map(str, path[: 2 if deeper else 1])]), stacked


def _place(name: str) -> tuple[bool, int, str]:
    """Sort branches (named by their class) last, the rest by `ORDER`."""
    first = name.split(".")[0]
    place = ORDER.index(first) if first in ORDER else len(ORDER)
    return first[0].isupper(), place, name


def sums(parts: Parts) -> dict[str, int]:
    """Add up one block, the network without branches, each branch and everything."""
    added = {}
    block = [count // n for name, (count, n) in parts.items() if "blocks." in name]
    if block:
        added["one block"] = sum(block)
    for name, (count, _) in parts.items():
        group = name.split(".")[0]
        group = group if group[0].isupper() else "without branches"
        added[group] = added.get(group, 0) + count
    return added | {"all": sum(count for count, _ in parts.values())}


def print_table(title: str, parts: Parts) -> None:
    """Print one line a part: its layers, parameters of one layer and of all; sums."""
    print(f"{title:<36}{'layers':>8}{'per layer':>18}{'all':>18}")
    for name, (count, layers) in parts.items():
        print(f"  {name:<34}{layers:>8}{count // layers:>18,}{count:>18,}")
    for name, count in sums(parts).items():
        print(f"  {'sum: ' + name:<60}{count:>18,}")
    print()


COMMAND = Command(__doc__)
COMMAND.takes_config()
COMMAND.takes("--preset", choices=PRESETS, help="a network of Wan 2.1")


def main(given: argparse.Namespace) -> None:
    """Print the tables of the preset or of the config."""
    jax.config.update("jax_platforms", "cpu")
    if (given.preset is None) == (given.config is None):
        raise ValueError("Give either --preset or --config.")
    if given.preset:
        models = preset_models(given.preset)
    else:
        models = config_models(given.config)
    for name, model in models.items():
        print_table(name, count_parts(model))


if __name__ == "__main__":
    COMMAND.run(main)
