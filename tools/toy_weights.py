"""Make toy weights the way the shipped ones were made: one command, one host of GPUs.

    python tools/toy_weights.py --out=DIR [--updates=30000] [--start=DIR]

Small cities come first, rendered side by side. On them the autoencoder goes on from
`--start`, and the transformer's program is compiled and timed, while the large cities
are rendered. Then the transformer goes on from `--start` on the new latents, over all
GPUs. An unseen city is scored, and DIR/weights holds the result with int8 kernels. What
is finished is not done again: the same command goes on. `--start=` trains from scratch;
`--size=test` shows all of it on a CPU in minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cityrag_jax.commands import Command

COMMAND = Command(__doc__)
COMMAND.makes("--out", type=Path, help="folder for cities, trainings, weights, logs")
COMMAND.takes("--updates", type=int, default=30_000, help="of the transformer")
COMMAND.takes(
    "--start",
    default="configs/toy_city_weights",
    help="model that both trainings go on from; empty: from scratch",
)
COMMAND.takes("--autoencoder-updates", type=int, default=2200, help="of clips of 8")
COMMAND.takes("--cities", type=int, default=6, help="to train on, a process each")
COMMAND.takes("--size", choices=("gpu", "test"), default="gpu", help="of everything")
for part in ("autoencoder", "transformer"):
    COMMAND.takes(
        f"--{part}-flags",
        type=str.split,
        default=(),
        help=f"more flags for the training of the {part}, in one string",
    )


def count_gpus() -> int:
    """Count the NVIDIA GPUs of this host without taking one."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.stdout.count("GPU ")


NAMES = ("paris", "tokyo", "philadelphia", "london", "sao_paulo", "reykjavik")
UNSEEN = "sydney"
# Every street is driven about once, by two drives: places teach more than passes.
CITY = {
    "gpu": ("--preset=gpu", "--height=384", "--blocks=2", "--routes=2"),
    "test": ("--preset=test", "--route-streets=1", "--height=64", "--num-frames=9"),
}
LARGE = {
    "gpu": ("--neighbourhoods=3", "--route-streets=5", "--held-out-fraction=0.1"),
    "test": (),
}
SMALL = {"gpu": ("--neighbourhoods=2", "--route-streets=2", "--routes=1"), "test": ()}
SCORED = {"gpu": ("--neighbourhoods=2", "--route-streets=6"), "test": ()}
# What it takes to compile and time the transformer's program: a pool of one batch.
SHORT = {
    "gpu": ("--config.train.pool_start=128", "--config.train.max_seconds=10"),
    "test": ("--config.train.max_seconds=1",),
}
SEED = 4000
GPUS = count_gpus()


def on_gpu(place: int) -> dict[str, str]:
    """Show a program one GPU of those that there are."""
    return {"CUDA_VISIBLE_DEVICES": str(place % GPUS)} if GPUS else {}


