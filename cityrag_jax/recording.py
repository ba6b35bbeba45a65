"""A video on disk while it is made: clips, a file that grows, the finished folder.

    clips/0003/      a clip, there once it is whole: its share of the video and of the
                     retrieved views, its last frame without loss, what was used
    job.json         what the video is made of; a folder takes no other
    video.mp4        grows by a clip at a time and can be played meanwhile

When all clips are there, video.mp4 and conditions.mp4 are put together from theirs,
pictures, map and poses are drawn, generate.json is written last, and the clips go. No
step depends on when a process was killed: the videos' bytes are those of an
uninterrupted one. Of several processes the writer alone writes.
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, UInt8

from cityrag_jax import report
from cityrag_jax.data.clips import cover_people
from cityrag_jax.data.masks import Shown
from cityrag_jax.data.store import City
from cityrag_jax.data.video import (
    JoinedVideo,
    read_frames,
    read_image,
    write_image,
    write_video,
)
from cityrag_jax.geo.ecef import ecef_from_enu
from cityrag_jax.geo.path_files import format_tum
from cityrag_jax.geo.trajectory import relative_poses
from cityrag_jax.leases import FolderLock
from cityrag_jax.parallel import from_writer, is_writer, on_writer
from cityrag_jax.rollout import Job, MadeClip

SIDECAR, JOB, CLIPS = "generate.json", "job.json", "clips"
VIDEO, CONDITIONS, PAGE = "video.mp4", "conditions.mp4", "report.html"
STRIP = 6  # frames of an overview, and of a clip in the report


class Recording:
    """The folder of one video. Enter it, add the clips from `count` on, finish it.

    `facts` say what the video is made of besides the job: a folder that holds clips of
    other facts or of another job is refused with a ValueError, and so is one in which
    another process works. With `burn` the video's pictures say whose panoramas they
    rest on; the frames that clips are chained by do not.
    """

    def __init__(
        self,
        out: Path | str,
        job: Job,
        facts: dict[str, Any],
        *,
        fps: float,
        burn: bool = False,
    ):
        self.out, self.job, self.fps = Path(out), job, fps
        facts = facts | identify(job) | {"fps": fps} | ({"burnt": True} if burn else {})
        self.identity = json.loads(json.dumps(facts))
        self._burnt = describe_origin(job)["copyright"] if burn else ""
        self._lock = FolderLock(self.out)
        self._growing: JoinedVideo | None = None
        self._began = False
        self.count = 0

    def __enter__(self) -> "Recording":
        try:
            on_writer(self._claim)
        except BaseException:
            self.__exit__()
            raise
        self.count = int(from_writer(np.int32(self._count_clips())))
        return self

    def __exit__(self, *_):
        if is_writer():
            if self._growing is not None:
                self._growing.close()
            if self._began and not self.count:  # nothing came of it
                self._clean()
            self._lock.release()

    @property
    def finished(self) -> bool:
        """Say whether nothing is left to do."""
        return self.count > len(self.job.spans)

    def last_frame(self) -> UInt8[np.ndarray, "H W 3"] | None:
        """Give the frame that the next clip starts from; None before the first."""
        if not 0 < self.count <= len(self.job.spans):
            return None
        frame = np.zeros_like(self.job.first_frame)
        if is_writer():
            frame = read_image(self._clip(self.count - 1) / "last.png")
        return from_writer(frame)

    def add(self, made: MadeClip) -> None:
        """Commit a clip; the growing video shows it from then on."""
        if made.number != self.count:
            raise ValueError(f"Clip {made.number} came, {self.count} is the next one.")
        on_writer(lambda: self._commit(made))
        self.count += 1

    def finish(self, facts: dict[str, Any]) -> None:
        """Put the results together; `facts` join those of generate.json."""
        if self.count < len(self.job.spans):
            raise ValueError(f"{self.out} lacks clips from {self.count} on.")
        if not self.finished:
            on_writer(lambda: self._put_together(facts))
            self.count = len(self.job.spans) + 1

    def _clip(self, number: int) -> Path:
        return self.out / CLIPS / f"{number:04}"

    def _count_clips(self) -> int:
        if (self.out / SIDECAR).exists():
            return len(self.job.spans) + 1
        numbers = range(len(self.job.spans) + 1)
        return next(n for n in numbers if not self._clip(n).exists())

    def _claim(self) -> None:
        self._lock.take()
        job, sidecar = self.out / JOB, self.out / SIDECAR
        if sidecar.exists():
            self._compare(report.read_facts(sidecar).get("job", {}))
            self._clean()
        elif job.exists() and self._clip(0).exists():  # else there is nothing to lose
            self._compare(report.read_facts(job))
        elif (self.out / VIDEO).exists() and not job.exists():
            raise ValueError(
                f"{self.out} holds a {VIDEO}, but no {SIDECAR} that says what it is; "
                "choose another --out, or delete that folder."
            )
        else:
            report.write_text(job, json.dumps(self.identity, indent=1) + "\n")
            self._began = True

    def _compare(self, stored: dict[str, Any]) -> None:
        differ = report.describe_differences(stored, self.identity)
        if differ:
            raise ValueError(
                f"{self.out} holds another video: {differ}. Choose another --out, or "
                "delete that folder."
            )

    def _commit(self, made: MadeClip) -> None:
        folder = self._clip(made.number)
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        frames = made.frames
        if self._burnt:
            frames = np.stack([report.caption(x, self._burnt) for x in frames])
        write_video(temporary / VIDEO, frames, self.fps)
        city, seen = self.job.city, made.condition
        shown = Shown()
        if len(made.views):
            views = made.views[: len(seen)]
            seen, shown = cover_people(city, views, seen, self.job.config)
        write_video(temporary / CONDITIONS, seen, self.fps)
        write_image(temporary / "last.png", made.frames[-1])
        facts = {"frames": [made.span.begin, made.span.end - 1]}
        facts |= {"seconds": round(made.seconds, 3)}
        facts |= describe_views(city, made) | shown._asdict()
        report.write_text(temporary / "clip.json", json.dumps(facts))
        temporary.rename(folder)
        self._grow(made.number)

    def _grow(self, number: int) -> None:
        behind = [number]
        if self._growing is None:  # the first of this process: what is there comes too
            behind = range(number + 1)
            self._growing = self._joined(VIDEO, growing=True)
        for n in behind:
            self._growing.append(self._clip(n) / VIDEO)

    def _joined(self, name: str, **options: bool) -> JoinedVideo:
        metadata = describe_origin(self.job)
        return JoinedVideo(self.out / name, self.fps, metadata, **options)

    def _put_together(self, facts: dict[str, Any]) -> None:
        numbers = range(len(self.job.spans))
        if self._growing is not None:
            self._growing.close()
            self._growing = None
        for name in (VIDEO, CONDITIONS):
            joined = self._joined(name)
            for number in numbers:
                joined.append(self._clip(number) / name)
            joined.close()
        clips = [
            report.read_facts(self._clip(number) / "clip.json") for number in numbers
        ]
        write_overview(self.out)
        write_map(self.out / "map.png", self.job)
        poses = relative_poses(self.job.ecef_from_camera)
        first = self.job.ecef_from_camera[0]
        report.write_text(self.out / "poses.tum", format_tum(poses, self.fps, first))
        sidecar = facts | {
            "synthetic": True,
            "city": self.job.city.name,
            "frames": len(poses),
            "size": list(self.job.first_frame.shape[:2]),
            "fps": self.fps,
            "ecef_from_first": self.job.ecef_from_camera[0].tolist(),
            "sources": sources(self.job.city, all_captures(self.job)),
            "clips": clips,
            "job": self.identity,
        }
        self._write_page(sidecar)
        report.write_text(self.out / SIDECAR, json.dumps(sidecar, indent=1) + "\n")
        self._clean()

    def _write_page(self, sidecar: dict[str, Any]) -> None:
        sections, clips = {}, sidecar["clips"]
        for number, clip in enumerate(clips):
            first, last = clip["frames"]
            frames = pick_frames(self._clip(number) / VIDEO, STRIP)
            behind = self.job.spans[number].end - self.job.spans[number].first
            views = pick_frames(self._clip(number) / CONDITIONS, STRIP, behind)
            rows = {"retrieved": views, "generated": frames}
            drives = ", ".join(map(str, clip["drives"])) or "none"
            name = f"Clip {number}, frames {first} to {last}: drives {drives}, "
            name += f"{clip['mean_distance_m']} m off the path, {clip['seconds']} s"
            sections[name] = report.side_by_side(rows, count=STRIP)
        shown = Shown(*(sum(c.get(f, 0) for c in clips) for f in Shown._fields))
        owners = [f"{x['attribution']} ({x['licence']})" for x in sidecar["sources"]]
        size = "x".join(map(str, reversed(sidecar["size"])))
        facts = {
            "Synthetic": "generated; no camera saw this",
            "City": sidecar["city"],
            "Video": f"{sidecar['frames']} frames of {size}, {self.fps:g} a second",
            "Time": f"{sum(clip['seconds'] for clip in sidecar['clips']):.1f} s",
            "Seed": str(self.job.seed),
            "Weights": str(self.identity.get("weights", ""))[:16],
            "Panoramas": "; ".join(owners),
        }
        if shown.not_anonymised:
            facts["People"] = shown.describe()
        picture = read_image(self.out / "map.png")
        report.write_page(self.out / PAGE, "Street video", picture, facts, sections)

    def _clean(self) -> None:
        shutil.rmtree(self.out / CLIPS, ignore_errors=True)
        (self.out / JOB).unlink(missing_ok=True)


def identify(job: Job) -> dict[str, Any]:
    """Say what a job's video is made of, pixels and poses by their digests."""
    return {
        "city": job.city.name,
        "photo": digest(job.first_frame),
        "path": digest(job.ecef_from_camera),
        "captures": digest(all_captures(job)),
        "facing": digest(np.concatenate([v.heading_rad for v in job.views])),
        "seed": job.seed,
        "clip": dataclasses.asdict(job.config),
    }


