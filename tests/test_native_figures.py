"""The figures of any video: each says what is known of a picture, and a planted fault moves its own figure alone."""

import cv2
import numpy as np
import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.evaluation import native, native_suite
from packforcing_jax.evaluation.suite import Options

HEIGHT, WIDTH, LENGTH = 72, 96, 80
FPS = 16
BLOCK = 16
STUDENT_99 = 2.861  # of 19 degrees of freedom, both sides

# Clips ----------------------------------------------------------------------------------------------------------------


def texture(rng, height, width):
    """A seamless random texture of three scales, of deviation 1."""
    rows, columns = np.fft.fftfreq(height)[:, None, None], np.fft.fftfreq(width)[:, None]
    out = 0
    for scale, share in ((1.0, 0.35), (2.5, 0.6), (7.0, 1.0)):
        noise = np.fft.fft2(rng.normal(size=(height, width, 3)), axes=(0, 1))
        soft = np.exp(-2 * (np.pi * scale) ** 2 * (rows**2 + columns**2))
        layer = np.fft.ifft2(noise * soft, axes=(0, 1)).real
        out = out + share * layer / layer.std()
    return out / out.std()


def moved(picture, down, right):
    """A seamless picture moved by parts of pixels."""
    rows = np.fft.fftfreq(picture.shape[0])[:, None, None]
    columns = np.fft.fftfreq(picture.shape[1])[:, None]
    phase = np.exp(-2j * np.pi * (rows * down + columns * right))
    return np.fft.ifft2(np.fft.fft2(picture, axes=(0, 1)) * phase, axes=(0, 1)).real


def as_frames(values):
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def clip(seed):
    """A camera that pans at an uneven pace, an object on a path of its own, light that changes, noise."""
    rng = np.random.default_rng(seed)
    back, front = texture(rng, HEIGHT, WIDTH), texture(rng, HEIGHT // 3, WIDTH // 4)
    palette, contrast = rng.uniform(90, 150, 3), rng.uniform(18, 30)
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.5)
    phase, period, light = rng.uniform(0, 6.28), rng.uniform(40, 90), rng.normal(0, 3, 3)
    time = np.arange(LENGTH)
    path = np.cumsum(1 + 0.4 * np.sin(2 * np.pi * time / period + phase)) * speed
    frames = np.empty((LENGTH, HEIGHT, WIDTH, 3))
    for at in time:
        picture = moved(back, path[at] * np.sin(angle), path[at] * np.cos(angle))
        frames[at] = picture * contrast + palette + light * at / LENGTH
        turn = 2 * np.pi * at / LENGTH
        row = int(HEIGHT / 3 + HEIGHT / 5 * np.sin(turn + phase))
        column = int(WIDTH / 3 + WIDTH / 5 * np.cos(turn))
        frames[at, row : row + HEIGHT // 3, column : column + WIDTH // 4] = (
            front * contrast + palette[::-1]
        )
    return as_frames(frames + rng.normal(0, 1.0, frames.shape))


def pan(right, length=6):
    picture = texture(np.random.default_rng(0), HEIGHT, WIDTH) * 25 + 120
    return as_frames(np.stack([moved(picture, 0, right * at) for at in range(length)]))


def signals(frames, size=7):
    blocks = (frames[at : at + size] for at in range(0, len(frames), size))
    return native.joined(list(native.parts(blocks)))


def figures(frames, block=BLOCK):
    return native_suite.of_signals(signals(frames), FPS, Options(block=block)).figures


# Planted faults -------------------------------------------------------------------------------------------------------