class Recipe:
    """The commands, in a folder that keeps what each has made and printed."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.out = given.out
        self.began = time.monotonic()
        self.started: list[subprocess.Popen] = []
        self.rendering: list[subprocess.Popen] = []
        (self.out / "log").mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Do all that is not done yet."""
        given, unseen = self.given, self.out / UNSEEN
        self.say("Rendering small cities.")
        small = self.cities("small", SMALL)
        self.wait(*self.rendering)
        self.say("Training the autoencoder on them; rendering large ones.")
        large = self.cities("large", LARGE)
        self.build(unseen, 0, UNSEEN, SCORED, "--held-out-fraction=1")
        trained, model = self.autoencoder(small), given.start
        if not model:
            self.wait(trained)
            model = self.out / "autoencoder"
        self.wait(self.transformer("compiled", small, model, *SHORT[given.size]))
        self.wait(trained, *self.rendering)
        self.say(f"Training the transformer: {given.updates} updates.")
        model = self.out / "autoencoder"
        self.wait(self.transformer("transformer", large, model))
        self.store()
        self.score(unseen)
        self.say(f"The weights are in {self.out / 'weights'}.")

    def cities(self, size: str, plan: dict) -> list[Path]:
        """Start to render the cities that are trained on; give their folders."""
        paths = [self.out / size / str(i) for i in range(self.given.cities)]
        for i, path in enumerate(paths):
            self.build(path, i, NAMES[i % len(NAMES)], plan, f"--seed={SEED + i}")
        return paths

    def build(self, path: Path, place: int, name: str, plan: dict, *flags: str) -> None:
        """Start to render a city, unless it is there: one process on one GPU."""
        if path.exists():
            return
        given = (*CITY[self.given.size], *plan[self.given.size], *flags)
        tool = ("tools/build_city.py", f"--toy={name}", f"--out={path}", *given)
        self.rendering.append(
            self.start(f"city_{path.parent.name}_{path.name}", tool, **on_gpu(place))
        )

    def autoencoder(self, cities: list[Path]) -> subprocess.Popen | None:
        """Start the training of the autoencoder."""
        given = self.given
        return self.train(
            "autoencoder",
            f"--config=configs/toy_vae.py:{given.size}",
            f"--config.data.city={','.join(map(str, cities))}",
            f"--config.train.steps={given.autoencoder_updates}",
            *given.autoencoder_flags,
            **on_gpu(-1),  # its batches are small
        )

    def transformer(self, name: str, cities: list[Path], vae: Path, *flags: str):
        """Start a training of the transformer in the folder `name`."""
        return self.train(
            name,
            f"--config=configs/toy_city.py:{self.given.size}",
            f"--config.data.city={','.join(map(str, cities))}",
            f"--config.model.vae={vae}",
            f"--config.train.steps={self.given.updates}",
            *self.given.transformer_flags,
            "--config.train.mesh.data=-1",
            *flags,
        )

    def train(
        self, name: str, *flags: str, **environment: str
    ) -> subprocess.Popen | None:
        """Start a training, or go on with it, unless it has made its model."""
        if (self.out / name / "model").exists():
            return None
        tool = ("-m", "cityrag_jax.train", f"--workdir={self.out / name}", *flags)
        if self.given.start:
            tool = (*tool, f"--config.train.init_from={self.given.start}")
        return self.start(name, tool, **environment)

    def store(self) -> None:
        """Write the weights as they are shipped."""
        path = self.out / "weights"
        if not path.exists():
            trained = f"--checkpoint={self.out / 'transformer'}"
            tool = ("tools/store_int8.py", trained, f"--out={path}")
            self.wait(self.start("weights", tool))

    def score(self, city: Path) -> None:
        """Score the weights in a city that they have never seen."""
        path = self.out / "scores"
        if path.exists():
            return
        self.wait(
            self.start(
                "scores",
                (
                    *("-m", "cityrag_jax.evaluate", f"--out={path}"),
                    f"--config=configs/toy_city.py:{self.given.size}",
                    f"--checkpoint={self.out / 'weights'}",
                    f"--city={city}",
                ),
            )
        )
        print((path / "table.md").read_text())

    def start(self, name: str, arguments, **environment: str) -> subprocess.Popen:
        """Start Python on a tool; what it prints goes to a file of that name."""
        log = self.out / "log" / f"{name}.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                # Several programs share the GPUs.
                env=os.environ
                | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
                | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        process.log = log
        self.started.append(process)
        return process

    def wait(self, *processes: subprocess.Popen | None) -> None:
        """Wait for commands; the first that failed ends all of it."""
        for process in processes:
            if process is not None and process.wait():
                for other in self.started:
                    other.terminate()
                tail = process.log.read_text()[-2000:]
                raise ValueError(f"{process.log} ends so:\n{tail}")

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)


if __name__ == "__main__":
    COMMAND.run(lambda given: Recipe(given).run())
