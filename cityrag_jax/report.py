"""Pictures and tables for people: strips of videos, sheets, maps, figures, pages."""

import base64
import html
import json
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Int64, UInt8

from cityrag_jax.files import named, write_whole

LABEL_HEIGHT = 18
BACKGROUND = 255
QUALITIES = (90, 80, 70, 60, 50, 40, 30, 20, 10)  # of animations, best first

Image = UInt8[np.ndarray, "H W 3"]
Video = UInt8[np.ndarray, "T H W 3"]


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, over one that may be there."""
    write_whole(path, text)


def read_facts(path: Path) -> dict[str, Any]:
    """Read what a folder says of its content; ValueError if that is no JSON object."""
    try:
        facts = json.loads(path.read_text())
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged; delete that folder or choose another.")
    return facts


def describe_differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Say in which values two objects differ; empty if in none."""
    pairs = {k: (there.get(k), here.get(k)) for k in sorted(there | here)}
    differ = [
        f"{k} is {a!r} there, {b!r} here" for k, (a, b) in pairs.items() if a != b
    ]
    return "; ".join(differ)


def label(image: Image, text: str) -> UInt8[np.ndarray, "_ W 3"]:
    """Put a line of text over a picture."""
    line = np.full((LABEL_HEIGHT, image.shape[1], 3), BACKGROUND, np.uint8)
    at = (2, LABEL_HEIGHT - 5)
    cv2.putText(line, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 0, 1, cv2.LINE_AA)
    return np.concatenate([line, image])


