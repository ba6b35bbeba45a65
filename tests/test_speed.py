"""Operations of an update by formula against the gradient's program; time and MFU."""

import time

import jax
import jax.numpy as jnp
import pytest
import training_city
from jax.interpreters import partial_eval
from test_flops import count_jaxpr

from cityrag_jax.chips import peak_flops
from cityrag_jax.training import speed
from cityrag_jax.training.program import assumed_start, make_program

AS_IN_THE_PAPER = None
BRANCHES_ALONE = ("blocks.*", "text_embedding.*", "image_embedding.*")


@pytest.mark.parametrize(
    "frozen", [BRANCHES_ALONE, pytest.param(AS_IN_THE_PAPER, marks=pytest.mark.long)]
)
def test_the_operations_of_an_update_are_those_of_its_gradient(frozen):
    """At full width, nothing computed; what nobody reads is taken out of the program.

    0.2 %: products of text and of embedders have no input to derive, a softmax over
    frozen text has half the gradient.
    """
    config = training_city.get_config("cityrag_14b", None, train__batch_size=1)
    with config.unlocked():
        config.model.transformer.update(num_layers=2, remat=False)
    config.optimizer.frozen = frozen or config.optimizer.frozen
    program = make_program(config, None, assumed_start(config))
    examples = jax.eval_shape(program.task.encode, program.encoders, program.batch)

    def loss(params, frozen, text, examples):
        given = frozen | params, {"text": text}, examples, jnp.int32(0)
        return program.task.loss(*given)[0]

    text = program.encoders["text"]
    given = program.state.params, program.frozen, text, examples
    traced = jax.make_jaxpr(jax.grad(loss))(*given).jaxpr
    read, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    encoding = speed._count_encoding(config, program)
    counted = speed.count_operations(config, program, config.data.condition_frames[1])
    assert counted - encoding == pytest.approx(count_jaxpr(read), rel=2e-3)


def test_what_stands_before_all_that_is_trained_is_passed_forward_alone():
    stages = [
        speed.Stage("a.", 1),
        speed.Stage("b.", 10, 10),
        speed.Stage("c.", 100, 100),
    ]
    labels = {"a.kernel": "frozen", "b.kernel": "muon", "c.kernel": "frozen"}
    assert speed.count_passes(stages, labels) == 1 + 3 * 20 + 2 * 100 + 3 * 100
    labels["b.kernel"] = "frozen"
    assert speed.count_passes(stages, labels) == 1 + 20 + 200
    labels["b.adapter.up"] = "adam"
    assert speed.count_passes(stages, labels) == 1 + 2 * 10 + 3 * 10 + 500


def test_devices_are_known_by_the_name_that_jax_gives_them():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") < peak_flops("NVIDIA H100 80GB HBM3")
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5") == 459e12
    assert peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("cpu") is None


def test_the_share_of_the_peak_is_over_all_devices_of_the_mesh(monkeypatch):
    """On CPUs, whose peak is not known, there is none."""
    assert speed.describe_speed(1e12, 2, 4.0)["seconds_per_step"] == 2
    assert "mfu" not in speed.describe_speed(1e12, 2, 4.0)
    monkeypatch.setattr(speed, "peak_flops", lambda kind: 1e12)
    assert speed.describe_speed(1e12, 2, 4.0)["mfu"] == pytest.approx(0.5)
    with jax.set_mesh(jax.make_mesh((4,), ("data",))):
        assert speed.describe_speed(1e12, 2, 4.0)["mfu"] == pytest.approx(0.125)


def test_pauses_are_no_time_of_updates():
    watch = speed.Stopwatch()
    with watch.paused():
        time.sleep(0.1)
    time.sleep(0.02)
    assert 0.02 <= watch.take() < 0.1
    assert watch.take() < 0.02
