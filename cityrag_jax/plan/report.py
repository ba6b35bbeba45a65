"""A plan as text: what a device holds, what an update computes and sends, what to do.

Every figure says where it comes from: the compiler, or a formula.
"""

import dataclasses

from jax.sharding import Mesh
from ml_collections import ConfigDict

from cityrag_jax.parallel import MESH_AXES, layout
from cityrag_jax.plan.chips import GB, GIB, TERA, Topology
from cityrag_jax.plan.compiled import Compiled, compile_update, planned_mesh
from cityrag_jax.plan.memory import memory_by_formula, offloaded
from cityrag_jax.plan.operations import Operations, count_operations
from cityrag_jax.plan.roofline import (
    REACHED,
    Roofline,
    Sent,
    roofline,
    sent_by_formula,
    sent_by_program,
)
from cityrag_jax.training import speed
from cityrag_jax.training.program import Program, assumed_start, make_program

POOL = 0.95  # of a GPU, by XLA_PYTHON_CLIENT_MEM_FRACTION; JAX itself takes 0.75


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a topology: bytes of a device, an update's operations and traffic.

    Of the operations `needed` are what a utilisation (MFU) counts.
    """

    config: ConfigDict
    topology: Topology
    mesh: dict[str, int]
    memory: dict[str, float]
    operations: Operations
    needed: float
    sent: list[Sent]
    compiled: Compiled | None

    @property
    def roofline(self) -> Roofline:
        """Give the least time of an update."""
        moved = offloaded(self.config, self.mesh)
        return roofline(self.operations.all, self.sent, self.topology, moved)

    @property
    def peak(self) -> float:
        """Give the bytes that a device needs, by the compiler if it was asked."""
        return self.compiled.peak if self.compiled else self.memory["peak"]

    @property
    def capacity(self) -> float:
        """Give the bytes that a program may use of a device."""
        if self.compiled and self.compiled.capacity:
            return self.compiled.capacity
        chip = self.topology.chip
        return chip.memory if chip.is_tpu else POOL * chip.memory

    @property
    def fits(self) -> bool:
        """Say whether it fits: for TPUs the compiler's own word."""
        if self.compiled:
            return not self.compiled.asked
        return self.peak <= self.capacity

    @property
    def hours(self) -> float:
        """Give the hours of the whole training, as fast as is assumed."""
        return self.config.train.steps * self.roofline.expected / 3600


def prepare(config: ConfigDict, topology: Topology) -> tuple[Program, Mesh | None]:
    """Build a config's program on a topology that this process sees (`pretend`)."""
    mesh = planned_mesh(config, topology)
    with layout(mesh, dict(config.train.rules)):
        return make_program(config, mesh, assumed_start(config)), mesh


def plan_by_formula(
    config: ConfigDict, program: Program, mesh: Mesh | None, topology: Topology
) -> Plan:
    """Plan a config without a compiler.

    `program` may be that of another config of the same mesh and the same parameters.
    """
    sizes = dict.fromkeys(MESH_AXES, 1) if mesh is None else dict(mesh.shape)
    longest = config.data.condition_frames[1]
    return Plan(
        config=config,
        topology=topology,
        mesh=sizes,
        memory=memory_by_formula(config, program, sizes, topology.chip),
        operations=count_operations(config, program),
        needed=speed.count_operations(config, program, longest),
        sent=sent_by_formula(config, program, mesh, topology),
        compiled=None,
    )


def make_plan(config: ConfigDict, topology: Topology, *, compiled: bool = True) -> Plan:
    """Plan a config on a topology whose devices this process sees (`pretend`).

    For TPUs the update is compiled, if `compiled`; else all is by formula.
    """
    program, mesh = prepare(config, topology)
    plan = plan_by_formula(config, program, mesh, topology)
    if not compiled or not topology.chip.is_tpu:
        return plan
    found = compile_update(program, mesh, config, topology)
    sent = plan.sent if found.asked else sent_by_program(found.sent, mesh, topology)
    return dataclasses.replace(plan, compiled=found, sent=sent)


def as_text(plan: Plan) -> str:
    """Write a plan as some short tables."""
    parts = _heading(plan), _memory(plan), _operations(plan), _traffic(plan)
    return "\n\n".join([*parts, _verdict(plan)])


def _heading(plan: Plan) -> str:
    train, topology = plan.config.train, plan.topology
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    return (
        f"{topology.written}: {topology.devices} devices of "
        f"{topology.chip.memory / GIB:.1f} GiB, {topology.chip.flops / TERA:,.0f} "
        f"TFLOP/s; mesh {mesh}; {train.batch_size} clips an update in "
        f"{train.micro_batches} part{'s' * (train.micro_batches > 1)}"
    )


def _memory(plan: Plan) -> str:
    lines = ["Memory of a device, GiB, by formula"]
    lines += [f"{size / GIB:10.2f}  {name}" for name, size in plan.memory.items()]
    found = plan.compiled
    if found is None:
        return "\n".join(lines)
    lines.append(f"... by the compiler, in {found.seconds:.0f} s")
    if found.asked:
        lines.append(f"{found.asked / GIB:10.2f}  wanted: refused")
    else:
        sizes = {
            "arguments and results": found.arguments,
            "temporaries": found.temporaries,
            "code": found.code,
            "peak": found.peak,
            "in the host's memory": found.host,
        }
        lines += [f"{size / GIB:10.2f}  {name}" for name, size in sizes.items() if size]
    error = plan.memory["peak"] / found.peak - 1
    lines.append(f"{100 * error:+9.0f} %  what the formula is off")
    return "\n".join(lines)


def _operations(plan: Plan) -> str:
    lines = ["Operations of an update, PFLOP, all devices, by formula"]
    for part in dataclasses.fields(plan.operations):
        cost = getattr(plan.operations, part.name)
        lines.append(f"{cost.flops / 1e15:10.2f}  {part.name}")
    return "\n".join(lines)


def _traffic(plan: Plan) -> str:
    by = "formula"
    if plan.compiled and not plan.compiled.asked:
        by = "the compiled program"
    lines = [f"Sent by each device in an update, by {by}: GB, seconds"]
    for one in plan.sent:
        axes = ", ".join(one.axes)
        lines.append(
            f"{one.bytes / GB:10.2f} {one.seconds:8.3f}  {one.kind} over {axes}"
        )
    return "\n".join(lines if plan.sent else lines + ["      none"])


def _verdict(plan: Plan) -> str:
    least = plan.roofline
    needed = plan.needed / plan.topology.devices / plan.topology.chip.flops
    fits = "It fits" if plan.fits else "It does NOT fit"
    by = "by the compiler" if plan.compiled else "by formula"
    return (
        f"An update takes at least {least.bound:.2f} s, by {least.binds} (computing "
        f"{least.computing:.2f}, memory {least.memory:.2f}, links {least.links:.2f}, "
        f"host {least.host:.2f}); "
        f"at {REACHED:.0%} of that, assumed, {least.expected:.1f} s, MFU "
        f"{needed / least.expected:.0%}, and {plan.hours:,.0f} h for "
        f"{plan.config.train.steps:,} updates.\n"
        f"{fits}, {by}: {plan.peak / GIB:.1f} of {plan.capacity / GIB:.1f} GiB."
    )
