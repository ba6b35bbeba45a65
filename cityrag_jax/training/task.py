"""What is learned of a module: how clips become examples, and the loss of examples.

Random draws depend on seed, step and clip alone, never on the mesh or on the order
within a batch.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Sharding
from jaxtyping import Array, Int32
from ml_collections import ConfigDict

from cityrag_jax.batch import Clip
from cityrag_jax.checkpoint import (
    Bundle,
    Description,
    abstract_model,
    draw_parameters,
    parameters,
    with_parameters,
)
from cityrag_jax.model.adapters import MARK

Params = dict[str, Array]
Examples = dict[str, Array]  # every array has a leading clip axis


class Task(abc.ABC):
    """One way to train one module, whose name in a bundle is `part`.

    `base` is what the training does not change but a model needs.
    """

    part: str
    base: Bundle

    def __init__(
        self, config: ConfigDict, start: Bundle | None, description: Description
    ):
        self.description = description
        self.seed = config.seed
        self._start = start
        self._fitting = config.train.init_fitting
        self._abstract = abstract_model(description)

    def initial_parameters(self, shardings: Mapping[str, Sharding]) -> Params:
        """Give the parameters to start from, drawn or copied onto their shards."""
        fresh = self._draw_parameters(shardings)
        if self._start is None or self.part not in self._start.modules:
            return fresh
        given = self._adjust(parameters(self._start.modules[self.part]), fresh)
        if self._fitting:
            given = fitting(given, fresh)
        else:
            check_start(given, fresh, self._start.origin)
        # The start may be stored in bfloat16; what is trained keeps its own type.
        given = {name: x.astype(fresh[name].dtype) for name, x in given.items()}
        return jax.device_put(self._continue(fresh, given), dict(shardings))

    def _draw_parameters(self, shardings: Mapping[str, Sharding]) -> Params:
        return draw_parameters(self.description, self.seed, shardings)

    def _adjust(self, given: Params, fresh: Params) -> Params:
        """Bring a start of another kind to the shapes that are trained here."""
        return given

    def _continue(self, fresh: Params, given: Params) -> Params:
        return fresh | given

    @abc.abstractmethod
    def encode(self, clip: Clip) -> Examples:
        """Turn a batch of clips into examples on the device."""

    def mix(self, examples: Examples, step: Int32[Array, ""]) -> Examples:
        """Let the clips of a batch exchange something, while it is whole."""
        return examples

    @abc.abstractmethod
    def loss(
        self, params: Params, examples: Examples, step: Int32[Array, ""]
    ) -> tuple[Array, dict[str, Array]]:
        """Measure the training loss of a batch, with what else to report."""

    @abc.abstractmethod
    def held_out_losses(self, params: Params, examples: Examples) -> dict[str, Array]:
        """Measure examples with the same noise and times at every call.

        `held_out` of every clip is the loss; other names say what it is made of.
        """

    def finish(self, params: Params, examples: Iterable[Examples]) -> Bundle:
        """Give the trained model with everything that is needed to use it."""
        model = with_parameters(abstract_model(self.description), params)
        return dataclasses.replace(
            self.base,
            modules=self.base.modules | {self.part: model},
            descriptions=self.base.descriptions | {self.part: self.description},
        )


def fitting(given: Params, fresh: Params) -> Params:
    """Take of a start what has name and shape here, as behind other latents."""
    return {
        name: x
        for name, x in given.items()
        if name in fresh and x.shape == fresh[name].shape
    }


def check_start(given: dict[str, Any], values: dict[str, Any], origin: str) -> None:
    """Parameters of the start must exist here; branches and adapters may be new."""
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