def digest(x: np.ndarray | Array) -> str:
    """Give the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


def all_captures(job: Job) -> np.ndarray:
    """Give the captures of all clips, one clip behind the other."""
    return np.concatenate([views.captures for views in job.views])


def describe_origin(job: Job) -> dict[str, str]:
    """Give a video's metadata: that it is synthetic, and whose pictures it rests on."""
    owners = [
        f"{kind['attribution']} ({kind['licence']})"
        for kind in sources(job.city, all_captures(job))
    ]
    told = f"Synthetic: generated by cityrag_jax from a photo and {job.city.name}."
    return {
        "title": "Synthetic street video",
        "comment": told,
        "copyright": "Panoramas: " + "; ".join(owners),
    }


def describe_views(city: City, made: MadeClip) -> dict[str, Any]:
    """List a clip's captures by their sources' ids, kind by kind of licence."""
    captures, drives = made.views.captures.tolist(), city.captures.drive
    kinds = sources(city, captures)
    rows = [[c for c in captures if kind_of(city, c) == kind] for kind in kinds]
    ids = [city.provenance.select(np.array(row)).id.to_pylist() for row in rows]
    return {
        "drives": list(dict.fromkeys(drives[captures].tolist())),
        "mean_distance_m": round(float(made.views.distance_m.mean()), 3)
        if captures
        else None,
        "captures": [k | {"ids": i} for k, i in zip(kinds, ids, strict=True)],
    }


