"""Train CityRAG or its autoencoder, on a laptop or a pod, by one command:

    python -m cityrag_jax.train --config=configs/toy_city.py[:variant] --workdir=DIR
        [--config.section.key=value ...] [--distributed]

Everything is checked before training starts. Killed at any moment and started again
with the same command, it goes on from the last whole checkpoint, as if nothing had
happened. DIR will hold:

    config.json      the config; another one is refused
    lock.json        while it trains: another training there is refused
    base/            what training does not change: autoencoder, prompt
    checkpoints/     the last few, each a folder named after its step
    metrics.jsonl    losses and speed
    model/           the finished model, for generate and evaluate
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict, config_flags

from cityrag_jax.checkpoint import (
    TrainingCheckpoints,
    abstract_model,
    load_bundle,
    parameter_shardings,
    parameters,
    save_bundle,
    stacked_parameters,
)
from cityrag_jax.parallel import (
    DISTRIBUTED,
    as_the_writer,
    fetch,
    initialise,
    is_writer,
    keep_compilations,
    layout,
    loading_dtype,
    on_writer,
)
from cityrag_jax.training.checks import (
    check_config,
    claim_workdir,
    training_mesh,
)
from cityrag_jax.training.examples import (
    Pool,
    Waiting,
    draw_batch,
    held_out_examples,
    open_cities,
    stream,
)
from cityrag_jax.training.lock import WorkdirLock
from cityrag_jax.training.log import NoLog, TrainingLog
from cityrag_jax.training.optimizer import (
    OptimizerConfig,
    label_parameters,
    make_optimizer,
)
from cityrag_jax.training.step import (
    TrainState,
    check_finite,
    init_state,
    make_step,
    state_shardings,
)
from cityrag_jax.training.task import Examples, Task
from cityrag_jax.training.tasks import make_task, read_start

STATISTICS_BATCHES = 32
GROUPS = ("params", "ema", "optimizer")


def train(config: ConfigDict, workdir: Path | str) -> Path:
    """Train to the end or the limit of time; return the folder of the finished model.

    Raises ValueError for anything wrong with config, cities or workdir before training,
    and FloatingPointError if losses stay non-finite.
    """
    workdir = Path(workdir).absolute()
    check_config(config)
    sources = open_cities(config.data.city)
    mesh = training_mesh(config)
    lock = WorkdirLock(workdir)
    on_writer(lock.take)
    try:
        on_writer(lambda: claim_workdir(workdir, config))
        with (
            layout(mesh, dict(config.train.rules)),
            TrainingCheckpoints(
                workdir / "checkpoints", keep=config.train.keep, writable=True
            ) as checkpoints,
        ):
            return _Training(config, workdir, mesh, sources, checkpoints).run()
    finally:
        lock.release()


class _Training:
    """One process's part in a training: set up in `__init__`, then `run`."""

    def __init__(self, config, workdir, mesh, sources, checkpoints):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.sources, self.checkpoints = sources, checkpoints
        self.task = self._make_task()
        model = abstract_model(self.task.description)
        self.stacked = stacked_parameters(model)
        self.shardings = parameter_shardings(model, mesh)
        options = OptimizerConfig(**config.optimizer)
        self.labels = label_parameters(parameters(model), options.frozen)
        steps = config.train.steps
        self.optimizer = make_optimizer(options, self.labels, steps, mesh)
        abstract = jax.eval_shape(self._init, parameters(model))
        self.state_shardings = None
        if mesh is not None:
            self.state_shardings = state_shardings(
                abstract, self.optimizer, self.shardings, mesh
            )
        self.abstract = _with_shardings(abstract, self.state_shardings)

    def _make_task(self) -> Task:
        """Make the task from the start model, or when resuming from what was kept."""
        base = self.workdir / "base"
        if self.checkpoints.steps:
            kept = load_bundle(base, dtype=loading_dtype(), mesh=self.mesh)
            return make_task(self.config, kept)
        task = make_task(self.config, read_start(self.config, self.mesh))
        save_bundle(base, task.base, overwrite=True)
        return task

    def _init(self, params: dict[str, Any]) -> TrainState:
        return init_state(params, self.optimizer, self.config.train.ema_decay)

    def restore(self) -> TrainState:
        """Give the newest checkpoint's state, or a new one."""
        if not self.checkpoints.steps:
            params = self.task.initial_parameters(self.shardings)
            return jax.jit(self._init, out_shardings=self.state_shardings)(params)
        wanted = {name: getattr(self.abstract, name) for name in GROUPS}
        wanted["step"] = {"step": self.abstract.step}
        groups, notes = self.checkpoints.restore(wanted, self.stacked)
        if notes["seed"] != self.config.seed:
            raise ValueError(
                f"The checkpoint was trained with seed {notes['seed']}, the config has "
                f"{self.config.seed}; use another workdir."
            )
        return TrainState(groups.pop("step")["step"], **groups)

    def run(self) -> Path:
        config, task = self.config, self.task
        path = self.workdir / "model"
        if config.train.steps in self.checkpoints.steps and path.exists():
            _say(f"Training has ended before, at step {config.train.steps}.")
            _say(describe_end(config, path))
            return path
        state = self.restore()
        first = int(state.step)
        held_out = held_out_examples(task, self.sources, config, self.mesh)
        measure = jax.jit(task.held_out_losses)
        update, examples = self._make_update(first)
        log = self._open_log(first)
        log.say(describe_start(config, self.labels, state.params, first))
        losses, step, clock = _Losses(config.train.patience), first, None
        intervals = config.train
        held = measure_held_out(measure, state, held_out)
        log.write(first, held)
        while step < intervals.steps:
            state, metrics = update(state, next(examples))
            losses.add(step, metrics)
            step += config.train.updates_per_call
            if clock is None:
                jax.block_until_ready(metrics)  # compilation does not count
                clock = time.monotonic()
            spent = time.monotonic() - clock
            last = step == intervals.steps
            if intervals.max_seconds > 0:
                last |= as_the_writer(spent > intervals.max_seconds)
            save = step % intervals.checkpoint_interval == 0 or last
            evaluate = step % config.eval.interval == 0 or last
            if step % intervals.log_interval == 0 or save or evaluate:
                waited = examples.take_seconds() / losses.count
                report = losses.collect() | {"data_wait_s": waited}
                if evaluate:
                    held = measure_held_out(measure, state, held_out)
                    report |= held
                log.report(step, report, spent)
            if save and losses.healthy:
                self._save(step, state)
            if last:
                break
        log.close()
        if not losses.healthy:
            raise FloatingPointError(
                f"The last updates, up to {step}, were not finite."
            )
        return self._finish(state, step, held["held_out"])

    def _open_log(self, first: int) -> NoLog:
        if not is_writer():
            return NoLog()
        return TrainingLog(
            self.workdir,
            first,
            self.config.train.steps,
            max_seconds=self.config.train.max_seconds,
            tensorboard=self.config.train.tensorboard,
        )

    def _make_update(self, first: int):
        """Give the jitted update and the iterator of what it takes."""
        config, task = self.config, self.task
        size = config.train.batch_size
        loss = task.loss
        if config.train.pool:
            examples = Pool(task, self.sources, config, self.mesh, first)

            def loss(params, pool, step):
                batch = draw_batch(pool, config.seed, step, size)
                return task.loss(params, batch, step)
        else:
            clips = stream(self.sources, config, first, self.mesh)
            examples = (task.encode(clip) for clip in clips)
        update = make_step(
            loss,
            self.optimizer,
            self.labels,
            config.train.ema_decay,
            self.state_shardings,
            config.train.updates_per_call,
        )
        return update, Waiting(examples)

    def _save(self, step: int, state: TrainState) -> None:
        groups = {name: getattr(state, name) for name in GROUPS}
        notes = {"part": self.task.part, "seed": self.config.seed, "next_batch": step}
        if step not in self.checkpoints.steps:
            self.checkpoints.save(
                step, groups | {"step": {"step": state.step}}, notes, self.stacked
            )

    def _finish(self, state: TrainState, step: int, held_out: float) -> Path:
        """Write `model/`: averaged parameters if there are any."""
        self.checkpoints.wait()
        bundle = self.task.finish(state.ema or state.params, self._some_examples(step))
        path = self.workdir / "model"
        save_bundle(path, bundle, dtype=self.config.train.save_dtype, overwrite=True)
        _say(f"Step {step}, held-out loss {held_out:.4f}.")
        _say(describe_end(self.config, path))
        return path

    def _some_examples(self, step: int) -> Iterator[Examples]:
        clips = stream(self.sources, self.config, 0, self.mesh)
        for _, clip in zip(range(STATISTICS_BATCHES), clips, strict=False):
            yield self.task.encode(clip)


