"""What is learned of a module: how clips become examples, and the loss of examples.

Random draws depend on seed, step and clip alone, never on the mesh or on the order
within a batch.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int32
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import (
    Arrays,
    Bundle,
    Description,
    abstract_model,
    draw_parameters,
    parameters,
    with_parameters,
)
from cityrag_jax.int8 import is_scale, parameter_of
from cityrag_jax.model.adapters import MARK

Params = dict[str, Array]
Examples = dict[str, Array]  # every array has a leading clip axis
Encoders = dict[str, Any]  # modules by name, and as "text" the prompt's rows


DRAWN_LEVEL = np.float32(-1)


class Probe(NamedTuple):
    """Where held-out clips are measured: a draw of noise, and a level or its own.

    Probes are arguments, so that one program measures them all.
    """

    draw: np.int32
    level: np.float32


class Task(abc.ABC):
    """One way to train one module, whose name in a bundle is `part`.

    A task knows sizes and holds no array on a device: parameters, encoders and examples
    are arguments, so that its functions are pure. `encoders` describes the modules that
    make examples of clips and stand in the bundle beside the trained one; `text` are
    the rows of their prompt on the host.
    """

    part: str

    def __init__(
        self,
        config: ConfigDict,
        description: Description,
        encoders: Mapping[str, Description],
        text: np.ndarray | None = None,
    ):
        self.description = description
        self.encoders = dict(encoders)
        self.text = text
        self.seed = config.seed
        self._fitting = config.train.init_fitting
        self._abstract = abstract_model(description)

    def initial_parameters(
        self,
        start: Bundle | None,
        shardings: Mapping[str, Sharding],
        frozen: Mapping[str, np.dtype] | None = None,
    ) -> Params:
        """Give the parameters to start from, on their shards; what is missing is drawn.

        Where type and shards are as in the start, its arrays themselves are given. So
        are those of `frozen` that the start has in the type there: a base of 14B in
        float32 would not fit one device beside itself.
        """
        shapes = parameters(abstract_model(self.description))
        given = {}
        if start is not None and self.part in start.modules:
            given = self._adjust(parameters(start.modules[self.part]), shapes)
            if self._fitting:
                given = fitting(given, shapes)
            else:
                check_start(given, shapes, start.origin)
        # The start may be stored in bfloat16; what is trained keeps its own type.
        kept = {n for n in frozen or {} if n in given}
        kept = {n for n in kept if given[n].dtype == frozen[n]}
        given = {
            name: x if name in kept else x.astype(shapes[name].dtype)
            for name, x in given.items()
        }
        missing = {n: shardings[n] for n in shapes if n not in given}
        fresh = self._draw_parameters(missing) if missing else {}
        if not given:
            return fresh
        values = self._continue(fresh, given)
        return jax.device_put(values, {name: shardings[name] for name in values})

    def _draw_parameters(self, shardings: Mapping[str, Sharding]) -> Params:
        return draw_parameters(self.description, self.seed, shardings)

    def _adjust(self, given: Arrays, shapes: Arrays) -> Arrays:
        """Bring a start of another kind to the shapes that are trained here."""
        return given

    def _continue(self, fresh: Params, given: Params) -> Params:
        return fresh | given

    @abc.abstractmethod
    def encode(self, encoders: Encoders, clip: Clip) -> Examples:
        """Turn a batch of clips into examples."""

    def mix(self, batch: Clip | Examples, step: Int32[Array, ""]) -> Clip | Examples:
        """Let the clips of a batch, encoded or not, exchange something while whole."""
        return batch

    @abc.abstractmethod
    def loss(
        self,
        params: Params,
        encoders: Encoders,
        examples: Examples,
        step: Int32[Array, ""],
    ) -> tuple[Array, dict[str, Array]]:
        """Measure the training loss of a batch, with what else to report."""

    @property
    def probes(self) -> dict[str, list[Probe]]:
        """Say where held-out clips are measured: a name's losses are averaged.

        `held_out` is the loss; other names say what it is made of.
        """
        return {"held_out": [Probe(np.int32(0), DRAWN_LEVEL)]}

    @abc.abstractmethod
    def held_out_loss(
        self, params: Params, encoders: Encoders, examples: Examples, probe: Probe
    ) -> Float[Array, " B"]:
        """Measure each example at a probe, the same at every call."""

    def base(self, encoders: Encoders) -> Bundle:
        """Give what the training does not change but a model needs."""
        modules = {name: encoders[name] for name in self.encoders}
        described = self.encoders | {self.part: self.description}
        return Bundle(modules, described, self.text)

    def finish(
        self, params: Params, encoders: Encoders, clips: Iterator[Clip]
    ) -> Bundle:
        """Give the trained model with everything that is needed to use it.

        What has to be measured for that is measured on `clips`, training batches.
        """
        return self._bundle(params, encoders, self.description)

    def _bundle(self, params, encoders, description) -> Bundle:
        base = self.base(encoders)
        model = with_parameters(abstract_model(description), params)
        return dataclasses.replace(
            base,
            modules=base.modules | {self.part: model},
            descriptions=base.descriptions | {self.part: description},
        )


def fitting(given: Arrays, fresh: Arrays) -> Arrays:
    """Take of a start what has name and shape here, as behind other latents."""
    fits = {
        name
        for name, x in given.items()
        if name in fresh and x.shape == fresh[name].shape
    }
    return {name: x for name, x in given.items() if parameter_of(name) in fits}


def check_start(given: dict[str, Any], values: dict[str, Any], origin: str) -> None:
    """Parameters of the start must exist here; branches and adapters may be new."""
    given = {name: x for name, x in given.items() if not is_scale(name)}
    lines = [f"unknown here: {name}" for name in given if name not in values]
    lines += [
        f"{name}: {given[name].shape} there, {values[name].shape} here"
        for name in given
        if name in values and given[name].shape != values[name].shape
    ]
    has_branches = any(name.startswith("branches.") for name in given)
    lines += [
        f"missing there: {name}"
        for name in values
        if name not in given
        and MARK not in name
        and (has_branches or not name.startswith("branches."))
    ]
    if lines:
        raise ValueError(
            f"train.init_from ({origin}) does not fit this config:\n  "
            + "\n  ".join(lines[:20])
            + "\nUse the config it was trained with, or start from scratch; with "
            "--config.train.init_fitting=True what fits is taken and the rest drawn."
        )
