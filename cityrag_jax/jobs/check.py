"""A list of jobs looked through before a machine is rented for it.

Every photo is read, every path matched to the city, every clip grounded, as a worker
would do it: on a CPU, without weights.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from cityrag_jax.commands.command import describe_error
from cityrag_jax.data.clips import show_views
from cityrag_jax.data.store import City
from cityrag_jax.data.video import write_video
from cityrag_jax.jobs.lines import JobLine
from cityrag_jax.jobs.run import Model
from cityrag_jax.recording import all_captures, sources
from cityrag_jax.request import Request, doubt_speed
from cityrag_jax.rollout import Job
from cityrag_jax.sampling import read_sampler

NEAR_POSES = 5  # a pose is grounded if a view stands so near along the path


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a line would be: or the reason why it can be nothing.

    `steps` are solver steps in which the network runs, of all clips. `grounded` is the
    share of poses with a retrieved view, `distance_m` the largest mean of a clip.
    """

    line: JobLine
    reason: str = ""
    doubt: str = ""
    frames: int = 0
    clips: int = 0
    steps: int = 0
    grounded: float = 0.0
    distance_m: float = 0.0
    licences: tuple[str, ...] = ()


def check_jobs(lines: Sequence[JobLine], model: Model) -> tuple[list[Checked], int]:
    """Check every line; the second value is the bytes that all videos will take.

    That is an estimate: by how small the first job's retrieved views are as a video.
    """
    checked, bytes_a_frame = [], 0.0
    for line in lines:
        try:
            if line.fault:
                raise ValueError(line.fault)
            request = model.read(line)
            checked.append(_check(line, request))
            if not bytes_a_frame:
                bytes_a_frame = _weigh(model.city, request)
        except Exception as error:  # of whatever kind: the other lines are checked, too
            checked.append(Checked(line, line.fault or describe_error(error)[0]))
    frames = sum(each.frames for each in checked)
    return checked, int(2 * frames * bytes_a_frame)  # the video and its conditions


def _check(line: JobLine, request: Request) -> Checked:
    job, sample = request.job, request.config.sample
    sampler = read_sampler(sample, request.without)
    steps = sampler.num_steps if sampler.compute is None else sum(sampler.compute)
    means = [float(views.distance_m.mean()) for views in job.views if len(views)]
    kinds = sources(job.city, all_captures(job)) if means else []
    return Checked(
        line,
        doubt=doubt_speed(line.order, job.city, sample),
        frames=len(job.ecef_from_camera),
        clips=len(job.spans),
        steps=len(job.spans) * steps,
        grounded=float((_views_away(job) <= NEAR_POSES).mean()),
        distance_m=max(means, default=0.0),
        licences=tuple(f"{x['licence']} ({x['attribution']})" for x in kinds),
    )


def _views_away(job: Job) -> Float64[np.ndarray, " N"]:
    """Count the poses from each to the nearest that a view stands at."""
    poses = np.arange(len(job.ecef_from_camera), dtype=float)
    at = np.unique(np.concatenate([views.frame for views in job.views]))
    if not len(at):
        return np.full(len(poses), np.inf)
    behind = np.searchsorted(at, poses).clip(1, max(1, len(at) - 1))
    before, after = at[behind - 1], at[np.minimum(behind, len(at) - 1)]
    return np.minimum(np.abs(poses - before), np.abs(after - poses))


def _weigh(city: City, request: Request) -> float:
    """Give the bytes of a frame of the first clip's views, as they will be stored."""
    views = show_views(city, request.job.views[0], request.job.config)
    if not len(views):
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "views.mp4")
        write_video(file, views, float(request.config.sample.fps))
        return file.stat().st_size / len(views)


def summarise(
    checked: Sequence[Checked],
    size_bytes: int,
    *,
    seconds_per_step: float | None = None,
    devices: int = 1,
) -> dict[str, Any]:
    """Sum up a checked list, as JSON holds it.

    `seconds_per_step` is what a solver step of a clip, its guidance included, takes the
    `devices` that make a job.
    """
    good = [each for each in checked if not each.reason]
    steps = sum(each.steps for each in good)
    hours = None
    if seconds_per_step is not None:
        hours = round(steps * seconds_per_step * devices / 3600, 2)
    return {
        "jobs": len(checked),
        "good": len(good),
        "frames": sum(each.frames for each in good),
        "clips": sum(each.clips for each in good),
        "steps": steps,
        "device_hours": hours,
        "gigabytes": round(size_bytes / 1e9, 6),
        "licences": sorted({name for each in good for name in each.licences}),
        "bad": {each.line.name: each.reason for each in checked if each.reason},
        "doubts": {each.line.name: each.doubt for each in good if each.doubt},
        "each": {
            each.line.name: {
                "frames": each.frames,
                "clips": each.clips,
                "grounded": round(each.grounded, 3),
                "distance_m": round(each.distance_m, 2),
            }
            for each in good
        },
    }


def describe_check(checked: Sequence[Checked], summary: dict[str, Any]) -> str:
    """Write for people what a check found: the sum, and a table of what is wrong."""
    hours = summary["device_hours"]
    time = "give --seconds-per-step for device hours"
    if hours is not None:
        time = f"{hours:,} device hours of sampling"
    least = min((each.grounded for each in checked if not each.reason), default=0)
    told = [
        f"{summary['good']} of {summary['jobs']} jobs can be done",
        f"{summary['clips']:,} clips, {summary['frames']:,} frames, "
        f"{summary['steps']:,} solver steps; {time}",
        f"about {summary['gigabytes']:,.3f} GB of videos",
        f"views on at least {100 * least:.0f} % of each path's poses",
        f"panoramas of {'; '.join(summary['licences']) or 'nobody'}",
    ]
    for name, kind in (("reason", "cannot be done"), ("doubt", "doubtful")):
        rows = [each for each in checked if getattr(each, name)]
        wide = max((len(each.line.name) for each in rows), default=0)
        told += [f"{kind}:"] * bool(rows)
        told += [
            f"  line {each.line.number:>5}  {each.line.name:<{wide}}  "
            f"{getattr(each, name)}"
            for each in rows
        ]
    return "\n".join(told)
