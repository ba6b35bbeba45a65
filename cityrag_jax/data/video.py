"""Videos and pictures as files: uint8 RGB arrays in and out.

Files appear whole or not at all: written under a temporary name, then renamed. PyAV is
imported when used, since not every machine that trains has it.
"""

import datetime
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float64, UInt8

from cityrag_jax.files import named, write_whole

# What makes equal frames equal bytes on any machine: fixed threads, and no decision
# that depends on timing or on the processor.
X264 = {"x264-params": "cpu-independent=1:mbtree=0", "threads": "4"}

MOST_PIXELS = 2**27  # that are decoded: 16,384 x 8,192, the largest panoramas
NO_PICTURE = "{} is not a readable picture; give a JPEG or PNG."
SEEK_S, SAME_S = 5.0, 0.004  # that are decoded rather than sought; that are one time
REORDERED = 2  # frames by which x264 decodes ahead of showing


def write_video(
    path: str | Path,
    frames: UInt8[np.ndarray, "T H W 3"],
    fps: float = 10.0,
    *,
    lossless: bool = False,
    crf: int = 17,
) -> None:
    """Write an MP4: H.264 4:2:0 for every player, or bit-exact RGB for metrics.

    Lossy video needs even sides. A smaller `crf` is a better picture. Equal frames give
    equal bytes.
    """
    import av

    path = Path(path)
    _, height, width, _ = frames.shape
    if not lossless and (height % 2 or width % 2):
        raise ValueError(
            f"{path}: frames of {width}x{height} cannot be stored as 4:2:0; use even "
            "sides or lossless=True."
        )
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.mp4")
    try:
        with av.open(os.fspath(temporary), "w") as container:
            codec = "libx264rgb" if lossless else "libx264"
            stream = container.add_stream(codec, rate=as_rate(fps))
            stream.width, stream.height = width, height
            stream.pix_fmt = "rgb24" if lossless else "yuv420p"
            stream.options = X264 | ({"qp": "0"} if lossless else {"crf": str(crf)})
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(frame), format="rgb24"
                )
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def as_rate(fps: float) -> Fraction:
    """Give frames a second as the fraction that files keep."""
    return Fraction(fps).limit_denominator(1001)


class JoinedVideo:
    """An MP4 of other MP4s one behind the other, none of them encoded again.

    They must come from `write_video`, with one size and rate. `growing` writes every
    frame as a fragment of its own once the next one has come: the file can be played
    all the time, however its writer ends. Else the index stands in front, and the file
    appears whole when it is closed. Equal parts give equal bytes.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        metadata: Mapping[str, str],
        *,
        growing: bool = False,
    ):
        import av

        self.path, self.growing = Path(path), growing
        self._temporary = self.path.with_name(f".{self.path.stem}-{os.getpid()}.mp4")
        flags = "empty_moov+default_base_moof+frag_every_frame"
        options = {"movflags": flags if growing else "faststart", "flush_packets": "1"}
        self._container = av.open(os.fspath(self._temporary), "w", options=options)
        self._container.metadata.update(metadata)
        self._rate, self._frames, self._stream = as_rate(fps), 0, None

    def append(self, part: str | Path) -> None:
        """Put a video behind what is there."""
        import av

        with named(self.path), av.open(os.fspath(part)) as source:
            theirs = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(theirs)
                self._stream.time_base = theirs.time_base
            tick = 1 / (self._rate * theirs.time_base)
            behind, packets = round(self._frames * tick), source.demux(theirs)
            for packet in (packet for packet in packets if packet.dts is not None):
                # Encoders begin a short video later: all are decoded at one pace here.
                packet.dts = round((self._frames - REORDERED) * tick)
                packet.pts, packet.duration = packet.pts + behind, round(tick)
                packet.stream = self._stream
                self._container.mux(packet)
                self._frames += 1
        if self.growing and self._temporary.exists():
            os.replace(self._temporary, self.path)  # the open file goes along

    def close(self) -> None:
        """Finish the file."""
        with named(self.path):
            self._container.close()
        if not self.growing:
            os.replace(self._temporary, self.path)


def read_video(
    path: str | Path, max_frames: int | None = None
) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Read the frames of a video, at most `max_frames`, and its frames a second."""
    frames = itertools.islice(read_frames(path), max_frames)
    return np.stack(list(frames)), read_rate(path)


