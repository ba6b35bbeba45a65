"""Workers: each takes jobs of a list one after the other, on a mesh of its own.

*Independent*: processes that know nothing of each other share a list through leases
(`jobs.leases`); a process may have several workers, each on some of its devices.
*Joined*: several processes of one `jax.distributed` are one worker, whose mesh spans
their hosts; the writer takes the leases and tells the others.

A job's bytes depend on its line, on what run.json says and on the shape of the mesh:
not on who made it, when, or beside what.
"""

import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cityrag_jax.checkpoint import Damaged, identify_model
from cityrag_jax.commands.command import describe_error, is_refusal
from cityrag_jax.data.store import City
from cityrag_jax.generator import Generator, open_generator, with_text
from cityrag_jax.jobs.folder import JobsFolder
from cityrag_jax.jobs.lines import JobLine
from cityrag_jax.parallel import any_process, from_writer, is_writer, on_writer
from cityrag_jax.request import Request, generate_into, read_request
from cityrag_jax.sampling import read_sampler
from cityrag_jax.training.examples import clip_config

POLL_S = 2.0  # between looks for jobs that others hold
NONE, WAIT = -1, -2


@dataclasses.dataclass
class Model:
    """What videos are made with: a checkpoint on a mesh, read with the first job."""

    config: ConfigDict
    checkpoint: Path
    city: City
    mesh: Mesh | None = None

    def __post_init__(self):
        self._opened: Generator | None = None

    @functools.cached_property
    def weights(self) -> str:
        """The digest of the checkpoint as it stands now; no weight is read."""
        return identify_model(self.checkpoint)

    def made_by(self) -> dict[str, Any]:
        """Say what decides about all videos besides their lines."""
        told = json.loads(self.config.to_json())
        sample = {k: v for k, v in told["sample"].items() if k not in ("mesh", "rules")}
        return {
            "weights": self.weights,
            "city": self.city.name,
            "clips": dataclasses.asdict(clip_config(self.config.data)),
            "vae_dtype": told["model"]["vae_dtype"],
            "sample": sample,
        }

    def read(self, line: JobLine) -> Request:
        """Read what a line names; ValueError for what cannot be generated."""
        config = line.configure(self.config)
        request = read_request(line.found(), config, self.checkpoint, self.city)
        return dataclasses.replace(request, seed=line.noise_seed())

    def open(self) -> Generator:
        """Open the checkpoint; whatever is wrong with it is wrong for all jobs."""
        if self._opened is None:
            kinds = dict(mesh=self.mesh, cities=[self.city])
            self._opened = open_generator(self.config, self.checkpoint, **kinds)
        return self._opened

    def serve(self, request: Request) -> Generator:
        """Give the generator that a request wants: its sampler, its prompt."""
        opened = self.open()
        sampler, bundle = read_sampler(request.config.sample, request.without), None
        if request.text is not None:
            bundle = with_text(opened.bundle, request.text)
        bundle = bundle or opened.bundle
        return dataclasses.replace(opened, sampler=sampler, bundle=bundle)


@dataclasses.dataclass
class Worker:
    """Takes jobs until all are settled or it is told to stop."""

    folder: JobsFolder
    model: Model
    stopped: Callable[[], bool]

    def run(self) -> bool:
        """Say whether all jobs of the list are settled."""
        while True:
            place = self._next()
            if place == NONE:
                return True
            line = None if place == WAIT else self.folder.lines[place]
            if any_process(np.array([self.stopped()]))[0]:
                if line is not None:
                    on_writer(lambda line=line: self.folder.let_go(line))
                return False
            if line is None:
                time.sleep(POLL_S)
            else:
                self._do(line)

    def _next(self) -> int:
        place = NONE
        if is_writer():
            taken, waits = self.folder.next()
            place = taken if taken is not None else WAIT if waits else NONE
        return int(from_writer(np.int32(place)))

    def _do(self, line: JobLine) -> None:
        began, made = time.monotonic(), []
        request = self._prepare(line)
        if request is None:
            return
        self.model.open()
        work = self._open_work(line)
        try:
            whole = generate_into(
                work,
                request,
                opened=self.model.serve,
                on_clip=lambda job, clip: made.append(clip.number),
                stopped=lambda: self.stopped() or self._is_lost(line),
                facts=self._facts(line, request),
            )
            if whole:
                on_writer(lambda: self.folder.finish(line))
        except (ValueError, FloatingPointError, OSError) as error:
            if self._is_lost(line):  # what another process does now is no fault
                whole = False
            elif isinstance(error, OSError | Damaged) or not is_refusal(error):
                raise  # of the disk, the weights or this program: of all jobs
            else:
                self._fail(line, str(error))
                return
        spent = {"clips": len(made), "seconds": round(time.monotonic() - began, 1)}
        on_writer(lambda: self._end(line, whole, spent))

    def _prepare(self, line: JobLine) -> Request | None:
        """Read a job's files and match its path; None if that fails, recorded then."""
        request, reason, weights = None, line.fault, self.model.weights
        if is_writer() and not reason:
            reason = self.folder.explain_other(line)
        try:
            if not reason:
                request = self.model.read(line)
                request = dataclasses.replace(request, weights=weights)
                say(f"job {line.name}: {len(request.job.spans)} clips")
        except Exception as error:  # of whatever kind: the other jobs are to go on
            reason = describe_error(error)[0]
        if not any_process(np.array([bool(reason)]))[0]:
            return request
        self._fail(line, reason or "Another of the joined processes could not read it.")
        return None

    def _fail(self, line: JobLine, reason: str) -> None:
        def record() -> None:
            self.folder.fail(line, reason)
            self.folder.log(line, "failed", reason=reason)

        on_writer(record)

    def _open_work(self, line: JobLine) -> Path:
        number = self.folder.leases.number(line.name) if is_writer() else 0
        number = int(from_writer(np.int32(number)))
        on_writer(lambda: self.folder.open_work(line, number))
        return self.folder.work(line, number)

    def _end(self, line: JobLine, whole: bool, spent: dict[str, Any]) -> None:
        state = "done" if whole else "lost" if self._is_lost(line) else "parked"
        if not whole:
            self.folder.let_go(line)
        self.folder.log(line, state, **spent)

    def _is_lost(self, line: JobLine) -> bool:
        return is_writer() and not self.folder.leases.holds(line.name)

    def _facts(self, line: JobLine, request: Request) -> dict[str, Any]:
        return {
            "id": line.name,
            "line": line.facts(),
            "without": list(request.without),
            "checkpoint": str(self.model.checkpoint),
            "jax": jax.__version__,
            "config": json.loads(request.config.to_json()),
        }


def say(text: str) -> None:
    """Print a line, of several processes in one."""
    if is_writer():
        print(text, flush=True)


def run_jobs(
    folder: JobsFolder, models: Sequence[Model], stopped: Callable[[], bool]
) -> bool:
    """Do all jobs that can be done, a worker for each model.

    Says whether all are settled. An error that is no job's own stops all workers.
    """
    broken = threading.Event()

    def run(model: Model) -> bool:
        try:
            return Worker(folder, model, lambda: stopped() or broken.is_set()).run()
        except BaseException:
            broken.set()
            raise

    try:
        if len(models) == 1:
            return run(models[0])
        with ThreadPoolExecutor(len(models)) as pool:
            return all(list(pool.map(run, models)))
    finally:
        on_writer(folder.close)
