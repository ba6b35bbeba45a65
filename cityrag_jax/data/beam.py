"""A city's files of tiles made by Apache Beam: here, or by a cluster's machines.

Every file is an element of a pipeline, and who makes it writes what this process would.
Workers need this package, and the folders of pictures and city where they are here.
Beam wants older packages than the others here: it gets an environment of its own.
"""

import functools
import pickle
import shlex
from collections.abc import Iterator
from pathlib import Path

from cityrag_jax.data.shards import Job
from cityrag_jax.files import write_whole


def by_beam(options: str, job: Job, numbers: list[int]) -> Iterator[int]:
    """Spread files over the workers of a pipeline with options as Beam knows them.

    Raises OSError, which leaves what was made, where the pipeline fails.
    """
    import apache_beam as beam

    # What a pipeline carries is small; a job may know a million names.
    write_whole(job.pickled, pickle.dumps(job))
    make = functools.partial(make_file, str(job.pickled))
    try:
        with open_pipeline(options) as pipeline:
            asked = pipeline | beam.Create(numbers) | beam.Reshuffle()
            asked | "Make files" >> beam.Map(make)
    except RuntimeError as error:
        (*_, last) = [line for line in str(error).splitlines() if line.strip()]
        raise OSError(
            f"The pipeline failed: {last.strip()}. What it made stays; the same "
            "command goes on."
        ) from error
    yield from numbers


def open_pipeline(options: str):
    """Give an empty pipeline; ValueError for wrong options, or without Beam."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(
            "--beam needs Apache Beam, in an environment without the other extras: "
            "python3 -m venv beam && beam/bin/pip install -e '.[beam]', then "
            "beam/bin/python tools/build_city.py ..."
        ) from error
    try:
        return apache_beam.Pipeline(options=PipelineOptions(shlex.split(options)))
    except ValueError as error:
        raise ValueError(f"--beam={options}: {error}.") from error


def make_file(path: str, number: int) -> int:
    """Make a file of the job that lies at a path."""
    return _read_job(path)(number)


@functools.lru_cache(maxsize=1)
def _read_job(path: str) -> Job:
    return pickle.loads(Path(path).read_bytes())
