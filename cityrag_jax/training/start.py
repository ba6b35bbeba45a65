"""The values of a program: of step 0 from a start model, or of the last checkpoint.

What is not the program's argument afterwards is garbage: the start's own parameters
become those of the state, or are dropped.
"""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cityrag_jax.checkpoint import (
    Bundle,
    Damaged,
    Modules,
    TrainingCheckpoints,
    computing_in,
    hold,
    latest_model,
    load_bundle,
    load_frozen,
    save_bundle,
    save_frozen,
)
from cityrag_jax.parallel import loading_dtype
from cityrag_jax.training.log import announce, say
from cityrag_jax.training.optimizer import split_frozen
from cityrag_jax.training.program import Program, frozen_as_int8
from cityrag_jax.training.step import TrainState
from cityrag_jax.training.task import Encoders, Params
from cityrag_jax.training.tasks import TRAIN_ONE, CityRAG

GROUPS = ("params", "ema", "optimizer")

Values = tuple[TrainState, Params, Encoders]


def read_start(config: ConfigDict, mesh: Mesh | None = None) -> Bundle | None:
    """Read what a new training starts from, onto the mesh, each network when asked for.

    That is the model of `train.init_from`, if any, with the autoencoder of `model.vae`
    in the place of its own, if that is given; it computes in `model.vae_dtype`.
    """
    kinds = dict(dtype=loading_dtype(), mesh=mesh)
    start = None
    if config.train.init_from:
        int8 = [f"{CityRAG.part}.{name}" for name in frozen_as_int8(config)]
        start = latest_model(config.train.init_from, **kinds, int8=int8)
    if config.task != "CityRAG":
        return start
    if config.model.vae:
        start = _with_autoencoder(start, config.model.vae, kinds)
    if start is None or "vae" not in start.descriptions:
        return start
    return computing_in(start, "vae", config.model.vae_dtype)


def _with_autoencoder(start: Bundle | None, folder: str, kinds: dict) -> Bundle:
    other = latest_model(folder, **kinds)
    if "vae" not in other.modules:
        raise ValueError(f"There is no autoencoder in {folder}; {TRAIN_ONE}.")
    start = start or dataclasses.replace(other, modules={}, descriptions={}, text=None)
    return dataclasses.replace(
        start,
        modules=Modules.of(start.modules) | {"vae": other.modules["vae"]},
        descriptions=start.descriptions | {"vae": other.descriptions["vae"]},
    )


def read_base(workdir: Path, mesh: Mesh | None = None) -> Bundle:
    """Read what `begin` kept of the start: a resumed training needs no more of it."""
    return load_bundle(workdir / "base", dtype=loading_dtype(), mesh=mesh)


def begin(program: Program, start: Bundle | None, workdir: Path) -> Values:
    """Make the values of step 0 and write `base/`; takes the start's arrays over."""
    task = program.task
    encoders = open_encoders(program, start)
    save_bundle(workdir / "base", task.base(encoders), overwrite=True)
    shardings = {name: x.sharding for name, x in program.parameters.items()}
    types = {name: x.dtype for name, x in program.frozen.items()}
    params = task.initial_parameters(start, shardings, types)
    params, frozen = split_frozen(params, program.labels)
    frozen = hold(frozen, program.frozen)
    save_frozen(workdir, frozen, program.stacked)
    return program.begin(params), frozen, encoders


def resume(
    program: Program,
    base: Bundle,
    workdir: Path,
    checkpoints: TrainingCheckpoints,
    seed: int,
) -> Values:
    """Read the values of the newest whole checkpoint.

    A damaged one is set aside and the one before it is taken. Raises ValueError if none
    is left, or if the seed is another.
    """
    wanted = {name: getattr(program.state, name) for name in GROUPS}
    wanted["step"] = {"step": program.state.step}
    groups, notes = _restore_newest(checkpoints, wanted, program.stacked)
    if notes["seed"] != seed:
        raise ValueError(
            f"The checkpoint was trained with seed {notes['seed']}, the config has "
            f"{seed}; use another workdir."
        )
    state = TrainState(groups.pop("step")["step"], **groups)
    frozen = load_frozen(workdir, program.frozen, program.stacked)
    return state, frozen, open_encoders(program, base)


def _restore_newest(checkpoints, wanted, stacked):
    while True:
        *older, newest = checkpoints.steps
        announce(f"reading the checkpoint of step {newest}")
        try:
            return checkpoints.restore(wanted, stacked, newest)
        except Damaged as error:
            path = checkpoints.set_aside(newest)
            say(f"{error}")
            if not older:
                raise ValueError(
                    f"{path} was the only checkpoint and is damaged; remove "
                    f"{checkpoints.folder.parent} to start anew."
                ) from error
            say(
                f"It is set aside as {path}; going on from step {older[-1]}, which "
                f"repeats {newest - older[-1]} steps."
            )


def save(
    program: Program,
    state: TrainState,
    checkpoints: TrainingCheckpoints,
    step: int,
    seed: int,
) -> None:
    """Start to save a checkpoint that `resume` reads, unless there is one."""
    if step in checkpoints.steps:
        return
    groups = {name: getattr(state, name) for name in GROUPS}
    groups["step"] = {"step": state.step}
    notes = {"part": program.task.part, "seed": seed, "next_batch": step}
    checkpoints.save(step, groups, notes, program.stacked)


def open_encoders(program: Program, start: Bundle | None) -> Encoders:
    """Give a program's encoders, those of the start, and the prompt's rows."""
    encoders = {name: start.modules[name] for name in program.task.encoders}
    if program.task.text is None:
        return encoders
    rows = jax.device_put(program.task.text, program.encoders["text"].sharding)
    return encoders | {"text": rows}
