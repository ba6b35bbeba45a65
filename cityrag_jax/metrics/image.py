"""PSNR, SSIM, sharpness and an affine colour fit, on the host in float64.

Images are uint8 in [0, 255] or floats in [0, 1], channels last; both arguments of the
same kind. Time and batch may lead: every function works on the last three axes, and
`frames` below stands for whatever leads, `T` for a video.

Masks mark what counts: True is compared, False is left out. "Static only" (table 1 of
the paper) is such a mask: neither the truth's cars and people nor the generated ones.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64, UInt8
from scipy.ndimage import correlate1d

Images = UInt8[np.ndarray, "*frames H W C"] | Float[np.ndarray, "*frames H W C"]
Mask = Bool[np.ndarray, "*frames H W"]

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(
    image: Images, truth: Images, mask: Mask | None = None
) -> Float64[np.ndarray, "*frames"]:
    """Give the peak signal-to-noise ratio of every frame, in decibels.

    Infinite for equal frames, NaN for a frame whose mask is empty.
    """
    squares, counts = _squared_error(image, truth, mask)
    return np.asarray(_decibels(squares, counts))


def clip_psnr(image: Images, truth: Images, mask: Mask | None = None) -> float:
    """Give one PSNR of a clip, from the mean squared error over all that counts.

    Below the mean of the frames' PSNR (Jensen); say which one a table holds.
    """
    squares, counts = _squared_error(image, truth, mask)
    return float(_decibels(squares.sum(), counts.sum()))


def static_mask(*transient: Mask) -> Mask:
    """Keep what is in none of the masks of transient things: their union is left out.

    Give the truth's cars and people and, where known, the generated video's.
    """
    if not transient:
        raise ValueError("No mask of transient things given; give the truth's.")
    return ~np.logical_or.reduce(transient)


def ssim(
    image: Images, truth: Images, mask: Mask | None = None
) -> Float64[np.ndarray, "*frames"]:
    """Give the structural similarity of every frame, the mean over channels.

    Gaussian windows of 11 x 11, sigma 1.5, whole windows only (Wang et al. 2004); equal
    to skimage's `gaussian_weights=True, use_sample_covariance=False`, whose default of
    flat 7 x 7 windows gives other numbers. With a mask, the mean over the windows whose
    centre counts. Raises ValueError for sides below 11.
    """
    similarity = ssim_map(image, truth).mean(axis=-1)
    inside = slice(SSIM_RADIUS, -SSIM_RADIUS)
    similarity = similarity[..., inside, inside]
    if mask is None:
        return np.asarray(similarity.mean(axis=(-2, -1)))
    weights = mask[..., inside, inside]
    return _ratio((similarity * weights).sum((-2, -1)), weights.sum((-2, -1)))


def ssim_map(image: Images, truth: Images) -> Float64[np.ndarray, "*frames H W C"]:
    """Give the similarity around every pixel; windows reflect at the border."""
    _check_alike(image, truth)
    x, y = _unit(image), _unit(truth)
    if min(x.shape[-3:-1]) <= 2 * SSIM_RADIUS:
        raise ValueError(
            f"Images of {x.shape[-3]}x{x.shape[-2]} are smaller than SSIM's window of "
            f"{2 * SSIM_RADIUS + 1}; compare larger ones."
        )
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)


def sharpness(video: Images, truth: Images) -> Float64[np.ndarray, "*frames"]:
    """Give the energy of a video's gradients over that of the truth's, per frame.

    1 is as sharp as the truth, less is blurred. Noise has gradients too: read it beside
    `gradient_cosine`. NaN for a frame whose truth is flat, where nothing can be sharp.
    """
    return compare_gradients(video, truth)[0]


def gradient_cosine(video: Images, truth: Images) -> Float64[np.ndarray, "*frames"]:
    """Give the cosine between the gradients of a video and the truth's, per frame.

    1 where every edge is the truth's up to one factor, about 0 for noise. A flat frame
    has no edge of the truth and gets 0; NaN where the truth itself is flat.
    """
    return compare_gradients(video, truth)[1]


def compare_gradients(
    video: Images, truth: Images
) -> tuple[Float64[np.ndarray, "*frames"], Float64[np.ndarray, "*frames"]]:
    """Give `sharpness` and `gradient_cosine`, from one look at every frame.

    Gradients are differences of neighbours, down and to the right.
    """
    _check_alike(video, truth)
    shape, frame = video.shape[:-3], video.shape[-3:]
    pairs = zip(video.reshape(-1, *frame), truth.reshape(-1, *frame), strict=True)
    products = np.array([_products(*pair) for pair in pairs]).reshape(*shape, 3)
    ours, both, theirs = np.moveaxis(products, -1, 0)
    norms = np.sqrt(ours * theirs)
    cosine = np.divide(both, norms, out=np.zeros_like(norms), where=norms > 0)
    return _ratio(ours, theirs), np.where(theirs > 0, cosine, np.nan)


def mean_defined(values: Float[np.ndarray, "*rows n"]) -> Float64[np.ndarray, "*rows"]:
    """Average the last axis over what is not NaN; NaN if all of it is."""
    defined = ~np.isnan(values)
    total = np.sum(values, axis=-1, where=defined)
    return _ratio(np.asarray(total, np.float64), defined.sum(axis=-1))


def fit_colours(
    source: UInt8[np.ndarray, "H W C"] | Float[np.ndarray, "H W C"],
    target: UInt8[np.ndarray, "H W C"] | Float[np.ndarray, "H W C"],
    mask: Bool[np.ndarray, "H W"] | None = None,
) -> Float64[np.ndarray, "C 2"]:
    """Fit gain and offset of each channel so that the source looks like the target.

    Least squares over the pixels that count, colours in [0, 1]. A channel without
    contrast gets gain 0 and the target's mean as offset.
    """
    _check_alike(source, target)
    counts = np.ones(source.shape[:2], bool) if mask is None else mask
    if not counts.any():
        raise ValueError(
            "The mask leaves no pixel to fit colours on; pass None for all."
        )
    x, y = _unit(source)[counts], _unit(target)[counts]
    centred = x - x.mean(axis=0)
    variance = (centred**2).mean(axis=0)
    covariance = (centred * (y - y.mean(axis=0))).mean(axis=0)
    gain = np.divide(
        covariance, variance, out=np.zeros_like(variance), where=variance > 1e-12
    )
    return np.stack([gain, y.mean(axis=0) - gain * x.mean(axis=0)], axis=-1)


def apply_colours(
    images: Images, gain_and_offset: Float64[np.ndarray, "C 2"]
) -> Float64[np.ndarray, "*frames H W C"]:
    """Recolour images with a fit, clipped to [0, 1]."""
    gain, offset = gain_and_offset.T
    return np.clip(_unit(images) * gain + offset, 0, 1)


def recolour_condition(
    condition: Images,
    first_image: UInt8[np.ndarray, "H W C"] | Float[np.ndarray, "H W C"],
) -> Float64[np.ndarray, "T H W C"]:
    """Give the honest strong baseline: the condition video in the first image's light.

    One gain and one offset a channel, fitted from the condition's frame 0 to the first
    image: what a method must beat to have done more than recolour what it retrieved.
    """
    fit = fit_colours(_unit(condition[0]), _unit(first_image))
    return apply_colours(condition, fit)


def _unit(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image / 255.0
    return image.astype(np.float64)


def _check_alike(image: np.ndarray, truth: np.ndarray) -> None:
    if image.shape != truth.shape:
        raise ValueError(
            f"Images are {image.shape}, the truth is {truth.shape}; resize or cut one."
        )
    for array in (image, truth):
        if array.dtype != np.uint8 and array.max(initial=0) > 2:
            raise ValueError(
                f"Floating-point images reach {array.max():.4g} but stand for [0, 1]; "
                "divide them by 255 or pass uint8."
            )


def _squared_error(image, truth, mask):
    """Give the sum of squares and the count of numbers for every frame."""
    _check_alike(image, truth)
    squares = ((_unit(image) - _unit(truth)) ** 2).sum(axis=-1)
    channels = image.shape[-1]
    if mask is None:
        height, width = squares.shape[-2:]
        counts = np.full(squares.shape[:-2], channels * height * width)
    else:
        squares, counts = squares * mask, channels * mask.sum(axis=(-2, -1))
    return squares.sum(axis=(-2, -1)), np.asarray(counts)


def _products(image: np.ndarray, truth: np.ndarray) -> list[float]:
    """Multiply the gradients of two frames: own energy, both, the truth's energy."""
    whole = image.dtype == truth.dtype == np.uint8  # exact, and quicker
    x, y = (a.astype(np.int32) if whole else _unit(a) for a in (image, truth))
    steps = [(np.diff(x, axis=k), np.diff(y, axis=k)) for k in (0, 1)]
    pairs = [[(dx, dx), (dx, dy), (dy, dy)] for dx, dy in steps]
    return [
        sum(float((a * b).sum()) for a, b in kind) for kind in zip(*pairs, strict=True)
    ]


def _ratio(
    numerator: np.ndarray | np.number, count: np.ndarray | np.number
) -> Float64[np.ndarray, "..."]:
    """Divide, NaN where nothing was counted."""
    nothing = np.full(np.shape(count), np.nan)
    return np.divide(numerator, count, out=nothing, where=np.asarray(count) > 0)


def _decibels(squares, counts):
    mean = _ratio(squares, counts)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mean)


def _blur(image: np.ndarray) -> np.ndarray:
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    rows = correlate1d(image, weights, axis=-3, mode="reflect")
    return correlate1d(rows, weights, axis=-2, mode="reflect")