def with_jumps(frames):
    """Half a frame's shift at every border of 16 frames."""
    return np.stack(
        [np.roll(each, at // BLOCK % 2 * WIDTH // 2, axis=1) for at, each in enumerate(frames)]
    )


def with_fade(frames):
    return as_frames(frames * np.linspace(1, 0.4, len(frames))[:, None, None, None])


def with_freeze(frames):
    """A third of the time stands still; then it goes on from there."""
    third = len(frames) // 3
    still = np.repeat(frames[third - 1 : third], third, axis=0)
    return np.concatenate([frames[:third], still, frames[third : len(frames) - third]])


def with_flicker(frames):
    return as_frames(frames * np.where(np.arange(len(frames)) % 2, 1.06, 0.94)[:, None, None, None])


FAULTS = {
    "discontinuity": with_jumps,
    "colour_drift": with_fade,
    "freeze": with_freeze,
    "flicker": with_flicker,
}


@pytest.fixture(scope="module")
def ranges():
    """Where 99 % of further untouched clips lie, by what twenty of them show: (low, high) of each figure."""
    found = [figures(clip(seed)) for seed in range(20)]
    out = {}
    for name in native.FIGURES:
        values = np.array([each[name] for each in found])
        half = STUDENT_99 * values.std(ddof=1) * np.sqrt(1 + 1 / len(values))
        out[name] = values.mean() - half, values.mean() + half
    return out


def outside(found, ranges):
    return {name for name, (low, high) in ranges.items() if not low <= found[name] <= high}


@pytest.mark.parametrize("seed", [101, 102])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_moves_its_own_figure_out_of_the_range_of_untouched_clips_and_no_other(
    ranges, name, seed
):
    untouched = clip(seed)
    assert outside(figures(untouched), ranges) == set()
    assert outside(figures(FAULTS[name](untouched)), ranges) == {name}


def test_the_block_length_of_a_video_with_jumps_is_found():
    found = native_suite.of_signals(signals(with_jumps(clip(103))), FPS, Options()).about["block"]
    assert found == {"frames": BLOCK, "source": "found"}


# Single figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0.5, 1.0, 2.0, 4.0])
def test_flow_is_the_share_of_the_longer_side_that_the_picture_moves_a_frame(right):
    inner = pan(right)[:, :, 8:-8]
    expected = 100 * right / (WIDTH - 16)
    assert figures(inner)["flow"] == pytest.approx(expected, rel=0.1)


def test_light_that_changes_is_no_motion_and_leaves_sharpness():
    frames = pan(1.0, 12)
    plain, faded = figures(frames), figures(with_fade(frames))
    assert faded["flow"] == pytest.approx(plain["flow"], rel=0.02)
    assert faded["sharpness"] == pytest.approx(plain["sharpness"], rel=0.02)


def test_a_still_picture_is_frozen_and_has_no_jumps_to_count():
    found = figures(np.repeat(pan(0, 1), 5, axis=0))
    assert (found["freeze"], found["flow"], found["flicker"]) == (1.0, 0.0, 0.0)
    assert found["discontinuity"] is None


def test_a_small_thing_that_moves_is_no_freeze_and_a_grain_of_coding_is_no_motion():
    frames = np.repeat(pan(0, 1), 4, axis=0)
    for at, frame in enumerate(frames):
        frame[10:13, 10 + 3 * at : 13 + 3 * at] = 250
    assert figures(frames)["freeze"] == 0
    grain = np.repeat(pan(0, 1), 4, axis=0)
    grain[1::2, ::6, ::6] ^= 1
    assert figures(grain)["freeze"] == 1


@pytest.mark.parametrize("amount", [2, 6])
def test_flicker_is_by_how_much_light_swings_around_its_middle(amount):
    frames = np.full((8, 32, 40, 3), 120, np.uint8)
    frames[::2] += np.uint8(amount)
    assert figures(frames)["flicker"] == pytest.approx(amount, rel=0.01)


def test_colour_drift_is_the_distance_of_means_where_deviations_are_equal():
    frames = np.full((10, 20, 30, 3), 100, np.uint8)
    frames[5:] = 140
    black = cv2.cvtColor(np.float32([[[100 / 255] * 3, [140 / 255] * 3]]), cv2.COLOR_RGB2LAB)[0]
    expected = float(np.linalg.norm(black[1] - black[0]))
    assert figures(frames)["colour_drift"] == pytest.approx(expected, rel=1e-3)


def blurred(frame):
    return cv2.GaussianBlur(frame, (0, 0), 1.2)


def coded_badly(frame):
    written = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 8])[1]
    return cv2.imdecode(written, cv2.IMREAD_COLOR)


