"""What must hold at the size of the paper: ten cities of 550,000 panoramas.

Captures alone, no pictures: streets of a kilometre, driven four times, half a metre
apart, with errors of position that follow each other. The limits are issue's of a
laptop with two cores: mining all in 3 minutes and 4 GiB, an index of all in 10 s and
1 GiB, the nearest capture in 100 microseconds.
"""

import json
import subprocess
import sys

PROGRAM = """
import json, resource, sys, time
import numpy as np
from cityrag_jax.data.captures import Captures
from cityrag_jax.data.pairs import PairConfig, mine_pairs
from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.geo.retrieval import index_captures
from cityrag_jax.geo.trajectory import level_poses

STREET, PASSES = 2000, 4

def city(number, streets):
    rng = np.random.default_rng(number)
    drives, along = streets * PASSES, 0.5 * np.arange(STREET)
    places = np.zeros((drives, STREET, 3))
    places[:, :, 1] = along
    places[:, :, 0] = 100.0 * np.repeat(np.arange(streets), PASSES)[:, None]
    wander = np.cumsum(rng.normal(0, 1, (drives, STREET // 50 + 1, 2)), 1)
    wander /= np.abs(wander).max((1, 2), keepdims=True)
    for axis in range(2):  # within a metre, and never a leap
        for k in range(drives):
            knots = np.linspace(0, STREET - 1, wander.shape[1])
            steps = wander[k, :, axis]
            places[k, :, axis] += np.interp(np.arange(STREET), knots, steps)
    drive = np.repeat(np.arange(drives, dtype=np.int32), STREET)
    enu = level_poses(places.reshape(-1, 3), np.zeros(drives * STREET))
    anchor = ecef_from_enu(48.0 + 0.5 * number, 11.5, 520.0)
    zeros = np.zeros(len(drive), np.int32)
    time_s = 1.7e9 + 86400.0 * (drive % PASSES) + np.tile(along / 5, drives)
    near = (drive // (PASSES * 4)).astype(np.int32)
    kept = np.ones(len(drive), bool)
    return Captures(anchor @ enu, time_s, drive, near, zeros, zeros, kept)

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

cities, streets = int(sys.argv[1]), int(sys.argv[2])
facts = {"mining_s": 0.0, "pairs": 0, "captures": 0, "made_gib": 0.0}
places = []
for number in range(cities):
    captures = city(number, streets)
    facts["made_gib"] = max(facts["made_gib"], memory() if number == 0 else 0)
    began = time.process_time()
    pairs = mine_pairs(captures, f"city {number}", PairConfig(buffer_m=100.0))
    facts["mining_s"] += time.process_time() - began
    facts["pairs"] += len(pairs)
    facts["captures"] += len(captures)
    places.append(captures.ecef_from_camera[:, :3].copy())
    del captures, pairs
    facts["mining_gib"] = memory()
if len(sys.argv) > 3:
    count = facts["captures"]
    poses = np.zeros((count, 4, 4))
    poses[:, :3], poses[:, 3, 3] = np.concatenate(places), 1
    places = None
    drive = np.repeat(np.arange(count // STREET, dtype=np.int32), STREET)
    before, began = memory(), time.process_time()
    index = index_captures(poses, drive, np.zeros(count))
    facts["index_s"] = time.process_time() - began
    facts["index_gib"] = memory() - before
    asked = poses[np.random.default_rng(0).integers(0, count, 2000), :3, 3] + 1.0
    began = time.process_time()
    for place in asked:
        index.tree.query(place)
    facts["nearest_us"] = (time.process_time() - began) / len(asked) * 1e6
print(json.dumps(facts))
"""


def measure(*words) -> dict:
    """Run in a process of its own, whose memory is nobody else's."""
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)
