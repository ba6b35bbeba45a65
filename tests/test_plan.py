"""Plans: what is read from compiled programs, and arithmetic that has an answer."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import training_city
from jax.sharding import NamedSharding, PartitionSpec
from test_splash_compile import needs_libtpu

from cityrag_jax.flops import Cost
from cityrag_jax.parallel import fill_mesh, layout, make_mesh
from cityrag_jax.plan.chips import CHIPS, GIB, read_topology
from cityrag_jax.plan.collectives import collectives
from cityrag_jax.plan.compiled import _refusal
from cityrag_jax.plan.memory import memory_by_formula, shard_bytes
from cityrag_jax.plan.operations import count_operations
from cityrag_jax.plan.roofline import Sent, roofline, sent_by_formula, sent_by_program
from cityrag_jax.plan.search import changes, choose, search
from cityrag_jax.training import speed
from cityrag_jax.training.examples import clips_at_once
from cityrag_jax.training.program import assumed_start, make_program

ROOT = Path(__file__).parents[1]


def test_a_topology_is_read_and_counts_devices_as_jax_does():
    assert read_topology("v5p:4x4x4").devices == 64
    assert read_topology("tpu7x:4x4x4").devices == 128  # two a chip
    assert read_topology("h100:32").devices == 32


@pytest.mark.parametrize("written", ["v5p", "v5p:4x4", "v9:2x2", "h100:2x4", "v6e:0x4"])
def test_what_is_no_topology_is_refused_with_an_example(written):
    with pytest.raises(ValueError, match=f"{re.escape(written)} .*such as|write"):
        read_topology(written)


def test_rings_have_two_links_an_axis_and_open_lines_one():
    """A v5p closes axes of four, a v6e those of sixteen."""
    cube, plane = read_topology("v5p:4x4x4"), read_topology("v6e:4x4")
    ring = [(x, 0, 0) for x in range(4)]
    assert cube.speed(ring) == 2 * CHIPS["v5p"].link
    assert cube.speed(ring[:2]) == CHIPS["v5p"].link
    assert cube.speed([(x, y, 0) for x, _, _ in ring for y in range(4)]) == (
        4 * CHIPS["v5p"].link
    )
    assert plane.speed([(x, 0) for x in range(4)]) == CHIPS["v6e"].link
    cards = read_topology("h100:16")
    assert (
        cards.speed([(0, 0), (0, 7)]) == 450e9 and cards.speed([(0, 7), (1, 0)]) < 1e11
    )


def test_what_a_loop_over_blocks_sends_counts_once_a_block():
    """Two exchanges in a loop of six, and the sum over all devices behind it."""
    mesh = make_mesh(data=2, sequence=4)
    rows = PartitionSpec("data", "sequence")

    def exchange(x):
        x = jax.lax.all_to_all(x, "sequence", 2, 1, tiled=True)
        return jax.lax.all_to_all(jnp.sin(x), "sequence", 1, 2, tiled=True)

    def total(x):
        def block(x, _):
            return jax.shard_map(exchange, in_specs=rows, out_specs=rows)(x), None

        return jax.lax.scan(block, x, length=6)[0].sum()

    x = jax.ShapeDtypeStruct(
        (2, 8, 16), jnp.float32, sharding=NamedSharding(mesh, rows)
    )
    with jax.set_mesh(mesh):
        found = collectives(jax.jit(total).lower(x).compile().as_text())
    exchanges = [one for one in found if one.kind == "all-to-all"]
    assert [one.times for one in exchanges] == [6, 6]
    assert {one.groups for one in exchanges} == {((0, 1, 2, 3), (4, 5, 6, 7))}
    # A device has 1 x 2 x 16 float32, of which it keeps a quarter.
    assert [one.sent(8) for one in exchanges] == [6 * 128 * 3 / 4] * 2
    sent = sent_by_program(found, mesh, read_topology("h100:8"))
    (tokens,) = (x for x in sent if x.kind == "all-to-all")
    assert (tokens.axes, tokens.bytes) == (("sequence",), 2 * 6 * 96)


PROGRAM = """\
%body (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %two = u32[]{:T(128)} constant(2)
  %p = (u32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %next = u32[]{:T(128)} add(%i, %two)
  %start = (f32[4]{0:T(128)S(1)}, f32[4]{0}, u32[], u32[]) \
collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %y = f32[4]{0} collective-permute-done(%start)
  ROOT %t = (u32[], f32[4]) tuple(%next, %y)
}

%condition (p: (u32[], f32[4])) -> pred[] {
  %p = (u32[], f32[4]{0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %eight = u32[] constant(8)
  ROOT %less = pred[] compare(%i, %eight), direction=LT
}

%all-reduce-scatter.1 (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[2]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[4]) -> bf16[64] {
  %x = f32[4]{0} parameter(0)
  %t = (u32[], f32[4]{0}) tuple(%zero, %x)
  %w = (u32[], f32[4]{0}) while(%t), condition=%condition, body=%body
  %alone = f32[4]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
  %s = f32[2]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %g = bf16[64]{0} all-gather(%a), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %h = bf16[64]{0} all-gather(%b), replica_groups=mesh['a'=2,'b'=4] {'a'}
}
"""


def test_programs_for_tpus_are_read_as_they_are_written():
    """Loops that count by two, sends that begin and end, groups in three spellings.

    And sums onto shards; groups of one send nothing.
    """
    found = collectives(PROGRAM)
    assert [(one.kind, one.times, one.bytes) for one in found] == [
        ("all-gather", 1, 128),
        ("all-gather", 1, 128),
        ("collective-permute", 4, 16),
        ("all-reduce-scatter", 1, 32),
    ]
    assert found[3].sent(8) == 32 * 3 / 4  # a group of four
    assert found[0].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert found[1].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert found[2].groups == ((0, 1), (1, 0))


def test_the_longest_of_three_binds():
    topology = read_topology("v5p:2x2x1")  # 4 x 459 TFLOP/s, 4 x 2765 GB/s
    sent = [Sent("all-gather", ("fsdp",), 0.0, 2.0), Sent("all-to-all", (), 0.0, 1.5)]
    least = roofline(Cost(4 * 459 * 10**12, 2 * 4 * 2765 * 10**9), sent, topology)
    assert (least.computing, least.memory, least.links) == (1.0, 2.0, 3.5)
    assert (least.bound, least.binds) == (3.5, "links")


def test_the_compilers_refusal_is_read():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 109.21G of "
        "95.74G hbm. Exceeded hbm capacity by 13.47G."
    )
    assert _refusal(message) == (109.21 * GIB, 95.74 * GIB)
    assert _refusal("INTERNAL: something else") == (0.0, 0.0)


@pytest.fixture(scope="module")
def planned():
    config = training_city.get_config("cityrag_14b", None)
    with config.unlocked():
        config.train.mesh.update(data=1, fsdp=4, sequence=2)
    mesh = make_mesh(**dict(config.train.mesh))
    with layout(mesh, dict(config.train.rules)):
        return config, mesh, make_program(config, mesh, assumed_start(config))


def test_the_14bs_memory_is_that_of_its_shards(planned):
    """14.35 G trained and 6.35 G frozen parameters over eight devices."""
    config, mesh, program = planned
    memory = memory_by_formula(config, program, dict(mesh.shape), CHIPS["h100"])
    assert memory["trained parameters"] == pytest.approx(4 * 14.35e9 / 8, rel=5e-3)
    assert memory["frozen parameters"] == pytest.approx(2 * 6.35e9 / 8, rel=5e-3)
    held = shard_bytes(program.arguments)
    assert memory["peak"] > held + memory["saved for the backward pass"]
    # 8 clips over two devices: streams in float32, two kernels' results in bfloat16
    # with a float32 sum a head, of 40 blocks.
    tokens = 40 * 4 * 29_640
    assert memory["saved for the backward pass"] == tokens * (8 * 5120 + 2 * 4 * 40)
    # Splash alone keeps 32 times a kernel's result for its backward pass.
    on_tpu = memory_by_formula(config, program, dict(mesh.shape), CHIPS["v5p"])
    more = on_tpu["peak"] - memory["peak"]
    assert more == pytest.approx(32 * 4 * 29_640 * 5120 * 2)


def test_the_14bs_operations_are_those_of_its_forward(planned):
    """Trained parts run three times, frozen ones that gradients cross twice."""
    config, _, program = planned
    found, clips = count_operations(config, program), config.train.batch_size
    # By hand, PFLOP: Wan 1.450, geo attention 1.057 more (q, o; k, v; kernel).
    D, L, S = 5120, 29_640, 32_760
    geo = 40 * (4 * L * D * D + 4 * S * D * D + 4 * L * S * D)
    assert found.forward.flops == pytest.approx(clips * (1.450e15 + geo), rel=2e-3)
    assert 1.9 < found.backward.flops / found.forward.flops < 2
    kernels = 40 * clips * 4 * D * L * (L + S)
    rest = found.forward.flops - kernels
    assert found.again.flops == pytest.approx(rest, rel=1e-2)
    longest = config.data.condition_frames[1]
    needed = found.all.flops - found.again.flops - found.optimizer.flops
    assert needed == pytest.approx(
        speed.count_operations(config, program, longest), rel=5e-3
    )


def test_what_is_sent_by_formula_gathers_all_weights_twice(planned):
    config, mesh, program = planned
    sent = sent_by_formula(config, program, mesh, read_topology("h100:8"))
    by_kind = {(x.kind, x.axes): x.bytes for x in sent}
    both = ("fsdp", "sequence")
    weights = sum(math.prod(program.parameters[n].shape) for n in program.stacked)
    assert by_kind["all-gather", both] == 2 * 2 * weights * 7 / 8
    assert by_kind["all-to-all", ("sequence",)] > 0


@pytest.mark.long
def test_a_search_puts_what_fits_and_is_fast_first():
    """Fewer bytes on the device cost time; what is chosen is one of the config's."""
    config = training_city.get_config("cityrag_14b", "gpu8")
    with config.unlocked():
        config.model.transformer.num_layers = 1
        config.train.batch_size = 8
        config.train.micro_batches = 2
    plans = search(config, read_topology("h100:8"))
    order = [(not plan.fits, plan.roofline.sum) for plan in plans]
    assert order == sorted(order)
    assert {plan.mesh["sequence"] for plan in plans} == {1, 2, 4, 8}
    assert {plan.config.train.micro_batches for plan in plans} == {1, 2, 4, 8}
    best = choose(plans, compiled=False)
    assert best is plans[0] and best.fits
    as_it_is = [plan for plan in plans if not changes(plan, config)]
    assert len(as_it_is) == 1
    assert as_it_is[0].mesh == {"data": 1, "fsdp": 4, "sequence": 2}
    assert as_it_is[0].roofline.host == 0
    offloads = [p for p in plans if p.config.model.transformer.offload]
    assert all(plan.roofline.host > 0 for plan in offloads)


def plan(*arguments):
    """Run the tool as a user does; give its exit status and what it printed."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "tools/plan_pod.py", *arguments],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr[-2000:])
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
def test_the_tool_plans_cards_by_formula_and_says_what_does_not_fit():
    """Two cards cannot hold the 14B's state, whatever is done."""
    status, text = plan(
        "--config=configs/cityrag_14b.py",
        "--topology=h100:2",
        "--config.train.mesh.sequence=1",
    )
    assert status == 1
    assert "does NOT fit, by formula" in text and "all-gather over fsdp" in text
    assert "take more devices" in text


# What each variant of configs/cityrag_14b.py is for.
MACHINES = {
    "gpu8": "h100:8",
    "gpu32": "a100:32",
    "h200x4": "h200:4",
    "v5p-128": "v5p:4x4x4",
    "v6e-256": "v6e:16x16",
    "tpu7x-128": "tpu7x:4x4x4",
    "one_gpu": "h200:1",
}


@pytest.mark.parametrize("variant", MACHINES)
def test_variants_are_laid_out_for_their_machine_and_share_the_batch(variant):
    """Held-out clips come in parts as training's do, or they would not fit."""
    config = training_city.get_config("cityrag_14b", variant)
    mesh = fill_mesh(dict(config.train.mesh), read_topology(MACHINES[variant]).devices)
    assert math.prod(mesh.values()) == read_topology(MACHINES[variant]).devices
    together = clips_at_once(config)
    assert together % (mesh["data"] * mesh["fsdp"]) == 0
    assert together * config.train.micro_batches == config.train.batch_size
    assert config.eval.clips % together == 0


def test_all_machines_have_a_variant_and_others_are_refused():
    with pytest.raises(ValueError, match=f"'gpu9'.*{', '.join(MACHINES)}"):
        training_city.get_config("cityrag_14b", "gpu9")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", MACHINES)
def test_every_variant_fits_its_machine_by_formula(variant):
    status, text = plan(
        f"--config=configs/cityrag_14b.py:{variant}",
        f"--topology={MACHINES[variant]}",
        "--formula",
    )
    assert status == 0 and "It fits, by formula" in text


@pytest.mark.long
@pytest.mark.timeout(1800)
@needs_libtpu
def test_the_14b_is_planned_by_the_compiler_for_eight_chips():
    """Whole: its blocks are a loop. The formula is 20 % below on 64 chips."""
    status, text = plan(
        "--config=configs/cityrag_14b.py",
        "--config.train.batch_size=2",
        "--config.train.mesh.fsdp=2",
        "--config.train.mesh.sequence=4",
        "--topology=v5p:2x2x2",
    )
    assert status == 0 and "It fits, by the compiler" in text
    assert "all-to-all over sequence" in text and "by the compiled program" in text
    (error,) = re.findall(r"([+-]\d+) %  what the formula is off", text)
    assert -35 < int(error) < 15
