"""Plan a training on a CPU: does it fit a machine, how long is an update.

    python tools/plan_pod.py --config=configs/cityrag_14b.py:v5p-128 \\
        --topology=v5p:4x4x4 [--config.train.micro_batches=2 ...]

Nothing is read or trained. For TPUs (v5e, v5p, v6e, tpu7x: chips along each axis) the
real update is compiled, which takes minutes; GPUs (a100, h100, h200: a count of cards)
are planned by formula. `--formula` plans TPUs so, too, in seconds.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from cityrag_jax.plan.chips import read_topology
from cityrag_jax.plan.compiled import pretend
from cityrag_jax.plan.report import as_text, make_plan


def main(_) -> None:
    """Print the plan; exit with 1 where it does not fit."""
    given = flags.FLAGS
    try:
        topology = read_topology(given.topology)
        pretend(topology)
        plan = make_plan(given.config, topology, compiled=not given.formula)
    except ValueError as error:
        sys.exit(f"plan_pod: {error}")
    print(as_text(plan))
    sys.exit(0 if plan.fits else 1)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file, such as configs/cityrag_14b.py.", lock_config=True
    )
    flags.DEFINE_string("topology", None, "Such as v5p:4x4x4, or h100:32.")
    flags.DEFINE_bool("formula", False, "Compile nothing.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
