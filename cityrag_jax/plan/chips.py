"""Memory and links of accelerators: the makers' figures that a plan divides by.

A topology is written `v5p:4x4x4` (chips along each axis of a torus) or `h100:32` (cards
in nodes of eight). TPUs: docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x; speed of
a link and to the host: jax-ml/scaling-book, tpus.md (of a TPU7x's host *assumed*).
GPUs: NVIDIA's data sheets of the SXM cards; their network, one 400 Gb/s port a card
(A100: 200), is *assumed*.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from cityrag_jax.chips import peak_flops

GB, GIB, TERA = 1e9, 2.0**30, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; of a TPU7x chip that is a half.

    `kind` is the beginning of the name that JAX gives it, `memory` in bytes and
    `bandwidth` what of it passes in a second. `link` is one way in bytes a second: of
    one link of a TPU, of all NVLinks of a card. A torus of a TPU closes along axes that
    are multiples of `wrap`. `network` is what a card sends out of its node of `node`
    cards, `host` what it exchanges with the host's memory, one way.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    link: float
    host: float
    wrap: int = 0
    devices: int = 1
    node: int = 0
    network: float = 0.0

    @property
    def flops(self) -> float:
        """Give its dense bfloat16 operations a second."""
        return float(peak_flops(self.kind))

    @property
    def is_tpu(self) -> bool:
        """Say whether the compiler for it runs without it."""
        return not self.node


def _chip(name: str, kind: str, gib: float, *speeds: int, **more: int) -> Chip:
    """Make a chip of GiB, and of GB/s: its memory, a link, the host, a network."""
    wide = more.pop("network", 0) * GB
    return Chip(name, kind, gib * GIB, *(x * GB for x in speeds), network=wide, **more)


CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v5e", "TPU v5e", 16 * GB / GIB, 819, 45, 16, wrap=16),
        _chip("v5p", "TPU v5", 95.0, 2765, 90, 16, wrap=4),
        _chip("v6e", "TPU v6", 32 * GB / GIB, 1638, 90, 32, wrap=16),
        # Two devices a chip, each with half of its memory, speed and links.
        _chip("tpu7x", "TPU7x", 96.0, 3690, 45, 16, wrap=4, devices=2),
        _chip("a100", "A100", 80.0, 2039, 300, 25, node=8, network=25),
        _chip("h100", "H100", 79.6, 3350, 450, 50, node=8, network=50),
        _chip("h200", "H200", 140.4, 4800, 450, 50, node=8, network=50),
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
