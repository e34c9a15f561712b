from fractions import Fraction

import numpy as np
import pytest

from pixelis_jax.chat.videos import VideoProcessor, clips_of, clock
from pixelis_jax.types import Video
from tests.chat import oracle
from tests.chat.conftest import write

CLASS = {"qwen2_5_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}
FAMILIES = pytest.mark.parametrize("family", CLASS)
# (frames, height, width): one and two frames, odd counts, thin, around multiples of 28 and 32.
SHAPES = [
  (1, 28, 28), (1, 97, 301), (2, 1, 1), (2, 1, 200), (2, 3, 2), (2, 200, 1), (3, 28, 29),
  (3, 5, 11), (3, 64, 64), (4, 7, 700), (4, 56, 56), (4, 112, 98), (5, 31, 33), (5, 32, 32),
  (5, 55, 57), (6, 27, 141), (6, 96, 64), (6, 113, 112), (7, 13, 14), (7, 41, 43), (7, 160, 31),
  (8, 14, 42), (8, 63, 65), (9, 48, 48), (9, 33, 200), (10, 45, 80), (11, 80, 45), (11, 128, 128),
  (12, 61, 17), (13, 120, 160), (14, 29, 28), (15, 37, 90), (16, 84, 84), (17, 17, 61),
  (19, 70, 42), (21, 90, 40),
]  # fmt: skip
LARGE = [
  (2, 1080, 1920), (3, 2160, 3840), (5, 480, 640), (16, 37, 7400), (31, 720, 1280), (64, 1, 150),
  (120, 240, 426), (255, 333, 334), (600, 1080, 607), (767, 360, 640), (768, 1080, 1920),
]  # fmt: skip


def noise(frames: int, height: int, width: int) -> np.ndarray:
  rng = np.random.default_rng([frames, height, width])
  return rng.integers(0, 256, (frames, height, width, 3), np.uint8)


def video(frames: np.ndarray, fps: float = 2.0, start: float = 0.0) -> Video:
  times = (np.arange(len(frames)) / fps + start).astype(np.float32)
  return Video(frames=frames, times=times)


def processor(path, family: str = "qwen2_5_vl", **settings) -> VideoProcessor:
  settings = {"video_processor_type": CLASS[family]} | settings
  write(path / "video_preprocessor_config.json", **settings)
  return VideoProcessor.from_directory(path)


def bounds(low: int, high: int) -> dict:
  return {"size": {"shortest_edge": low, "longest_edge": high}}


@FAMILIES
def test_equals_transformers(tmp_path, transformers_process, family):
  """Grids exactly; bytes within 2 levels after a resize, for the reason `process` states."""
  ours = processor(tmp_path, family, do_sample_frames=False, **bounds(3000, 40_000))
  table = ours.table[1]
  worst, changed, exact = 0.0, [], 0
  for shape in SHAPES:
    # transformers' Qwen3VLVideoProcessor refuses one frame. Repeated, it is what ours shows.
    frames = np.repeat(noise(*shape), 1 + (shape[0] == 1), axis=0)
    want, grid = transformers_process(oracle.video, tmp_path, family, frames, 2.0)
    got = ours.process(video(noise(*shape)))
    assert got.grid == grid, shape
    assert got.size == (ours.patch * grid[1], ours.patch * grid[2])
    levels = np.abs(got.patches - want) / (table[1] - table[0])
    worst = max(worst, levels.max())
    changed.append((levels > 0.5).mean())
    if got.size == shape[1:]:
      np.testing.assert_array_equal(got.patches, want)
      exact += 1
  assert worst < 2.01 and max(changed) < 0.05
  assert exact >= 2  # Some shapes are shown as they are.


@FAMILIES
@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("settings", [{}, bounds(4096, 25_165_824), bounds(3136, 12_845_056)])
def test_sizes_equal_transformers(tmp_path, transformers_process, family, cap, settings):
  ours = processor(tmp_path, family, cap_pixels_per_frame=cap, **settings)
  shapes = [shape for shape in (*SHAPES, *LARGE) if shape[0] > 1]
  settings = settings | {"cap_pixels_per_frame": cap}
  want = transformers_process(oracle.sizes, family, settings, shapes)
  assert [ours.shown_size(*shape) for shape in shapes] == want


def test_the_cap_and_the_clip_count(tmp_path):
  """What the two budgets mean, worked out."""
  older = processor(tmp_path, "qwen2_5_vl", **bounds(784, 784 * 400))
  assert older.shown_size(8, 560, 560) == older.shown_size(800, 560, 560) == (560, 560)
  # Of 800 frames each has 128000 * 0.9 * 2 / 800 = 288 tokens: sqrt(288) = 16.97 a side.
  capped = processor(tmp_path, "qwen2_5_vl", cap_pixels_per_frame=True, **bounds(784, 784 * 400))
  assert capped.shown_size(800, 560, 560) == (28 * 16, 28 * 16)
  newer = processor(tmp_path, "qwen3_vl", **bounds(1024, 1024 * 400))
  assert newer.shown_size(4, 320, 320) == (320, 320)  # 4 * 10 * 10 tokens' pixels are just allowed.
  assert newer.shown_size(16, 320, 320) == (160, 160)
  # 5 frames are compared as 4, since 2.5 rounds to 2, but scaled as 5. 5 * 100 > 400 shrinks not.
  assert newer.shown_size(5, 320, 320) == (320, 320)
  assert newer.shown_size(7, 320, 320) == (224, 224)  # Compared as 8: sqrt(400 / 7) = 7.56.


SAMPLING = [
  {"fps": 2},
  {"fps": 1.5, "min_frames": 2},
  {"fps": 4, "max_frames": 10},
  {"fps": 30, "max_frames": 11},
  {"num_frames": 8, "fps": None},
  {"num_frames": 7, "fps": None},
]


@FAMILIES
@pytest.mark.parametrize("settings", SAMPLING)
@pytest.mark.parametrize("fps", [1.0, 12.5, 24.0, 29.97])
def test_samples_the_frames_that_transformers_does(
  tmp_path, transformers_process, family, settings, fps
):
  ours = processor(tmp_path, family, do_sample_frames=True, **settings)
  counts = [*range(1, 130), 300, 777, 1001, 5000]
  for count, want in transformers_process(oracle.sampled, family, settings, counts, fps).items():
    if want == "ValueError":
      with pytest.raises(ValueError, match=f"must be at most the video's {count} frames"):
        ours.sample(count, fps)
    elif want == "ZeroDivisionError":  # Shorter than a patch of frames: shown as it is.
      assert ours.sample(count, fps).tolist() == list(range(count)) == [0]
    else:
      # Rounding gives transformers an index past the end of some clips, on which it stops.
      assert ours.sample(count, fps).tolist() == [i for i in want if i < count], count


def test_all_frames_are_shown_where_the_settings_do_not_sample(tmp_path):
  for settings in ({}, {"do_sample_frames": True}, {"do_sample_frames": False, "fps": 2}):
    assert processor(tmp_path, **settings).sample(9, 30.0).tolist() == list(range(9))
  assert processor(tmp_path, "qwen3_vl").sample(60, 30.0).tolist() == [0, 20, 39, 59]


def test_order_of_patches(tmp_path):
  """Step by step; inside a step as an image; inside a patch channel, frame, row, column."""
  ours = processor(tmp_path, do_sample_frames=False, patch_size=2, **bounds(32, 32))
  frames = np.zeros((4, 4, 8, 3), np.uint8)
  for f in range(4):
    for row in range(2):
      for column in range(4):
        frames[f, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 32 * f + 4 * row + column
  got = ours.process(video(frames))
  assert got.grid == (2, 2, 4)
  patches = got.patches.reshape(2, 8, 3, 2, 4)
  red = np.round(patches[:, :, 0, :, 0] * 0.26862954 * 255 + 0.48145466 * 255).astype(int)
  block = [0, 1, 4, 5, 2, 3, 6, 7]
  for step in range(2):
    for frame in range(2):
      assert red[step, :, frame].tolist() == [32 * (2 * step + frame) + place for place in block]


@FAMILIES
def test_the_last_frame_fills_an_odd_clip(tmp_path, family):
  ours = processor(tmp_path, family, do_sample_frames=False, **bounds(1024, 10**6))
  frames = noise(3, 64, 64)
  odd, even = ours.process(video(frames)), ours.process(video(frames[[0, 1, 2, 2]]))
  assert odd.grid[0] == even.grid[0] == 2
  np.testing.assert_array_equal(odd.patches, even.patches)
  only = ours.process(video(frames[:1]))
  assert only.grid == (1, *odd.grid[1:])
  doubled = ours.process(video(frames[[0, 0]]))
  np.testing.assert_array_equal(only.patches, doubled.patches)


def test_interval_and_seconds(tmp_path):
  still = processor(tmp_path, "qwen3_vl", do_sample_frames=False)
  # At 4 a second five frames: steps (0, .25), (.5, .75) and (1, 1), the last one repeated.
  clip = video(noise(5, 32, 32), fps=4)
  assert still.seconds(clip).tolist() == [0.125, 0.625, 1.0]
  assert still.process(clip).interval == 0.5
  assert still.seconds(video(noise(1, 32, 32))).tolist() == [0.0]
  # Sampled: 2 of 8 a second of 12 frames, at least 4: frames 0, 4, 7 and 11.
  sampled = processor(tmp_path, "qwen3_vl")
  clip = video(noise(12, 32, 32), fps=8, start=10)
  assert sampled.seconds(clip).tolist() == [10.25, 10 + (7 + 11) / 16]
  # 4 frames stand for 12 / 8 seconds, two for each step.
  assert sampled.process(clip).interval == 0.75


@pytest.mark.parametrize("fps", [0.5, 1, 10, 23.976, 24, 25, 30, 60, 12.5, 30000 / 1001])
def test_clock_finds_the_rate_behind_rounded_times(fps):
  clip = video(np.zeros((90, 1, 1, 3), np.uint8), fps=fps)
  found, times = clock(clip)
  # float32 keeps 7 digits: of 30000 / 1001 too little to tell it from its neighbours for sure.
  assert found == pytest.approx(fps, rel=1e-7)
  if Fraction(fps).limit_denominator(100) == Fraction(fps):
    assert found == fps and times.tolist() == [i / fps for i in range(90)]


def test_clock_keeps_times_that_follow_none():
  frames = np.zeros((4, 1, 1, 3), np.uint8)
  times = np.array([0.5, 0.75, 2.0, 3.5], np.float32)
  fps, kept = clock(Video(frames=frames, times=times))
  assert fps == 1.0 and kept.tolist() == times.tolist()  # Three steps in three seconds.


def test_key_is_of_frames_and_size(tmp_path):
  ours = processor(tmp_path, do_sample_frames=False, **bounds(784, 10**6))
  frames = noise(4, 56, 56)
  key = ours.process(video(frames)).key
  assert ours.process(video(frames.copy(), fps=9)).key == key  # Features know no time.
  assert ours.process(video(frames[::-1].copy())).key != key
  flat = [np.zeros(s, np.uint8) for s in ((4, 28, 56, 3), (4, 56, 28, 3), (2, 56, 56, 3))]
  assert len({ours.process(video(f)).key for f in flat}) == 3


def test_settings_are_read_in_transformers_order(tmp_path):
  assert VideoProcessor.from_directory(tmp_path).patch == 14  # Class defaults of Qwen2.5-VL.
  write(tmp_path / "config.json", model_type="qwen3_vl")
  defaults = VideoProcessor.from_directory(tmp_path)
  assert (defaults.patch, defaults.min_pixels, defaults.max_pixels) == (16, 131072, 786432)
  assert defaults.whole_clip and defaults.do_sample and defaults.fps == 2
  # An older directory has the image processor's file alone: transformers reads that.
  write(tmp_path / "preprocessor_config.json", patch_size=8, image_mean=[0.1, 0.2, 0.3])
  assert VideoProcessor.from_directory(tmp_path).patch == 8
  write(tmp_path / "video_preprocessor_config.json", patch_size=10)
  assert VideoProcessor.from_directory(tmp_path).patch == 10
  write(tmp_path / "processor_config.json", image_processor={"patch_size": 7})
  assert VideoProcessor.from_directory(tmp_path).patch == 10
  write(tmp_path / "processor_config.json", video_processor={"patch_size": 12})
  assert VideoProcessor.from_directory(tmp_path).patch == 12


def test_only_the_older_class_reads_the_older_spelling(tmp_path):
  settings = {"min_pixels": 784, "max_pixels": 7840, **bounds(1000, 2000)}
  older = processor(tmp_path, "qwen2_5_vl", **settings)
  newer = processor(tmp_path, "qwen3_vl", **settings)
  assert (older.min_pixels, older.max_pixels) == (784, 7840)
  assert (newer.min_pixels, newer.max_pixels) == (1000, 2000)


@pytest.mark.parametrize(
  "settings, said",
  [
    ({"do_resize": False}, "do_resize is false"),
    ({"video_processor_type": "Other"}, r"type 'Other' must be one of \['Qwen2VL"),
    ({"num_frames": 4, "fps": 2, "do_sample_frames": True}, "fps 2 and num_frames 4 exclude"),
    (bounds(9, 4), r"min_pixels 9 must be in \[1, max_pixels = 4\]"),
  ],
)
def test_refuses_what_it_cannot_serve(tmp_path, settings, said):
  with pytest.raises(ValueError, match=said):
    processor(tmp_path, **settings)


@FAMILIES
def test_refuses_frames_that_cannot_be_shown(tmp_path, family):
  ours = processor(tmp_path, family)
  with pytest.raises(ValueError, match="402 x 2 pixels: the longer side .* 200 times"):
    ours.process(video(noise(2, 402, 2)))


@pytest.mark.parametrize("family, frame", [("qwen2_5_vl", None), ("qwen3_vl", (1000, 1000))])
def test_coordinates_of_a_video_are_those_of_its_frames_as_shown(tmp_path, family, frame):
  """Every second of 20 frames, 10 a second; Qwen3-VL gives places in thousandths of any picture."""
  write(tmp_path / "config.json", model_type=family)
  ours = processor(tmp_path, family, do_sample_frames=True, fps=5, min_frames=2)
  clip = video(noise(20, 90, 120), fps=10)
  chosen, size = clips_of(tmp_path)(clip)
  np.testing.assert_array_equal(chosen, ours.chosen(clip))
  assert len(chosen) == 10
  assert size == (frame or ours.process(clip).size)


def test_a_text_model_is_shown_no_videos(tmp_path):
  write(tmp_path / "config.json", model_type="qwen3")
  assert clips_of(tmp_path) is None
