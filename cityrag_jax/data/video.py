"""Videos and pictures as files: uint8 RGB arrays in and out.

Files appear whole or not at all: written under a temporary name, then renamed. PyAV is
imported when used, since not every machine that trains has it.
"""

import os
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8


def write_video(
    path: str | Path,
    frames: UInt8[np.ndarray, "T H W 3"],
    fps: float = 10.0,
    *,
    lossless: bool = False,
    crf: int = 17,
) -> None:
    """Write an MP4: H.264 4:2:0 for every player, or bit-exact RGB for metrics.

    Lossy video needs even sides. A smaller `crf` is a better picture.
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
            rate = Fraction(fps).limit_denominator(1001)
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height = width, height
            stream.pix_fmt = "rgb24" if lossless else "yuv420p"
            stream.options = {"qp": "0"} if lossless else {"crf": str(crf)}
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(frame), format="rgb24"
                )
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_video(
    path: str | Path, max_frames: int | None = None
) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Read the frames of a video, at most `max_frames`, and its frames a second."""
    import av

    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    frames = []
    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 0)
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == max_frames:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is not a readable video: {error}.") from error
    if not frames:
        raise ValueError(f"{path} holds no frames.")
    return np.stack(frames), fps


def read_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture of any common format, turned upright as its EXIF says."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    content = np.frombuffer(path.read_bytes(), np.uint8)
    picture = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if picture is None:
        raise ValueError(f"{path} is not a readable picture; give a JPEG or PNG.")
    return np.ascontiguousarray(picture[..., ::-1])


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
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_bytes(content.tobytes())
    os.replace(temporary, path)