def sources(city: City, captures: Sequence[int] | np.ndarray) -> list[dict]:
    """List licence, attribution and anonymisation of captures, each kind once."""
    each = np.unique(captures).tolist()
    kinds = {tuple(kind_of(city, capture).items()) for capture in each}
    return [dict(kind) for kind in sorted(kinds)]


def kind_of(city: City, capture: int) -> dict[str, Any]:
    """Give licence, attribution and anonymisation of one capture."""
    columns, header = city.captures, city.header
    return {
        "licence": header.licences[int(columns.licence[capture])],
        "attribution": header.attributions[int(columns.attribution[capture])],
        "anonymised": bool(columns.anonymised[capture]),
    }


def pick_frames(
    path: Path, count: int, limit: int | None = None
) -> UInt8[np.ndarray, "n H W 3"]:
    """Read `count` evenly spaced of the first `limit` frames, both ends among them."""
    total = sum(1 for _ in itertools.islice(read_frames(path), limit))
    chosen = np.linspace(0, total - 1, count).round().astype(int)
    wanted = set(chosen.tolist())
    kept = {i: x for i, x in enumerate(read_frames(path)) if i in wanted}
    return np.stack([kept[i] for i in chosen.tolist()])


def write_overview(out: Path) -> None:
    """Draw frames of the retrieved views and of the video under each other."""
    named = {"retrieved": CONDITIONS, "generated": VIDEO}
    rows = {name: pick_frames(out / file, STRIP) for name, file in named.items()}
    write_image(out / "overview.png", report.side_by_side(rows, count=STRIP))


def write_map(path: Path, job: Job) -> None:
    """Draw the city's drives, the path and what was retrieved along it."""
    positions = job.city.captures.ecef_from_camera[:, :3, 3]
    route = job.ecef_from_camera[:, :3, 3]
    axes = ecef_from_enu(*job.city.header.anchor)[:3, :3]

    def east_north(places: np.ndarray) -> np.ndarray:
        return ((places - route[0]) @ axes)[:, :2]

    edges = job.city.index.drive_edges
    drives = [
        east_north(positions[a:b]) for a, b in zip(edges, edges[1:], strict=False)
    ]
    captures = east_north(positions[all_captures(job)])
    report.draw_map(path, drives, east_north(route), captures)
