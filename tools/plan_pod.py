"""Plan a training on a CPU: does it fit a machine, how long is an update.

    python tools/plan_pod.py --config=configs/cityrag_14b.py:v5p-128 \\
        --topology=v5p:4x4x4 [--config.train.micro_batches=2 ...]

Nothing is read or trained. For TPUs (v5e, v5p, v6e, tpu7x: chips along each axis) the
real update is compiled, which takes minutes; GPUs (a100, h100, h200: a count of cards)
are planned by formula. `--formula` plans TPUs so, too, in seconds.
"""

import argparse

from cityrag_jax.commands import Command
from cityrag_jax.plan.chips import read_topology
from cityrag_jax.plan.compiled import pretend
from cityrag_jax.plan.report import as_text, make_plan


def main(given: argparse.Namespace) -> int:
    """Print the plan; give 1 where it does not fit."""
    topology = read_topology(given.topology)
    pretend(topology)
    plan = make_plan(given.config, topology, compiled=not given.formula)
    print(as_text(plan))
    return 0 if plan.fits else 1


COMMAND = Command(__doc__)
COMMAND.needs_config()
COMMAND.needs("--topology", metavar="KIND:SHAPE", help="v5p:4x4x4, h100:32, ...")
COMMAND.switch("--formula", help="compile nothing, for TPUs either")

if __name__ == "__main__":
    COMMAND.run(main)
