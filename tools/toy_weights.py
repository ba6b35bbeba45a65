"""Make toy weights the way the shipped ones were made: one command, one host of GPUs.

    python tools/toy_weights.py --out=DIR [--minutes=18] [--start=DIR]

Cities are rendered side by side, which takes every core and no GPU. Meanwhile both
trainings are begun on a city of seconds: that fills the compilation cache and times the
updates, so that the transformer's rate has decayed when its `--minutes` are over. Then
the autoencoder goes on from `--start`, the transformer from there on its latents, both
over all GPUs. An unseen city is scored, and DIR/weights holds the result with int8
kernels. What is finished is not done again: the same command goes on. `--start=` trains
from scratch; `--size=test` shows all of it on a CPU in minutes.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from cityrag_jax.commands import Command
from cityrag_jax.training.log import read_metrics

COMMAND = Command(__doc__)
COMMAND.needs("--out", type=Path, help="folder for cities, trainings, weights, logs")
COMMAND.takes("--minutes", type=float, default=18, help="to train the transformer")
COMMAND.takes(
    "--start",
    default="configs/toy_city_weights",
    help="model that both trainings go on from; empty: from scratch",
)
COMMAND.takes("--autoencoder-updates", type=int, default=2200, help="of clips of 8")
COMMAND.takes("--parts", type=int, default=2, help="cities of a name, a process each")
COMMAND.takes("--size", choices=("gpu", "test"), default="gpu", help="of everything")
for part in ("autoencoder", "transformer"):
    COMMAND.takes(
        f"--{part}-flags",
        type=str.split,
        default=(),
        help=f"more flags for the training of the {part}, in one string",
    )

TRAINED_ON = {
    "gpu": ("paris", "tokyo", "philadelphia", "london", "sao_paulo"),
    "test": ("tokyo",),
}
UNSEEN = {"gpu": ("sydney", "honolulu"), "test": ("sydney",)}
CITY = {
    "gpu": ("--preset=gpu", "--neighbourhoods=2", "--blocks=2", "--height=384"),
    "test": ("--preset=test", "--route-streets=1", "--height=64", "--num-frames=9"),
}
FIRST_CITY = {"gpu": ("--preset=test", "--height=384"), "test": CITY["test"]}
SEED = 4000
# Of the updates that the measured speed promises: fresh clips join, checkpoints are
# written and held-out clips measured beside them.
CAUTION = 0.9


class Recipe:
    """The commands, in a folder that keeps what each has made and printed."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.out = given.out
        self.began = time.monotonic()
        self.started: list[subprocess.Popen] = []
        (self.out / "log").mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Do all that is not done yet."""
        given, cities = self.given, ",".join(map(str, self.cities()))
        self.say("Rendering cities; compiling on a first one.")
        self.wait(self.build("paris", self.out / "first", *FIRST_CITY[given.size]))
        rendered = self.render()
        updates = self.warm_up()
        self.wait(*rendered)
        self.say(f"Training the autoencoder: {given.autoencoder_updates} updates.")
        self.wait(self.autoencoder("autoencoder", cities, given.autoencoder_updates))
        self.say(f"Training the transformer: {updates} updates.")
        model = self.out / "autoencoder"
        self.wait(self.transformer("transformer", cities, model, updates))
        self.store()
        self.score()
        self.say(f"The weights are in {self.out / 'weights'}.")

    def cities(self) -> list[Path]:
        """List the folders of the cities that are trained on."""
        return [
            self.out / "cities" / f"{name}_{part}"
            for name in TRAINED_ON[self.given.size]
            for part in range(self.given.parts)
        ]

    def render(self) -> list[subprocess.Popen | None]:
        """Start to render every city: one process each."""
        sizes = CITY[self.given.size]
        started = [
            self.build(path.name[:-2], path, *sizes, f"--seed={SEED + i}")
            for i, path in enumerate(self.cities())
        ]
        return started + [
            self.build(
                name, self.out / "cities" / name, *sizes, "--held-out-fraction=1"
            )
            for name in UNSEEN[self.given.size]
        ]

    def build(self, name: str, path: Path, *flags: str) -> subprocess.Popen | None:
        """Start to render a city, unless it is there."""
        if path.exists():
            return None
        tool = ("tools/build_city.py", f"--toy={name}", f"--out={path}", *flags)
        return self.start(f"city_{path.name}", tool, JAX_PLATFORMS="cpu")

    def warm_up(self) -> int:
        """Train both for some seconds; give the updates that fit the time asked for."""
        timed = self.out / "updates.txt"
        if timed.exists():
            return int(timed.read_text())
        short = ("--config.train.pool_start=32", "--config.train.max_seconds=10")
        if self.given.size == "test":
            short = ("--config.train.max_seconds=1",)
        first, given = str(self.out / "first"), self.given
        compiling = self.autoencoder(
            "warm_autoencoder", first, given.autoencoder_updates, *short
        )
        model = given.start
        if not model:
            self.wait(compiling)
            model = self.out / "warm_autoencoder"
        self.wait(self.transformer("warm_transformer", first, model, 0, *short))
        self.wait(compiling)
        lines = read_metrics(self.out / "warm_transformer")
        each = [x["seconds_per_step"] for x in lines if "seconds_per_step" in x][-1]
        self.say(f"{each:.4f} seconds an update.")
        rounded = 500 if given.size == "gpu" else 10
        updates = max(1, int(CAUTION * 60 * given.minutes / each) // rounded) * rounded
        timed.write_text(str(updates))
        return updates

    def autoencoder(self, name: str, cities: str, updates: int, *flags: str):
        """Start a training of the autoencoder in the folder `name`."""
        return self.train(
            name,
            f"--config=configs/toy_vae.py:{self.given.size}",
            f"--config.data.city={cities}",
            f"--config.train.steps={updates}",
            *self.given.autoencoder_flags,
            *flags,
        )

    def transformer(self, name: str, cities: str, vae: Path, updates: int, *flags: str):
        """Start a training of the transformer; no `updates`: the config's own."""
        return self.train(
            name,
            f"--config=configs/toy_city.py:{self.given.size}",
            f"--config.data.city={cities}",
            f"--config.model.vae={vae}",
            *([f"--config.train.steps={updates}"] if updates else []),
            *self.given.transformer_flags,
            *flags,
        )

    def train(self, name: str, *flags: str) -> subprocess.Popen | None:
        """Start a training, or go on with it."""
        start = f"--config.train.init_from={self.given.start}"
        return self.start(
            name,
            (
                *("-m", "cityrag_jax.train", f"--workdir={self.out / name}", *flags),
                *([start] if self.given.start else []),
                "--config.train.mesh.data=-1",
            ),
            XLA_PYTHON_CLIENT_PREALLOCATE="false",  # two programs share the GPUs
        )

    def store(self) -> None:
        """Write the weights as they are shipped."""
        path = self.out / "weights"
        if not path.exists():
            trained = f"--checkpoint={self.out / 'transformer'}"
            tool = ("tools/store_int8.py", trained, f"--out={path}")
            self.wait(self.start("weights", tool))

    def score(self) -> None:
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
                    f"--city={self.out / 'cities' / UNSEEN[self.given.size][0]}",
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
                env=os.environ | environment,
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
