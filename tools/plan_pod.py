"""Plan a training on a CPU: does it fit a machine, how long is an update.

    python tools/plan_pod.py --config=configs/cityrag_14b.py:v5p-128 \\
        --topology=v5p:4x4x4 [--config.train.micro_batches=2 ...]

Nothing is read or trained. For TPUs (v5e, v5p, v6e, tpu7x: chips along each axis) the
real update is compiled, which takes minutes; GPUs (a100, h100, h200: a count of cards)
are planned by formula. `--formula` plans TPUs so, too, in seconds. `--search` weighs
other meshes, parts of a batch and what blocks keep, and plans the best that fits.
"""

import argparse

from ml_collections import ConfigDict

from cityrag_jax.commands import Command
from cityrag_jax.plan.chips import GIB, Topology, read_topology
from cityrag_jax.plan.compiled import pretend
from cityrag_jax.plan.report import as_text, make_plan
from cityrag_jax.plan.search import as_table, changes, choose, search


def main(given: argparse.Namespace) -> int:
    """Print the plan; give 1 where it does not fit."""
    topology = read_topology(given.topology)
    pretend(topology)
    config = given.config
    if not given.search:
        plan = make_plan(config, topology, compiled=not given.formula)
        print(as_text(plan))
        if not plan.fits:
            advise(config, topology)
        return 0 if plan.fits else 1
    plans = search(config, topology)
    print(as_table(plans, config))
    best = choose(plans, compiled=not given.formula)
    if best is not None:
        print(f"\n{changes(best, config) or 'As it is'}\n\n{as_text(best)}")
    return 0 if best is not None else 1


def advise(config: ConfigDict, topology: Topology) -> None:
    """Say what would fit, if anything does."""
    best = choose(search(config, topology), compiled=False)
    if best is None:
        print("No mesh, parts or policy would fit; take more devices.")
        return
    size = f"{best.peak / GIB:.1f} GiB by formula"
    print(f"This would fit, {size}: {changes(best, config)}")


COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.needs("--topology", metavar="KIND:SHAPE", help="v5p:4x4x4, h100:32, ...")
COMMAND.switch("--formula", help="compile nothing, for TPUs either")
COMMAND.switch("--search", help="weigh other layouts, and plan the best that fits")

if __name__ == "__main__":
    COMMAND.run(main)
