"""A painted city of four short drives and the models that tests of training need."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import synthetic_city as synthetic
from ml_collections import ConfigDict

from cityrag_jax.checkpoint import Bundle, describe, new_model, save_bundle
from cityrag_jax.data.mining import mine_pairs
from cityrag_jax.data.pairs import PairConfig, save_pairs
from cityrag_jax.model.vae import VAEConfig, WanVAE

ROOT = Path(__file__).parents[1]


def build_city(folder: Path) -> Path:
    """Two drives along one street to train on, two along another held out."""
    drives = [
        synthetic.line([0, 0, 2], 0, 40),
        synthetic.line([1.5, -1, 2], 0, 50),
        synthetic.line([300, 0, 2], 90, 40),
        synthetic.line([299, 1.5, 2], 90, 50),
    ]
    city = synthetic.build(folder, drives, neighbourhoods=[0, 0, 1, 1])
    config = PairConfig(num_frames=9, stride=2, min_condition=13, held_out=(1,))
    save_pairs(folder, mine_pairs(city.captures, city.name, config))
    return folder


def save_vae(folder: Path) -> Path:
    """An untrained autoencoder of base width 4."""
    description = describe(WanVAE, VAEConfig(base_dim=4))
    return save_bundle(
        folder, Bundle({"vae": new_model(description, 0)}, {"vae": description})
    )


def get_config(name: str, variant: str | None = "test", **changes) -> ConfigDict:
    """Read configs/NAME.py; `train__steps=3` sets config.train.steps."""
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    with config.unlocked():
        config.update_from_flattened_dict(
            {key.replace("__", "."): value for key, value in changes.items()}
        )
    return config


def command(config: str, workdir: Path, **changes) -> list[str]:
    """Make the trainer's command line; `train__steps=3` sets config.train.steps."""
    keys = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
    script = [sys.executable, "-m", "cityrag_jax.train"]
    return [*script, f"--config={ROOT}/configs/{config}", f"--workdir={workdir}", *keys]


def environment(folder: Path, devices: int = 1) -> dict[str, str]:
    """Some CPU devices, quick compilation, programs shared by a test's processes."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
        f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def run_trainer(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=600,
    )