class _Losses:
    """Metrics of the steps since the last report, left on the device until then.

    Adding those of a call waits for the end of the call `AHEAD` before it, so that the
    host never puts more batches on the devices.
    """

    AHEAD = 2

    def __init__(self, patience: int):
        self.patience = patience
        self.healthy = True
        self._steps, self._metrics = [], []
        self._bad = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keep the metrics of the updates of one call, the first of them `step`."""
        self._steps.extend(range(step, step + len(metrics["loss"])))
        self._metrics.append(metrics)
        if len(self._metrics) > self.AHEAD:
            jax.block_until_ready(self._metrics[-1 - self.AHEAD])

    @property
    def count(self) -> int:
        """The number of updates since the last report."""
        return len(self._steps)

    def collect(self) -> dict[str, float]:
        """Average over the finite steps; raise after `patience` bad ones in a row."""
        calls = fetch(self._metrics)
        metrics = {n: np.concatenate([call[n] for call in calls]) for n in calls[0]}
        bad = metrics.pop("refused").astype(bool)
        steps = self._bad + self._steps
        refused = [True] * len(self._bad) + bad.tolist()
        check_finite(steps, refused, self.patience)
        good = len(refused) - refused[::-1].index(False) if False in refused else 0
        self._bad = steps[good:]
        self.healthy = not self._bad
        mean = {
            name: float(np.mean(x[~bad])) if not bad.all() else np.nan
            for name, x in metrics.items()
        }
        self._steps, self._metrics = [], []
        return mean | {"refused": float(bad.sum())}


def measure_held_out(
    measure, state: TrainState, batches: list[Examples]
) -> dict[str, float]:
    """Average the held-out losses of the averaged parameters, if there are any."""
    losses = fetch([measure(state.ema or state.params, batch) for batch in batches])
    return {
        name: float(np.mean(np.concatenate([loss[name] for loss in losses])))
        for name in losses[0]
    }


def _with_shardings(abstract: TrainState, shardings: TrainState | None) -> TrainState:
    if shardings is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
    )


# --------------------------------------------------------------------------------------
# What a person reads
# --------------------------------------------------------------------------------------


def _say(text: str) -> None:
    """Print, in one process of all."""
    if is_writer():
        print(text)


def describe_start(config, labels, params, first: int) -> str:
    """Say what is trained, by what, and from where."""
    sizes = {label: 0 for label in ("muon", "adam", "frozen")}
    for name, label in labels.items():
        sizes[label] += int(np.prod(params[name].shape))
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


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse flags; an unknown config key becomes one line instead of a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        message = str(error.args[0]).replace("\\n", " ").replace("\n", " ")
        keys = [a.split("=")[0] for a in argv if a.startswith("--config.")]
        sys.exit(f"error: unknown config key in {' '.join(keys)}: {message}")


def main(argv: list[str]) -> None:
    """Run the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.ERROR)  # Orbax reports every step of every save
    keep_compilations()
    config = _CONFIG.value
    if not isinstance(config, ConfigDict):
        sys.exit("error: the file given by --config cannot be read; does it exist?")
    try:
        initialise(_DISTRIBUTED.value)
        train(config, _WORKDIR.value)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Python file with get_config(variant), such as configs/toy_city.py:demo. Change "
    "values by --config.section.key=value.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of this training; the same one goes on with it."
)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, DISTRIBUTED)

if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=_parse_flags)
