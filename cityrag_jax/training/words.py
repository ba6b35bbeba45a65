"""What is said of a training when it starts and when it ends."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cityrag_jax.training.program import Program


def describe_start(config: ConfigDict, program: Program, first: int) -> str:
    """Say what is trained, by what, and from where."""
    sizes = {label: 0 for label in ("muon", "adam", "frozen")}
    for name, label in program.labels.items():
        sizes[label] += int(np.prod(program.parameters[name].shape))
    total = sum(sizes.values())
    parts = ", ".join(f"{label} {n:,}" for label, n in sizes.items() if n)
    begin = f"going on from step {first}" if first else "from step 0"
    if config.train.init_from and not first:
        begin += f" with {config.train.init_from}"
    return f"{config.task}: {total:,} parameters ({parts}); {begin}."


def describe_end(config: ConfigDict, path: Path) -> str:
    """Say where the model is and what to do with it."""
    if config.task == "VAEReconstruction":
        return (
            f"The autoencoder is in {path}. Next: python -m cityrag_jax.train "
            f"--config=configs/toy_city.py --config.model.vae={path} --workdir=DIR"
        )
    return (
        f"The model is in {path}. Next: python -m cityrag_jax.evaluate "
        f"--config=CONFIG --checkpoint={path} --city={config.data.city} --out=DIR"
    )
