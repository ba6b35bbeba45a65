"""Accelerators and how they are joined: the makers' figures that a plan divides by.

A topology is written `v5p:4x4x4` (chips along each axis of a torus) or `h100:32` (cards
in nodes of eight). TPUs: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x; speed of
a link: jax-ml/scaling-book, tpus.md. GPUs: NVIDIA's data sheets of the SXM cards; their
network, one 400 Gb/s port a card (A100: 200), is *assumed*.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from cityrag_jax.chips import PEAKS

GB, GIB, TERA = 1e9, 2.0**30, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; of a TPU7x chip that is a half.

    `memory` in bytes, `flops` dense bfloat16 and `bandwidth` of that memory a second.
    `link` is one way in bytes a second: of one link of a TPU, of all NVLinks of a card.
    A torus of a TPU closes along axes that are multiples of `wrap`. `network` is what a
    card sends out of its node of `node` cards.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    wrap: int = 0
    devices: int = 1
    node: int = 0
    network: float = 0.0

    @property
    def is_tpu(self) -> bool:
        """Say whether the compiler for it runs without it."""
        return not self.node


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * GB, PEAKS["TPU v5 lite"], 819 * GB, 45 * GB, wrap=16),
        Chip("v5p", 95 * GIB, PEAKS["TPU v5"], 2765 * GB, 90 * GB, wrap=4),
        Chip("v6e", 32 * GB, PEAKS["TPU v6"], 1638 * GB, 90 * GB, wrap=16),
        # Two devices a chip, each with half of its memory, speed and links.
        Chip("tpu7x", 96 * GIB, PEAKS["TPU7x"], 3690 * GB, 45 * GB, wrap=4, devices=2),
        Chip(
            *("a100", 80 * GIB, PEAKS["A100"], 2039 * GB, 300 * GB),
            **dict(node=8, network=25 * GB),
        ),
        Chip(
            *("h100", 79.6 * GIB, PEAKS["H100"], 3350 * GB, 450 * GB),
            **dict(node=8, network=50 * GB),
        ),
        Chip(
            *("h200", 140.4 * GIB, PEAKS["H200"], 4800 * GB, 450 * GB),
            **dict(node=8, network=50 * GB),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and their shape: chips along each axis, or a count of cards.

    `written` is how it was given, and for TPUs what libtpu knows it by.
    """

    written: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Count the devices as JAX does."""
        return math.prod(self.shape) * self.chip.devices

    def speed(self, places: Sequence[Sequence[int]]) -> float:
        """Give the bytes a second, one way, that each of a group of devices can send.

        `places` are their coordinates on the torus, or (node, number in it). Along
        every axis on which they differ a device has a link to either side, where the
        axis closes to a ring; the ends of an open axis have one.
        """
        if not self.chip.is_tpu:
            nodes = {node for node, _ in places}
            return self.chip.link if len(nodes) == 1 else self.chip.network
        links = sum(2 if closed else 1 for _, closed in self._spread(places))
        return max(links, 1) * self.chip.link  # halves of one chip: at least a link

    def hops(self, places: Sequence[Sequence[int]]) -> float:
        """Give how many links a message between two of a group passes, at least 1.

        A quarter of a ring in the mean, a third of an open line, along every axis;
        those of several axes are used side by side.
        """
        if not self.chip.is_tpu:
            return 1.0
        far = sum(n / (4 if closed else 3) for n, closed in self._spread(places))
        return max(far, 1.0)

    def _spread(self, places):
        """Give the axes along which places differ: how many, and whether in a ring."""
        spread = []
        for size, along in zip(self.shape, zip(*places, strict=True), strict=False):
            count = len(set(along))
            if count > 1:
                spread.append((count, size % self.chip.wrap == 0 and count == size))
        return spread


def read_topology(written: str) -> Topology:
    """Read `kind:AxBxC` or `kind:N`. Raises ValueError for unknown kinds and shapes."""
    kind, _, shape = written.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(
            f"--topology={written} is not KIND:SHAPE with a kind of "
            f"{', '.join(CHIPS)}; write v5p:4x4x4 (chips of a torus) or h100:32 "
            "(cards)."
        )
    chip, sizes = CHIPS[kind], tuple(int(size) for size in shape.split("x"))
    wanted = {"v5e": 2, "v6e": 2}.get(kind, 3 if chip.is_tpu else 1)
    if len(sizes) != wanted:
        raise ValueError(
            f"--topology={written} has {len(sizes)} axes, {kind} has {wanted}; such as "
            f"{kind}:{'x'.join(['4'] * wanted)}."
        )
    return Topology(written, chip, sizes)
