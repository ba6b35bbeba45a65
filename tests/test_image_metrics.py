"""PSNR and SSIM against scikit-image, masks against cutting, colours by round trip."""

import inspect

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cityrag_jax.metrics import image as metrics


@pytest.fixture
def videos(rng):
    """A smooth video and a noisy copy, uint8 [3, 40, 52, 3]."""
    y, x = np.mgrid[:40, :52] / 10
    waves = np.stack([np.sin(x + t) * np.cos(y * (1 + t)) for t in range(3)])
    truth = 0.5 + 0.4 * waves[..., None] * np.array([1.0, 0.7, -0.5])
    noisy = truth + rng.normal(0, [[[[0.05]]], [[[0.1]]], [[[0.2]]]], truth.shape)
    return tuple((255 * np.clip(v, 0, 1)).astype(np.uint8) for v in (noisy, truth))


def test_psnr_is_that_of_skimage(videos):
    found = metrics.psnr(*videos)
    expected = [peak_signal_noise_ratio(t, v) for v, t in zip(*videos, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_ssim_is_that_of_skimage_with_gaussian_windows(videos):
    """Ours is float64 as skimage's is: far inside the 4e-6 of a float32 version."""
    expected = [
        structural_similarity(
            t,
            v,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1,
        )
        for v, t in zip(*videos, strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(*videos), expected, rtol=0, atol=1e-10)


def test_scores_of_floats_in_0_to_1_equal_those_of_bytes(videos):
    """float32 holds bytes / 255 to 6e-8, so scores agree to about 1e-5 dB."""
    floats = [(v / 255).astype(np.float32) for v in videos]
    np.testing.assert_allclose(metrics.psnr(*floats), metrics.psnr(*videos), atol=1e-4)
    np.testing.assert_allclose(metrics.ssim(*floats), metrics.ssim(*videos), atol=1e-6)


def test_single_images_and_batches_of_videos_are_scored_alike(videos):
    noisy, truth = videos
    batch = metrics.psnr(np.stack([noisy, truth]), np.stack([truth, truth]))
    assert batch.shape == (2, 3) and np.all(np.isinf(batch[1]))
    assert metrics.psnr(noisy[0], truth[0]) == batch[0, 0]
    assert metrics.ssim(noisy[1], truth[1]) == metrics.ssim(noisy, truth)[1]


def test_known_error_gives_known_decibels():
    black = np.zeros((4, 12, 12, 3))
    assert metrics.clip_psnr(black + 0.1, black) == pytest.approx(20)
    assert metrics.clip_psnr(black, black) == np.inf


def test_psnr_of_a_clip_pools_the_squared_errors(videos):
    per_frame = metrics.psnr(*videos)
    pooled = -10 * np.log10(np.mean(10 ** (-per_frame / 10)))
    assert metrics.clip_psnr(*videos) == pytest.approx(pooled)
    assert metrics.clip_psnr(*videos) < per_frame.mean()


def test_masked_psnr_is_the_psnr_of_the_kept_pixels(videos):
    noisy, truth = videos
    mask = np.zeros(truth.shape[:3], bool)
    mask[:, 5:30, 10:40] = True
    cut = metrics.psnr(noisy[:, 5:30, 10:40], truth[:, 5:30, 10:40])
    np.testing.assert_allclose(metrics.psnr(noisy, truth, mask), cut)


def test_what_is_masked_out_does_not_matter(videos, rng):
    noisy, truth = videos
    cars = rng.random(truth.shape[:3]) < 0.2
    painted = np.where(cars[..., None], 255 - noisy, noisy)
    mask = metrics.static_mask(cars)
    np.testing.assert_array_equal(
        metrics.psnr(painted, truth, mask), metrics.psnr(noisy, truth, mask)
    )
    assert metrics.clip_psnr(painted, truth) < metrics.clip_psnr(noisy, truth)


def test_masked_ssim_is_the_mean_over_the_kept_windows(videos):
    """Windows inside a region see 5 pixels around it, so cut with that border."""
    noisy, truth = videos
    mask = np.zeros(truth.shape[:3], bool)
    mask[:, 10:25, 15:35] = True
    cut = metrics.ssim(noisy[:, 5:30, 10:40], truth[:, 5:30, 10:40])
    np.testing.assert_allclose(metrics.ssim(noisy, truth, mask), cut, atol=1e-12)
    everywhere = metrics.ssim(noisy, truth, np.ones_like(mask))
    np.testing.assert_allclose(everywhere, metrics.ssim(noisy, truth))


def test_static_mask_leaves_out_the_union():
    truth, generated = np.array([[1, 0, 0]], bool), np.array([[0, 1, 0]], bool)
    np.testing.assert_array_equal(
        metrics.static_mask(truth, generated), [[False, False, True]]
    )


def test_an_empty_mask_gives_nan_for_its_frame_and_no_warning(videos):
    noisy, truth = videos
    mask = np.ones(truth.shape[:3], bool)
    mask[1] = False
    for score in (metrics.psnr, metrics.ssim):
        np.testing.assert_array_equal(
            np.isnan(score(noisy, truth, mask)), [False, True, False]
        )
    expected = metrics.clip_psnr(noisy[::2], truth[::2])
    assert metrics.clip_psnr(noisy, truth, mask) == pytest.approx(expected)


def test_colour_fit_finds_the_change_that_was_made(videos):
    _, truth = videos
    gain, offset = np.array([0.8, 0.5, 0.9]), np.array([0.05, 0.2, 0.0])
    tinted = truth[0] / 255 * gain + offset
    fit = metrics.fit_colours(truth[0] / 255, tinted)
    np.testing.assert_allclose(fit, np.stack([gain, offset], -1), atol=1e-12)


def test_recoloured_condition_is_the_truth_if_only_light_differs(videos):
    _, truth = videos
    tinted = (truth / 255 * 0.7 + 0.1).astype(np.float32)
    recoloured = metrics.recolour_condition(tinted, truth[0])
    assert metrics.clip_psnr(tinted.astype(np.float64), truth / 255) < 25
    assert metrics.clip_psnr(recoloured, truth / 255) > 100


def test_colour_fit_never_loses_on_the_frame_it_was_fitted_on(videos, rng):
    """Least squares contains the identity, and the truth lies within the clip."""
    _, truth = videos
    other = rng.integers(0, 256, truth.shape, dtype=np.uint8)
    recoloured = metrics.recolour_condition(other, truth[0])[0]
    before = metrics.psnr(other[0], truth[0])
    assert metrics.psnr(recoloured, truth[0] / 255) > before


def test_colour_fit_looks_at_the_mask_alone(videos):
    _, truth = videos
    source, target = truth[0] / 255, truth[0] / 255 * 0.5
    mask = np.zeros(source.shape[:2], bool)
    mask[:20] = True
    target[20:] = 0.9
    fit = metrics.fit_colours(source, target, mask)
    np.testing.assert_allclose(fit, [[0.5, 0]] * 3, atol=1e-12)


def test_a_flat_channel_is_fitted_by_its_mean():
    flat, target = np.full((4, 4, 1), 0.3), np.linspace(0, 1, 16).reshape(4, 4, 1)
    np.testing.assert_allclose(metrics.fit_colours(flat, target), [[0.0, 0.5]])


def test_bad_images_are_refused(videos):
    noisy, truth = videos
    with pytest.raises(ValueError, match=r"\(3, 40, 52, 3\), the truth is \(2, 40"):
        inspect.unwrap(metrics.psnr)(noisy, truth[:2])  # as users run it, unchecked
    with pytest.raises(ValueError, match="divide them by 255"):
        metrics.psnr(noisy.astype(np.float32), truth.astype(np.float32))
    with pytest.raises(ValueError, match="smaller than SSIM's window of 11"):
        metrics.ssim(noisy[:, :10], truth[:, :10])
    with pytest.raises(ValueError, match="give the truth's"):
        metrics.static_mask()
    with pytest.raises(ValueError, match="no pixel"):
        metrics.fit_colours(noisy[0], truth[0], np.zeros((40, 52), bool))


def test_a_video_is_as_sharp_as_itself_and_shares_all_of_its_gradients(videos):
    _, truth = videos
    np.testing.assert_allclose(metrics.sharpness(truth, truth), 1, rtol=1e-12)
    np.testing.assert_allclose(metrics.gradient_cosine(truth, truth), 1, rtol=1e-12)


def test_noise_is_not_sharpness(videos):
    """It raises the energy of gradients, the more the stronger, but shares fewer."""
    noisy, truth = videos
    energies = metrics.sharpness(noisy, truth)
    assert np.all(energies > 1) and energies[2] > energies[0]
    cosines = metrics.gradient_cosine(noisy, truth)
    assert np.all(cosines < 0.99) and cosines[2] < cosines[0]


def test_a_blur_lowers_sharpness(videos):
    noisy, _ = videos
    blurred = gaussian_filter(noisy / 255, (0, 1.0, 1.0, 0))
    assert np.all(metrics.sharpness(blurred, noisy / 255) < 0.5)


def test_contrast_scales_sharpness_and_leaves_the_direction_of_gradients(videos):
    """Half the contrast is a quarter of the energy, whatever the brightness."""
    truth = videos[1] / 255
    faint = 0.3 + truth / 2
    np.testing.assert_allclose(metrics.sharpness(faint, truth), 0.25)
    np.testing.assert_allclose(metrics.gradient_cosine(faint, truth), 1)
    np.testing.assert_allclose(metrics.gradient_cosine(1 - truth, truth), -1)


def test_gradients_are_differences_down_and_to_the_right():
    """One white pixel of three channels in a corner: one step each way, 3 + 3."""
    truth = np.zeros((12, 12, 3))
    truth[0, 0] = 1
    inside = np.zeros((12, 12, 3))
    inside[5, 5] = 1
    assert metrics.sharpness(inside, truth) == 2
    assert metrics.gradient_cosine(inside, truth) == 0


def test_flat_frames_have_no_gradients_to_share(videos):
    """A flat truth says nothing of sharpness and is left out of a mean."""
    _, truth = videos
    flat = np.full_like(truth, 100)
    np.testing.assert_array_equal(metrics.sharpness(flat, truth), [0] * 3)
    np.testing.assert_array_equal(metrics.gradient_cosine(flat, truth), [0] * 3)
    for measure in (metrics.sharpness, metrics.gradient_cosine):
        assert np.all(np.isnan(measure(truth, flat)))
        half = measure(truth, np.stack([truth[0], flat[1], truth[2]]))
        assert metrics.mean_defined(half) == np.mean(half[[0, 2]])
        assert np.isnan(metrics.mean_defined(measure(flat, flat)))