def read_frames(path: str | Path) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Read a video one frame at a time."""
    import av

    empty = True
    with _opened(path) as container:
        try:
            for frame in container.decode(video=0):
                empty = False
                yield frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{path} is not a readable video: {error}.") from error
    if empty:
        raise ValueError(f"{path} holds no frames.")


def read_rate(path: str | Path) -> float:
    """Read the frames a second of a video."""
    with _opened(path) as container:
        return float(container.streams.video[0].average_rate or 0)


def read_times(path: str | Path) -> tuple[float, Float64[np.ndarray, " n"]]:
    """Read when a video was begun, Unix seconds, and its frames' times behind that.

    NaN where it does not tell. No frame is decoded.
    """
    import av

    with _opened(path) as container:
        stream = container.streams.video[0]
        told = container.metadata.get("creation_time")
        told = told or stream.metadata.get("creation_time")
        try:
            packets = [p.pts for p in container.demux(stream) if p.pts is not None]
        except av.FFmpegError as error:
            raise ValueError(f"{path} is not a readable video: {error}.") from error
        base = float(stream.time_base)
    if not packets:
        raise ValueError(f"{path} holds no frames.")
    ticks = np.unique(np.array(packets))
    start_s = math.nan
    if told:
        moment = datetime.datetime.fromisoformat(told)
        start_s = moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
    return start_s, (ticks - ticks[0]) * base


def frames_at(
    path: str | Path, time_s: Float64[np.ndarray, " n"]
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Decode the frames of ascending times (`read_times`), from the first one on."""
    import av

    wanted = iter(time_s.tolist())
    following = next(wanted, None)
    with _opened(path) as container:
        stream = container.streams.video[0]
        base = float(stream.time_base)
        origin = stream.start_time or 0
        if following is not None and following > SEEK_S:
            container.seek(origin + int(following / base), stream=stream)
        try:
            for frame in container.decode(stream):
                if following is None:
                    return
                # Half a frame of 120 a second: of equal times one is shown.
                if frame.pts is not None and (frame.pts - origin) * base > (
                    following - SAME_S
                ):
                    yield frame.to_ndarray(format="rgb24")
                    following = next(wanted, None)
        except av.FFmpegError as error:
            raise ValueError(f"{path} is not a readable video: {error}.") from error
    if following is not None:
        raise ValueError(f"{path} ends before {following:.2f} s; it was cut short.")


def _opened(path):
    import av

    if not Path(path).exists():
        raise ValueError(f"{path} does not exist.")
    try:
        return av.open(os.fspath(path))
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not a readable video: {error}.") from error


def read_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture of any common format, turned upright as its EXIF says."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    _check_size(path)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    try:
        picture = cv2.imdecode(content, cv2.IMREAD_COLOR)
    except cv2.error:  # of what its own header calls too large
        picture = None
    if picture is None:
        raise ValueError(NO_PICTURE.format(path))
    return np.ascontiguousarray(picture[..., ::-1])


def _check_size(path: Path) -> None:
    """Read a picture's header alone: a few bytes may claim any size."""
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(path) as picture:
            width, height = picture.size
    except PIL.Image.DecompressionBombError:
        width = height = 2**16
    except Exception as error:  # Pillow's readers raise many kinds
        raise ValueError(NO_PICTURE.format(path)) from error
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{path} is too large a picture to decode, at most {MOST_PIXELS:,} pixels "
            "are; make it smaller."
        )


def write_image(path: str | Path, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    """Write a picture in the format of the name's ending, such as .png or .jpg."""
    path = Path(path)
    try:
        _, content = cv2.imencode(path.suffix, picture[..., ::-1])
    except cv2.error as error:
        raise ValueError(
            f"{path}: pictures cannot be stored as {path.suffix or 'nothing'}; use "
            ".png or .jpg."
        ) from error
    write_whole(path, content.tobytes())