@pytest.mark.parametrize("spoil", [blurred, coded_badly])
def test_a_blurred_picture_and_one_of_coarse_blocks_count_as_less_sharp(spoil):
    picture = pan(0, 1)[0]
    sharp, spoilt = (
        native.sharpness(cv2.cvtColor(each, cv2.COLOR_RGB2GRAY))
        for each in (picture, spoil(picture))
    )
    assert spoilt < sharp


def test_sharpness_that_goes_is_drift():
    frames = np.concatenate([pan(0.5, 6), [blurred(frame) for frame in pan(0.5, 6)]])
    measured = native_suite.of_signals(signals(frames), FPS, Options(block=4))
    first, last = (end["sharpness"] for end in (measured.first, measured.last))
    assert measured.figures["sharpness_drift"] == pytest.approx(100 * (last / first - 1))
    assert last < 0.8 * first


def test_discontinuity_takes_as_many_of_the_largest_flows_as_there_are_borders():
    flow = np.array([1.0, 1, 1, 4, 1, 1, 1, 5, 1, 1, 0])
    change = np.where(flow > 0, 9.0, 0.0)
    empty = np.zeros((12, 6)), np.zeros(12)
    span = native.Signals(*empty, flow, change, np.zeros((11, 4)))
    moving = flow[:-1]
    assert native.discontinuity(span, span, 4) == pytest.approx(4.5 / moving.mean())
    assert native.discontinuity(span, span, 99) == pytest.approx(5 / moving.mean())


@pytest.mark.parametrize(("period", "offset"), [(3, 1), (7, 6), (16, 15)])
def test_a_block_length_is_found_by_the_pairs_that_move_more(period, offset):
    rng = np.random.default_rng(period)
    flow = rng.uniform(0.9, 1.1, 6 * period)
    flow[offset::period] += 0.6
    assert native.find_block(flow) == (period, "found")


def test_without_a_rhythm_the_block_length_is_assumed():
    rng = np.random.default_rng(3)
    cut = rng.uniform(0.9, 1.1, 80)
    cut[33] = 30
    assert native.find_block(cut) == (native.ASSUMED, "assumed")
    for length in (1, 5, 60, 300):
        assert native.find_block(rng.uniform(0.5, 1.5, length)) == (native.ASSUMED, "assumed")
    assert native.find_block(np.zeros(50)) == (native.ASSUMED, "assumed")


# Spans ----------------------------------------------------------------------------------------------------------------


def test_signals_do_not_depend_on_how_many_frames_come_at_once():
    frames = clip(4)[:9]
    whole, pieces = signals(frames, 9), signals(frames, 2)
    for name in ("colour", "sharpness", "flow", "change", "brightness"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name))
    part = whole[3:7]
    assert (len(part), len(part.flow)) == (4, 3)
    np.testing.assert_array_equal(part.flow, whole.flow[3:6])


def test_frames_too_small_for_flow_are_refused():
    with pytest.raises(InputError, match="40x12 pixels are too small"):
        signals(np.zeros((2, 12, 40, 3), np.uint8))


@pytest.mark.parametrize(
    ("frames", "length", "starts"),
    [(10, 5, [0, 5]), (12, 5, [0, 5]), (13, 5, [0, 5, 10]), (3, 5, [0]), (1, 5, [0])],
)
def test_windows_cover_every_frame_once(frames, length, starts):
    spans = native.windows(frames, length)
    assert [span.start for span in spans] == starts
    assert [i for span in spans for i in range(frames)[span]] == list(range(frames))


@pytest.mark.parametrize(
    ("frames", "length", "spans"),
    [(30, 5, ((0, 5), (25, 30))), (9, 5, ((0, 4), (5, 9))), (2, 5, ((0, 1), (1, 2)))],
)
def test_the_ends_of_a_short_video_are_its_halves(frames, length, spans):
    assert tuple((span.start, span.stop) for span in native.ends(frames, length)) == spans
