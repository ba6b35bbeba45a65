"""Train CityRAG or its autoencoder, on a laptop or a pod, by one command:

    python -m cityrag_jax.train --config=configs/toy_city.py[:variant] --workdir=DIR
        [--config.section.key=value ...] [--distributed]

Everything is checked before training starts. Killed at any moment and started again
with the same command, it goes on from the last whole checkpoint, as if nothing had
happened. DIR will hold:

    config.json      the config; another one is refused
    lock.json        while it trains: another training there is refused
    base/            what training does not change: autoencoder, prompt, the frozen
    checkpoints/     the last few, each a folder named after its step
    metrics.jsonl    losses and speed
    model/           the finished model, for generate and evaluate
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import TRUST, TrainingCheckpoints, save_bundle, trust
from cityrag_jax.commands import Command
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
from cityrag_jax.training.checks import check_config, claim_workdir, training_mesh
from cityrag_jax.training.examples import (
    Pool,
    Sources,
    Waiting,
    held_out_examples,
    open_cities,
    stream,
)
from cityrag_jax.training.lock import WorkdirLock
from cityrag_jax.training.log import NoLog, TrainingLog
from cityrag_jax.training.origin import trained_on
from cityrag_jax.training.program import Program, make_program
from cityrag_jax.training.start import (
    Values,
    begin,
    read_base,
    read_start,
    resume,
    save,
)
from cityrag_jax.training.step import TrainState, check_finite
from cityrag_jax.training.task import Encoders, Examples, Params


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
            path = workdir / "model"
            if config.train.steps in checkpoints.steps and path.exists():
                _say(f"Training has ended before, at step {config.train.steps}.")
                _say(describe_end(config, path))
                return path
            program, values = open_program(config, workdir, mesh, checkpoints)
            training = _Training(config, workdir, mesh, sources, checkpoints, program)
            return training.run(*values)
    finally:
        lock.release()


def open_program(
    config: ConfigDict,
    workdir: Path,
    mesh: Mesh | None,
    checkpoints: TrainingCheckpoints,
) -> tuple[Program, Values]:
    """Build the program with its values: new ones, or those of the last checkpoint.

    The start model is not kept: what the training needs of it stands in the values.
    """
    make = functools.partial(make_program, config, mesh, encoders_dtype=loading_dtype())
    if checkpoints.steps:
        base = read_base(workdir, mesh)
        program = make(base)
        return program, resume(program, base, workdir, checkpoints, config.seed)
    start = read_start(config, mesh)
    program = make(start)
    return program, begin(program, start, workdir)


@dataclasses.dataclass(frozen=True)
class _Training:
    """One process's part in a training."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh | None
    sources: Sources
    checkpoints: TrainingCheckpoints
    program: Program

    def run(self, state: TrainState, frozen: Params, encoders: Encoders) -> Path:
        """Train from the state on, which is taken over; return the model's folder."""
        config, program = self.config, self.program
        first = int(state.step)
        update = self._compile_ahead()  # while the first clips are encoded
        encode = functools.partial(program.encode, encoders)
        held_out = held_out_examples(encode, self.sources, config, self.mesh)
        batches = Waiting(self._batches(first, encode))
        log = self._open_log(first)
        log.say(describe_start(config, program, first))

        def measure(state):
            """Average the held-out losses, of averaged parameters if there are any."""
            params = frozen | (state.ema or state.params)
            losses = {
                name: [
                    program.measure(params, encoders, batch, probe)
                    for probe in probes
                    for batch in held_out
                ]
                for name, probes in program.task.probes.items()
            }
            return mean_losses(fetch(losses))

        losses, step, clock = _Losses(config.train.patience), first, None
        intervals = config.train
        held = measure(state)
        log.write(first, held)
        update = update.result()
        while step < intervals.steps:
            state, metrics = update(state, frozen, encoders, next(batches))
            losses.add(step, metrics)
            step += config.train.updates_per_call
            if clock is None:
                jax.block_until_ready(metrics)  # compilation does not count
                clock = time.monotonic()
            spent = time.monotonic() - clock
            last = step == intervals.steps
            if intervals.max_seconds > 0:
                last |= as_the_writer(spent > intervals.max_seconds)
            due = step % intervals.checkpoint_interval == 0 or last
            evaluate = step % config.eval.interval == 0 or last
            if step % intervals.log_interval == 0 or due or evaluate:
                waited = batches.take_seconds() / losses.count
                report = losses.collect() | {"data_wait_s": waited}
                if evaluate:
                    held = measure(state)
                    report |= held
                log.report(step, report, spent)
            if due and losses.healthy:
                save(program, state, self.checkpoints, step, config.seed)
            if last:
                break
        log.close()
        if not losses.healthy:
            raise FloatingPointError(
                f"The last updates, up to {step}, were not finite."
            )
        self.checkpoints.wait()
        params = frozen | (state.ema or state.params)
        path = self._finish(params, encoders)
        _say(f"Step {step}, held-out loss {held['held_out']:.4f}.")
        _say(describe_end(config, path))
        return path

    def _compile_ahead(self) -> Future[jax.stages.Compiled]:
        """Compile the update in a thread of its own, where nothing waits for it."""
        rules = dict(self.config.train.rules)

        def compile_update():
            with layout(self.mesh, rules):  # a context holds in its own thread alone
                return self.program.update.lower(*self.program.arguments).compile()

        worker = ThreadPoolExecutor(1)
        compiled = worker.submit(compile_update)
        worker.shutdown(wait=False)
        return compiled

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

    def _batches(self, first: int, encode) -> Iterator[Clip | Examples]:
        """Give what the updates take from step `first` on."""
        config = self.config
        if config.train.pool:
            return Pool(encode, self.sources, config, self.mesh, first)
        return stream(self.sources, config, first, self.mesh)

    def _finish(self, params: Params, encoders: Encoders) -> Path:
        """Write `model/`."""
        path, dtype = self.workdir / "model", self.config.train.save_dtype
        bundle = self.program.task.finish(params, encoders, self._clips())
        origin = trained_on(self.config, (city for city, _ in self.sources))
        bundle = dataclasses.replace(bundle, source={**bundle.source, **origin})
        return save_bundle(path, bundle, dtype=dtype, overwrite=True)

    def _clips(self) -> Iterator[Clip]:
        """Stream training clips, once the first is asked for."""
        yield from stream(self.sources, self.config, 0, self.mesh)


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


def mean_losses(losses: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Average the losses of clips over batches and probes, name by name."""
    return {name: float(np.mean(np.concatenate(x))) for name, x in losses.items()}


# --------------------------------------------------------------------------------------
# What a person reads
# --------------------------------------------------------------------------------------


def _say(text: str) -> None:
    if is_writer():
        print(text)


def describe_start(config: ConfigDict, program: Program, first: int) -> str:
    """Say what is trained, by what, and from where."""
    sizes = {label: 0 for label in ("muon", "adam", "frozen")}
    for name, x in program.parameters.items():
        sizes[program.labels[name]] += int(np.prod(x.shape))
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


COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.needs("--workdir", help="folder of this training; the same one goes on with it")
COMMAND.switch("--distributed", DISTRIBUTED)
COMMAND.switch("--trust", TRUST)


def main(given: argparse.Namespace) -> None:
    """Run the command line."""
    logging.set_verbosity(logging.ERROR)  # Orbax reports every step of every save
    keep_compilations()
    initialise(given.distributed)
    trust(given.trust)
    train(given.config, given.workdir)


if __name__ == "__main__":
    COMMAND.run(main)