def caption(image: Image, text: str) -> Image:
    """Write lines of text over a picture's foot, dark on a light ground.

    Letters are those of ASCII; others lose their accents. Half the picture is kept
    free: what does not find room ends in dots.
    """
    height, width = image.shape[:2]
    plain = unicodedata.normalize("NFKD", text.replace("©", "(c)"))
    words = plain.encode("ascii", "ignore").decode()
    scale = max(0.25, width / 2000)
    font = (cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    (letter, tall), low = cv2.getTextSize("n", *font)
    step, letters = tall + low + 2, max(8, (width - 8) // max(letter, 1))
    room = max(1, height // (2 * step))
    lines = textwrap.wrap(words, letters, max_lines=room, placeholder=" ...")
    shown, top = image.copy(), height - step * len(lines) - 2
    shown[top:] = shown[top:] // 4 + 192
    for number, line in enumerate(lines, 1):
        at = (4, top + number * step - low)
        cv2.putText(shown, line, at, font[0], scale, (0, 0, 0), 1, cv2.LINE_AA)
    return shown


def choose(length: int, count: int) -> Int64[np.ndarray, " {count}"]:
    """Give the frames that `strip` shows of a video."""
    return np.linspace(0, length - 1, count).round().astype(np.int64)


def strip(video: Video, count: int, *, gap: int = 2) -> UInt8[np.ndarray, "_ _ 3"]:
    """Lay `count` evenly spaced frames, first and last among them, side by side."""
    frames = np.pad(
        video[choose(len(video), count)],
        ((0, 0), (0, gap), (0, gap), (0, 0)),
        constant_values=BACKGROUND,
    )
    return np.concatenate(list(frames), axis=1)


def side_by_side(
    videos: Mapping[str, Video], *, count: int = 6
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Lay videos under each other as strips, each under its name.

    A video of one frame is repeated, so that all rows are equally wide.
    """
    rows = [label(strip(video, count), name) for name, video in videos.items()]
    return np.concatenate(rows)


def sheet(
    images: Sequence[Image], columns: int, *, gap: int = 2
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Lay pictures of one size in rows of `columns`; missing ones stay white."""
    height, width, _ = images[0].shape
    rows = -(-len(images) // columns)
    shape = (rows * (height + gap), columns * (width + gap), 3)
    canvas = np.full(shape, BACKGROUND, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def animate(
    path: Path | str,
    videos: Mapping[str, Video],
    count: int,
    *,
    fps: float,
    columns: int = 3,
    scale: int = 2,
    most_bytes: int = 2 * 2**20,
) -> Path:
    """Play videos side by side for ever, each under its name, as an animated WebP.

    All play `count` frames, evenly spaced ones if they have more, and are enlarged.
    Raises ValueError if no quality brings the file below `most_bytes`.
    """
    film = cv2.Animation()
    film.frames = [_moment(videos, t, columns, scale) for t in np.linspace(0, 1, count)]
    film.durations = [round(1000 / fps)] * count
    for quality in QUALITIES:
        settings = [cv2.IMWRITE_WEBP_QUALITY, quality]
        _, content = cv2.imencodeanimation(".webp", film, settings)
        if content.nbytes < most_bytes:
            path = Path(path)
            path.write_bytes(content.tobytes())
            return path
    raise ValueError(
        f"{path} takes {content.nbytes} bytes at the lowest quality, more than "
        f"{most_bytes}; play fewer frames or at a smaller scale."
    )


def gif(video: Video, *, fps: float) -> bytes:
    """Give a video as an animated GIF, which TensorBoard plays: 256 colours."""
    film = cv2.Animation()
    film.frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) for frame in video]
    film.durations = [round(1000 / fps)] * len(video)
    return cv2.imencodeanimation(".gif", film)[1].tobytes()


def _moment(videos, share, columns, scale):
    """Draw all videos at a share of their length, for OpenCV: blue first."""
    images = []
    for name, video in videos.items():
        frame = video[round(share * (len(video) - 1))]
        size = (scale * frame.shape[1], scale * frame.shape[0])
        large = cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)
        images.append(label(large, name))
    return np.ascontiguousarray(sheet(images, columns, gap=4)[..., ::-1])


def table(
    rows: Mapping[str, Mapping[str, float]],
    title: str,
    decimals: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Write figures as a Markdown table, one row a name.

    Two decimals, or as many as `decimals` says for a column.
    """
    names = list(next(iter(rows.values())))
    lines = [
        f"| {title} | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row, figures in rows.items():
        cells = " | ".join(f"{figures[n]:.{decimals.get(n, 2)}f}" for n in names)
        lines.append(f"| {row} | {cells} |")
    return "\n".join(lines)


def draw_map(
    path: Path | str,
    drives_m: Sequence[Float[np.ndarray, "_ 2"]],
    route_m: Float[np.ndarray, "T 2"],
    retrieved_m: Float[np.ndarray, "n 2"],
) -> Path:
    """Draw drives, the path and the retrieved captures, metres east and north."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 6))
    axes = figure.subplots()
    for places in drives_m:
        axes.plot(*places.T, color="0.8", linewidth=1)
    axes.plot(*retrieved_m.T, ".", color="tab:blue", label="retrieved captures")
    axes.plot(*route_m.T, color="tab:red", linewidth=2, label="path")
    axes.set(aspect="equal", xlabel="east, m", ylabel="north, m")
    axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path):
        figure.savefig(path, dpi=100)
    return path


def draw_drives(
    path: Path | str,
    drives_m: Sequence[Float[np.ndarray, "_ 2"]],
    time_s: Sequence[float],
    pairs_m: Float[np.ndarray, "p 2"],
) -> Path:
    """Draw a city's drives by the day they were made, and where pairs begin.

    Metres east and north. Drives of one street lie on each other: early ones are drawn
    wide and late ones thin, so that all are seen.
    """
    import matplotlib.colors
    import matplotlib.dates
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    days = np.asarray(time_s) / 86400
    scale = matplotlib.colors.Normalize(days.min(), max(days.max(), days.min() + 1))
    colours = matplotlib.colormaps["viridis"]
    order = np.argsort(days, kind="stable")
    for rank, k in enumerate(order):
        width = 6 - 5 * rank / max(1, len(order) - 1)
        colour = colours(scale(days[k]))
        axes.plot(*drives_m[k].T, color=colour, linewidth=width, zorder=1 + rank)
    if len(pairs_m):
        label, top = "where pairs begin", 2 + len(order)
        axes.plot(*pairs_m.T, ".", color="tab:red", ms=1, zorder=top, label=label)
        axes.legend(loc="upper right")
    axes.set(aspect="equal", xlabel="east, m", ylabel="north, m")
    source = matplotlib.cm.ScalarMappable(scale, colours)
    bar = figure.colorbar(source, ax=axes, shrink=0.6, label="driven")
    dates = matplotlib.dates.AutoDateLocator(minticks=2, maxticks=6)
    bar.ax.yaxis.set_major_locator(dates)
    bar.ax.yaxis.set_major_formatter(matplotlib.dates.ConciseDateFormatter(dates))
    with named(path):
        figure.savefig(path, dpi=100)
    return Path(path)


def draw_route(
    path: Path | str,
    drives_m: Sequence[Float[np.ndarray, "_ 2"]],
    route_m: Float[np.ndarray, "T 2"],
    shown_m: Mapping[str, Float[np.ndarray, "_ 2"]],
    margin_m: float = 30.0,
) -> Path:
    """Draw a path, the drives around it, and the captures that show it, by drive."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    for places in drives_m:
        axes.plot(*places.T, color="0.85", linewidth=1)
    axes.plot(*route_m.T, color="black", linewidth=1, label="path")
    axes.plot(*route_m[:1].T, "o", color="black", ms=6, label="start")
    for name, places in shown_m.items():
        axes.plot(*places.T, ".", ms=4, label=name)
    low, high = route_m.min(0) - margin_m, route_m.max(0) + margin_m
    middle, half = (low + high) / 2, max(high - low) / 2
    axes.set(xlim=middle[0] + [-half, half], ylim=middle[1] + [-half, half])
    axes.set(aspect="equal", xlabel="east, m", ylabel="north, m")
    axes.legend(loc="best", fontsize="small")
    with named(path):
        figure.savefig(path, dpi=100)
    return Path(path)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em;
        padding: 0 1em; color: #222 }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.1em; margin: 2em 0 .5em }}
img {{ max-width: 100%; display: block }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2em .8em .2em 0; text-align: left; vertical-align: top }}
.top {{ display: flex; flex-wrap: wrap; gap: 2em; align-items: flex-start }}
</style>
<h1>{title}</h1>
<div class="top">{picture}{table}</div>
{sections}
</html>
"""


def inline_image(image: Image, quality: int = 85) -> str:
    """Give the HTML of a picture that a page carries in itself."""
    kind = [cv2.IMWRITE_JPEG_QUALITY, quality]
    _, content = cv2.imencode(".jpg", image[..., ::-1], kind)
    text = base64.b64encode(content.tobytes()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{text}">'


def write_page(
    path: Path,
    title: str,
    picture: UInt8[np.ndarray, "_ _ 3"],
    facts: Mapping[str, str],
    sections: Mapping[str, UInt8[np.ndarray, "_ _ 3"]],
) -> None:
    """Write one HTML page that needs no other file: picture, facts, more pictures."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}<td>{html.escape(value)}"
        for name, value in facts.items()
    )
    parts = [
        f"<h2>{html.escape(name)}</h2>{inline_image(image)}"
        for name, image in sections.items()
    ]
    page = PAGE.format(
        title=html.escape(title),
        picture=inline_image(picture),
        table=f"<table>{rows}</table>",
        sections="\n".join(parts),
    )
    write_text(path, page)
