"""The least time of an update: what is computed, moved and sent over what devices can.

They overlap at best, so the longest of them is a bound from below.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cityrag_jax.flops import Cost
from cityrag_jax.parallel import MESH_AXES, RULES
from cityrag_jax.plan.chips import Topology
from cityrag_jax.plan.collectives import Collective
from cityrag_jax.plan.memory import FLOAT, HALF
from cityrag_jax.plan.operations import sizes_of
from cityrag_jax.training.program import Program

# What of the bound is reached (assumed). Of this method on an H200: a forward pass 0.6,
# updates 0.34 to 0.45 of the peak.
REACHED = 0.5


@dataclasses.dataclass(frozen=True)
class Sent:
    """What each device sends in an update by one kind of collective along mesh axes."""

    kind: str
    axes: tuple[str, ...]
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of an update, had it nothing else to do."""

    computing: float
    memory: float
    links: float
    host: float = 0.0

    @property
    def bound(self) -> float:
        """Give the longest of them."""
        return max(dataclasses.astuple(self))

    @property
    def binds(self) -> str:
        """Name the longest of them."""
        return max(dataclasses.asdict(self), key=dataclasses.asdict(self).get)

    @property
    def sum(self) -> float:
        """Give the seconds of an update that did all of it one after the other."""
        return sum(dataclasses.astuple(self))

    @property
    def expected(self) -> float:
        """Give the seconds that an update may take in fact (*assumed*)."""
        return self.bound / REACHED


def roofline(
    cost: Cost, sent: Iterable[Sent], topology: Topology, offloaded: float = 0.0
) -> Roofline:
    """Divide the cost of an update among all devices of a topology.

    `offloaded` are bytes that each device brings to its host and fetches.
    """
    chip, count = topology.chip, topology.devices
    return Roofline(
        cost.flops / count / chip.flops,
        cost.bytes / count / chip.bandwidth,
        sum(x.seconds for x in sent),
        2 * offloaded / chip.host,
    )


def sent_by_program(
    found: Iterable[Collective], mesh: Mesh | None, topology: Topology
) -> list[Sent]:
    """Sum what a compiled program's collectives send, by kind and mesh axes."""
    if mesh is None:
        return []
    sums = collections.defaultdict(lambda: np.zeros(2))
    devices = mesh.devices.ravel()
    for one in found:
        group = one.groups[0] if one.groups else tuple(range(len(devices)))
        size = one.sent(len(devices))
        axes = _axes_of(group, mesh)
        among = [devices[i] for i in group]
        sums[one.kind, axes] += size, _seconds(one.kind, size, among, topology)
    return [Sent(*key, *map(float, both)) for key, both in sorted(sums.items())]


def sent_by_formula(
    config: ConfigDict, program: Program, mesh: Mesh | None, topology: Topology
) -> list[Sent]:
    """Count what an update has to send.

    Weights are gathered once for each part of a batch and pass, in bfloat16; their
    gradients are summed onto shards in float32. Around each attention tokens become
    heads and back: forward, again where blocks are recomputed, and backward. Muon's
    gradients come to whole matrices and go back.
    """
    if mesh is None:
        return []
    rules, shape = {**RULES, **dict(config.train.rules)}, dict(mesh.shape)
    sizes, parts = sizes_of(config), config.train.micro_batches
    stacked, trained, muon = (
        sum(x.size for name, x in group.items() if name in program.stacked)
        for group in (
            program.parameters,
            program.state.params,
            _labelled(program, "muon"),
        )
    )
    embed = tuple(a for a in MESH_AXES if a in rules["embed"] and shape[a] > 1)
    copies = tuple(a for a in rules["batch"] if a not in embed and shape[a] > 1)
    n = math.prod(shape[a] for a in embed)
    clips = config.train.batch_size / math.prod(shape[a] for a in rules["batch"])
    exchanged = 3 * HALF * sizes.dim * (6 * sizes.video + 2 * sizes.condition)
    exchanged *= sizes.layers * clips / shape["sequence"]
    everywhere = tuple(a for a in MESH_AXES if shape[a] > 1)
    whole = [
        ("all-gather", embed, 2 * parts * HALF * stacked),
        ("reduce-scatter", embed, parts * FLOAT * trained),
        ("all-reduce", copies, 2 * parts * FLOAT * trained / n),
        ("all-to-all", ("sequence",), exchanged),
        ("all-to-all", everywhere, 2 * FLOAT * muon / mesh.size),
    ]
    sent = []
    for kind, axes, size in whole:
        among = _group(mesh, axes)
        if len(among) > 1:
            size *= (len(among) - 1) / len(among)
            seconds = _seconds(kind, size, among, topology)
            sent.append(Sent(kind, axes, size, seconds))
    return sent


def _labelled(program: Program, label: str) -> dict:
    params = program.state.params
    return {name: x for name, x in params.items() if program.labels[name] == label}


def _group(mesh: Mesh, axes: Sequence[str]) -> list[jax.Device]:
    """Give the devices that share the first place of all other axes."""
    index = tuple(slice(None) if name in axes else 0 for name in MESH_AXES)
    return list(np.ravel(mesh.devices[index]))


def _axes_of(group: Sequence[int], mesh: Mesh) -> tuple[str, ...]:
    """Name the mesh axes along which a group of positions is spread."""
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    spread = (places != places[:, :1]).any(axis=1)
    return tuple(
        name for name, is_spread in zip(MESH_AXES, spread, strict=True) if is_spread
    )


def _seconds(
    kind: str, size: float, among: Sequence[jax.Device], topology: Topology
) -> float:
    """Divide what one device sends by its links; what is exchanged goes further."""
    places = [_place(device, topology) for device in among]
    far = topology.hops(places) if kind == "all-to-all" else 1.0
    return size * far / topology.speed(places)


def _place(device: jax.Device, topology: Topology) -> tuple[int, ...]:
    if topology.chip.is_tpu:
        return tuple(device.coords)
    return divmod(device.id, topology.chip.node)
