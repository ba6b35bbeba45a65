"""Other ways to lay a training out: meshes, parts of a batch, what blocks keep.

The formula weighs all of them in seconds; only the best need the compiler.
"""

import copy
from collections.abc import Iterator

from ml_collections import ConfigDict

from cityrag_jax.model.dit import BLOCK_INPUT
from cityrag_jax.plan.chips import GIB, Topology
from cityrag_jax.plan.operations import model_of
from cityrag_jax.plan.report import Plan, make_plan, plan_by_formula, prepare

KERNELS = ("self_attention", "geo_attention")
# What is kept on the device and what waits in the host's memory.
POLICIES = (
    (KERNELS, ()),
    (KERNELS, (BLOCK_INPUT,)),
    (KERNELS[:1], ()),
    ((), ()),
    ((), (BLOCK_INPUT,)),
    ((), (*KERNELS, BLOCK_INPUT)),
)
SHOWN = 12
TRIES = 3  # to compile one that fits


def search(config: ConfigDict, topology: Topology) -> list[Plan]:
    """Plan every layout of a config's batch by formula, the best first.

    Those that fit come before those that do not; then the least time counts, had an
    update to compute, move and send one after the other.
    """
    plans = []
    for laid_out in _meshes(config, topology):
        program, mesh = prepare(laid_out, topology)
        for candidate in _within(laid_out):
            plans.append(plan_by_formula(candidate, program, mesh, topology))
    return sorted(plans, key=lambda plan: (not plan.fits, plan.roofline.sum))


def choose(plans: list[Plan], *, compiled: bool) -> Plan | None:
    """Give the best plan that fits, for TPUs by the compiler if `compiled`."""
    for plan in [plan for plan in plans if plan.fits][:TRIES]:
        found = make_plan(plan.config, plan.topology) if compiled else plan
        if found.fits:
            return found
    return None


def changes(plan: Plan, config: ConfigDict) -> str:
    """Write what makes a config that of a plan, as one writes it behind a command."""
    ours, theirs = _values(plan.config), _values(config)
    return " ".join(
        f'--config.{key}="{value}"'
        for key, value in ours.items()
        if theirs[key] != value
    )


def as_table(plans: list[Plan], config: ConfigDict) -> str:
    """Write the first of many plans, a line each."""
    fit = sum(plan.fits for plan in plans)
    lines = [
        f"{fit} of {len(plans)} layouts fit by formula; the best by the seconds of an "
        "update that computes, moves and sends one after the other:",
        "   GiB     sum   bound  changes",
    ]
    for plan in plans[:SHOWN]:
        least = plan.roofline
        mark = " " if plan.fits else "!"
        lines.append(
            f"{mark}{plan.memory['peak'] / GIB:5.1f} {least.sum:7.1f} "
            f"{least.bound:7.1f}  {changes(plan, config) or 'as it is'}"
        )
    return "\n".join(lines)


def _meshes(config: ConfigDict, topology: Topology) -> Iterator[ConfigDict]:
    """Give a config for each way to share clips: `sequence` divides the heads."""
    count, heads = topology.devices, model_of(config).num_heads
    for sequence in range(1, heads + 1):
        if count % sequence or heads % sequence:
            continue
        if config.train.batch_size % (count // sequence) == 0:
            yield _changed(
                config,
                train_mesh=dict(data=1, fsdp=count // sequence, sequence=sequence),
            )


def _within(config: ConfigDict) -> Iterator[ConfigDict]:
    """Give a config for each number of parts and each policy."""
    mesh = config.train.mesh
    most = config.train.batch_size // (mesh.data * mesh.fsdp)
    policies = POLICIES if model_of(config).remat else (((), ()),)
    for parts in (n for n in range(1, most + 1) if most % n == 0):
        for keep, offload in policies:
            yield _changed(config, parts=parts, keep=keep, offload=offload)


def _changed(config, train_mesh=None, parts=None, keep=None, offload=None):
    changed = copy.deepcopy(config)
    with changed.unlocked():
        if train_mesh is not None:
            changed.train.mesh.update(train_mesh)
            changed.train.rules.embed = ("fsdp", "sequence")
        if parts is not None:
            changed.train.micro_batches = parts
            changed.model.transformer.update(keep=keep, offload=offload)
    return changed


def _values(config: ConfigDict) -> dict[str, object]:
    """Give the values that a search changes, by key."""
    train, transformer = config.train, config.model.transformer
    values = {f"train.mesh.{name}": size for name, size in train.mesh.items()}
    values["train.micro_batches"] = train.micro_batches
    for name in ("keep", "offload"):
        values[f"model.transformer.{name}"] = tuple(transformer[name])
    return values
