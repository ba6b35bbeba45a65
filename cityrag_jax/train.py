"""Train CityRAG or its autoencoder, on a laptop or a pod, by one command:

    python -m cityrag_jax.train --config=configs/toy_city.py[:variant] --workdir=DIR
        [--config.section.key=value ...] [--profile=A:B] [--distributed]

Everything is checked before training starts. Killed at any moment and started again
with the same command, it goes on from the last whole checkpoint, as if nothing had
happened; SIGTERM and Ctrl-C save first and exit with 143 and 130. DIR will hold:

    config.json      the config; once a checkpoint is there, another one is refused
    lock/            while it trains: another training there is refused
    base/            what training does not change: autoencoder, prompt, the frozen
    checkpoints/     the last few, each a folder named after its step
    metrics.jsonl    losses and speed
    profile/         a trace of the updates that --profile names
    damaged-STEP/    a checkpoint that could not be read
    model/           the finished model, for generate and evaluate
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import (
    TRUST,
    TrainingCheckpoints,
    hush_writers,
    save_bundle,
    trust,
)
from cityrag_jax.commands import Command
from cityrag_jax.leases import FolderLock
from cityrag_jax.parallel import (
    DISTRIBUTED,
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
    check_workdir,
    claim_workdir,
    training_mesh,
)
from cityrag_jax.training.examples import (
    Pool,
    Sources,
    Waiting,
    held_out_examples,
    open_cities,
    stream,
)
from cityrag_jax.training.grace import describe_grace
from cityrag_jax.training.latents import Latents, describe_latents
from cityrag_jax.training.log import (
    NoLog,
    TrainingLog,
    announce,
    say,
)
from cityrag_jax.training.losses import Losses, mean_losses
from cityrag_jax.training.memory import is_out_of_memory, out_of_memory
from cityrag_jax.training.optimizer import OptimizerConfig, learning_rate_schedule
from cityrag_jax.training.origin import trained_on
from cityrag_jax.training.profile import Profile, parse_steps
from cityrag_jax.training.program import Program, make_program
from cityrag_jax.training.samples import cover_videos, sample_videos, shows_videos
from cityrag_jax.training.schedule import Schedule, Signals, Stopped, describe_stop
from cityrag_jax.training.speed import Stopwatch, count_operations, describe_speed
from cityrag_jax.training.start import (
    Values,
    begin,
    read_base,
    read_start,
    resume,
    save,
)
from cityrag_jax.training.step import Metrics, TrainState
from cityrag_jax.training.task import Encoders, Examples, Params
from cityrag_jax.training.watchdog import Watchdog
from cityrag_jax.training.words import describe_end, describe_start


def train(config: ConfigDict, workdir: Path | str, profile: range = range(0)) -> Path:
    """Train to the end or the limit of time; return the folder of the finished model.

    Of the updates in `profile`, counted from 1, a trace is left in the workdir. Raises
    ValueError for anything wrong with config, cities or workdir before training, and
    for too little memory; FloatingPointError if losses stay non-finite; `Stopped` if a
    signal ended it early.
    """
    workdir = Path(workdir).absolute()
    check_config(config)
    sources = open_cities(config.data.city)
    mesh = training_mesh(config)
    lock = FolderLock(workdir)
    on_writer(lock.take)
    try:
        on_writer(lambda: check_workdir(workdir, config))
        with (
            layout(mesh, dict(config.train.rules)),
            TrainingCheckpoints(
                workdir / "checkpoints",
                keep=config.train.keep,
                keep_every=config.train.keep_every,
                writable=True,
            ) as checkpoints,
        ):
            path = workdir / "model"
            if config.train.steps in checkpoints.steps and path.exists():
                say(f"Training has ended before, at step {config.train.steps}.")
                say(describe_end(config, path))
                return path
            program, values = open_program(config, workdir, mesh, checkpoints)
            given = config, workdir, mesh, sources, checkpoints, program, profile
            return _Training(*given).run(*values)
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, config) from error
        raise
    finally:
        if is_writer():
            with contextlib.suppress(OSError):  # of a start that failed; else in use
                (workdir / "checkpoints").rmdir()
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
    announce("reading the weights")
    if checkpoints.steps:
        base = read_base(workdir, mesh)
        program = make(base)
        return program, resume(program, base, workdir, checkpoints, config.seed)
    start = read_start(config, mesh)
    program = make(start)
    on_writer(lambda: claim_workdir(workdir, config))
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
    profile: range

    def run(self, state: TrainState, frozen: Params, encoders: Encoders) -> Path:
        """Train from the state on, which is taken over; return the model's folder."""
        config, program = self.config, self.program
        first = int(state.step)
        say(describe_start(config, program, first))
        latents = self._open_latents(encoders)
        announce("compiling the update, beside what follows")
        update = self._compile_ahead()  # while the first clips are encoded
        encode = functools.partial(program.encode, encoders)
        announce("compiling the encoders, encoding held-out clips")
        held_out = held_out_examples(encode, self.sources, config, self.mesh)
        batches = Waiting(self._batches(first, encode, latents))
        watchdog = Watchdog(self.workdir / "progress", config.train.stuck_s)

        def measure(state):
            """Average the held-out losses, of averaged parameters if there are any."""
            watchdog.at("measuring the held-out loss")
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

        announce("compiling and measuring the held-out loss")
        held = measure(state)
        update = update.result()

        def call(state):
            watchdog.at("waiting for clips")
            batch = next(batches)
            watchdog.at("in an update")
            return update(state, frozen, encoders, batch)

        with self._open_log(first) as log, watchdog:

            def show(state, step):
                """Let TensorBoard play what the model makes of held-out clips."""
                watchdog.at("sampling held-out clips")
                params = frozen | (state.ema or state.params)
                given = config, program, params, encoders, held_out[0]
                videos = sample_videos(*given)
                videos, people = cover_videos(videos, self.sources, config)
                if people.not_anonymised and step <= first + config.eval.interval:
                    say(f"the videos in TensorBoard: {people.describe()}")
                log.show(step, videos, config.sample.fps)

            log.write(first, held)
            announce(f"training from step {first}, to {config.train.steps}")
            looks = measure, show if shows_videos(config) else None
            state, last = self._update(state, call, looks, batches, log)
        announce(f"held-out loss {(last or held)['held_out']:.4f}; writing the model")
        params = frozen | (state.ema or state.params)
        path = self._finish(params, encoders)
        say(describe_end(config, path))
        return path

    def _update(
        self,
        state: TrainState,
        call: Callable[[TrainState], tuple[TrainState, Metrics]],
        looks: tuple[Callable[[TrainState], dict[str, float]], Callable | None],
        batches: Waiting,
        log: NoLog,
    ) -> tuple[TrainState, dict[str, float]]:
        """Make updates until the last; give the state and its held-out losses.

        `looks` measures these and, if there are to be any, shows videos of them.
        """
        measure, show = looks
        config, step, held = self.config, int(state.step), {}
        end_of_first, warned = step + config.train.updates_per_call, False
        losses, watch = Losses(config.train.patience, config.train.spike), Stopwatch()
        profile = Profile(self.workdir / "profile", self.profile)
        with Signals() as signals, contextlib.closing(profile):
            schedule = Schedule(config, signals)
            while step < config.train.steps:
                profile.before(step, state)
                state, metrics = call(state)
                losses.add(step, metrics)
                step += config.train.updates_per_call
                profile.after(step, metrics)
                if step == end_of_first:  # what was not compiled ahead does not count
                    jax.block_until_ready(metrics)
                    schedule.start()
                self.checkpoints.check()
                due = schedule.after(step)
                if due.report:
                    try:
                        report = self._collect(losses, watch, batches, step)
                    finally:
                        for remark in losses.take_remarks():
                            log.remark(remark.step, str(remark))
                    if not warned:
                        warned = True
                        self._warn_of_grace(state, report["seconds_per_step"])
                    with watch.paused():
                        if due.evaluate:
                            report |= (held := measure(state))
                            if show is not None:
                                show(state, step)
                        log.report(step, report, schedule.spent)
                        if due.save and losses.healthy:
                            given = state, self.checkpoints, step, config.seed
                            save(self.program, *given)
                if due.signal:
                    self.checkpoints.wait()
                    given = self.checkpoints.steps, self.workdir
                    raise describe_stop(due.signal, step, *given)
                if due.last:
                    break
        if not losses.healthy:
            raise FloatingPointError(
                f"The last updates, up to {step}, were not finite."
            )
        self.checkpoints.wait()
        return state, held

    def _collect(
        self, losses: Losses, watch: Stopwatch, batches: Waiting, step: int
    ) -> dict[str, float]:
        """Average since the last report, with what the updates took; waits for them."""
        config, updates = self.config, losses.count
        report = losses.collect()
        operations = count_operations(config, self.program)
        report |= describe_speed(operations, updates, watch.take())
        options = OptimizerConfig(**config.optimizer)
        rate = learning_rate_schedule(
            options, options.learning_rate, config.train.steps
        )
        report["data_wait_s"] = batches.take_seconds() / updates
        return report | {"learning_rate": float(rate(step - 1))}

    def _warn_of_grace(self, state: TrainState, step_s: float) -> None:
        """Say so if a scheduler's grace is too short to end what runs and to save."""
        train = self.config.train
        if train.grace_s:
            given = step_s * train.updates_per_call, train.grace_s
            told = describe_grace(state, self.workdir, *given)
            if told:
                say(told)

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

    def _open_latents(self, encoders: Encoders) -> Latents | None:
        """Open the clips that are encoded already, which must fit all else."""
        config = self.config
        if not config.train.latents:
            return None
        latents = Latents(config.train.latents)
        made_of = describe_latents(config, self.sources, encoders)
        latents.check(made_of, self.program.batch)
        return latents

    def _batches(
        self, first: int, encode: Callable[[Clip], Examples], latents: Latents | None
    ) -> Iterator[Clip | Examples]:
        """Give what the updates take from step `first` on."""
        config = self.config
        if latents is not None:
            return latents.batches(config, first, self.mesh)
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


GRACE = "seconds that a scheduler grants from SIGTERM to SIGKILL: warn if too few"

COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.makes("--workdir", help="folder of this training; the same one goes on with it")
COMMAND.takes("--profile", metavar="A:B", help="trace updates A to B, counted from 1")
COMMAND.takes("--grace-s", type=float, default=0.0, help=GRACE)
COMMAND.switch("--distributed", DISTRIBUTED)
COMMAND.switch("--trust", TRUST)


def main(given: argparse.Namespace) -> int:
    """Run the command line; give 0, or what a signal makes of it."""
    hush_writers()
    keep_compilations()
    initialise(given.distributed)
    trust(given.trust)
    given.config.train.grace_s = given.grace_s or given.config.train.grace_s
    profile = parse_steps(given.profile) if given.profile else range(0)
    try:
        train(given.config, given.workdir, profile)
    except Stopped as stopped:
        if is_writer():
            print(stopped, file=sys.stderr, flush=True)
        return stopped.code
    return 0


if __name__ == "__main__":
    COMMAND.run(main)
