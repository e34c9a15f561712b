"""data/video.py: the right frames, true times, little memory and clear errors for any container.

Files are written here: each frame spells its own number in blocks that survive any codec.
"""

import logging
import socket
import subprocess
import sys
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from pixelis_jax.data import video
from pixelis_jax.data.video import Budget, choose, read_video, save_frames
from pixelis_jax.types import Video
from tests import fakes

BITS, BLOCK = 14, 16
H264 = {"codec": "libx264", "gop": 12}


def spelled(number: int) -> np.ndarray:
  """64 x 64 pixels: bit b is white or black in block b, row by row."""
  bits = np.array([number >> b & 1 for b in range(16)], np.uint8).reshape(4, 4) * 255
  return np.repeat(np.kron(bits, np.ones((BLOCK, BLOCK), np.uint8))[..., None], 3, axis=2)


def numbers(frames: np.ndarray) -> list[int]:
  """What the frames spell, whatever their size."""
  rows = (np.arange(4) + 0.5) * frames.shape[1] / 4
  columns = (np.arange(4) + 0.5) * frames.shape[2] / 4
  seen = frames[:, rows.astype(int)][:, :, columns.astype(int)].mean(3).reshape(-1, 16) > 127
  return (seen[:, :BITS] @ (1 << np.arange(BITS))).tolist()


def write(
  path,
  images,
  *,
  codec="libx264",
  fps=25,
  gop=None,
  ticks=None,
  display=None,
  options=None,
  flags=None,
):
  """A file of these pictures at `fps`, or each at its `ticks` of a millisecond."""
  rate = Fraction(1000) if ticks else Fraction(fps).limit_denominator(1001)
  with av.open(str(path), "w", options=flags or {}) as container:
    stream = container.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width = images[0].shape[:2]
    stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    if gop is not None:
      stream.codec_context.gop_size = gop
    if display is not None:
      stream.set_display_rotation(**display)
    for i, pixels in enumerate(images):
      frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
      frame.pts, frame.time_base = ticks[i] if ticks else i, 1 / rate
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def counting(path, count, **settings):
  return write(path, [spelled(i) for i in range(count)], **settings)


@pytest.fixture
def decoded(monkeypatch):
  """The number of frames decoded so far, in a list."""
  count = [0]
  frames = video._frames

  def counted(packets):
    for frame in frames(packets):
      count[0] += 1
      yield frame

  monkeypatch.setattr(video, "_frames", counted)
  return count


# Which frames


@pytest.mark.parametrize(
  "name, settings",
  [
    ("a.mp4", H264),  # Frames depend on later ones.
    ("a.mkv", H264),
    ("a.ts", H264),  # No index; its clock starts at 1.4 seconds, and seeking in it is vague.
    ("a.flv", H264),
    ("a.webm", {"codec": "libvpx-vp9", "gop": 30, "options": {"cpu-used": "8"}}),
    ("a.avi", {"codec": "mpeg4"}),
    ("a.mov", {"codec": "mjpeg"}),
    ("a.gif", {"codec": "gif"}),
  ],
)
def test_the_frames_are_those_of_fetch_video(tmp_path, name, settings):
  """smart_nframes and linspace of qwen_vl_utils.vision_process, at 25 frames a second."""
  path = counting(tmp_path / name, 190, **settings)
  clip = read_video(path)
  # 7.6 seconds at 2 a second are 15, of which 14 make pairs.
  expected = np.linspace(0, 189, 14).round().astype(int)
  assert numbers(clip.frames) == expected.tolist()
  np.testing.assert_allclose(clip.times, expected / 25, atol=1e-3)  # Clocks of milliseconds.
  every = read_video(path, Budget(fps=25.0, max_frames=190))
  assert numbers(every.frames) == list(range(190))
  few = read_video(path, Budget(max_frames=8))  # Farther apart: decoded after jumps.
  at = np.array(numbers(few.frames))
  np.testing.assert_allclose(few.times, at / 25, atol=1e-3)
  # A keyframe may stand in that is a quarter of the distance away.
  assert np.abs(at - np.linspace(0, 189, 8)).max() <= 189 / 7 / 4 + 0.5


@pytest.mark.parametrize(
  "frames, seconds, budget, count",
  [
    (250, 10.0, {}, 20),
    (250, 9.9999999, {}, 20),  # Floating point lost a bit.
    (250, 10.5, {}, 20),  # 21: whole pairs.
    (250, 10.0, {"fps": 0.5}, 4),  # 5: whole pairs.
    (250, 10.0, {"fps": 0.1}, 4),  # Never fewer of a short clip
    (250, 10.0, {"fps": 0.1, "max_frames": 3}, 2),  # unless one must.
    (250, 10.0, {"max_frames": 1}, 1),
    (30, 1.0, {}, 4),
    (3, 0.1, {}, 3),
    (21, 10.5, {}, 21),  # All fit: none is dropped to make pairs.
    (180_000, 7200.0, {}, 768),
    (180_000, 7200.0, {"max_frames": 10_000}, 10_000),
  ],
)
def test_how_many_frames(frames, seconds, budget, count):
  assert Budget(**budget).count(frames, seconds) == count


@pytest.mark.parametrize("wrong", [{"fps": 0.0}, {"fps": float("nan")}, {"max_frames": 0}])
def test_an_empty_budget_is_refused(wrong):
  (name,) = wrong
  with pytest.raises(ValueError, match=f"{name} {wrong[name]}"):
    Budget(**wrong)


def test_a_variable_rate_is_sampled_by_time(tmp_path):
  """A burst of 100 frames in a second, then one a second; by number the burst would have most."""
  ticks = [10 * i for i in range(100)] + [1000 * i for i in range(1, 20)]
  path = counting(tmp_path / "v.mkv", len(ticks), ticks=ticks, codec="libx264", gop=10)
  clip = read_video(path, Budget(fps=1.0))
  at = numbers(clip.frames)
  np.testing.assert_allclose(clip.times, np.array(ticks)[at] / 1000, atol=1e-6)
  # 19 seconds are 19 or 18 frames, a little over a second apart. By number 15 of 18 would be of the
  # burst.
  assert at[0] == 0 and at[-1] == len(ticks) - 1 and len(at) in (18, 19)
  assert (clip.times < 0.999).sum() == 1 and np.diff(clip.times).max() < 2.001


def test_a_frame_that_stays_is_read_once():
  """Slides: of eight wanted times six fall on the second."""
  times = np.array([0.0, 0.1, 0.2, 8.0, 8.1, 8.2, 8.3, 8.4, 8.5])
  # Wanted: 9 * 8 / 9 / 7 = 1.143 seconds apart; 0 | 1.14, 2.29, 3.43 | 4.57, 5.71, 6.86, 8.
  assert choose(times, 9.0, Budget(fps=1.0, max_frames=8)).tolist() == [0, 2, 3]


def test_a_keyframe_near_enough_stands_in_where_frames_are_far_apart():
  times, keys = np.arange(100) / 10, np.zeros(100, bool)
  keys[[0, 20, 38, 70]] = True
  four = Budget(max_frames=4)
  # Wanted: 0, 3.3, 6.6 and 9.9; keyframes at 3.8 and 7.0 are within 3.3 / 4, none is at the end.
  assert choose(times, 10.0, four, keys).tolist() == [0, 38, 70, 99]
  assert choose(times, 10.0, four).tolist() == [0, 33, 66, 99]
  # At a tenth of the time frames are 0.33 seconds apart: exact.
  assert choose(times / 10, 1.0, four, keys).tolist() == [0, 33, 66, 99]
  keys[[38, 70]] = False
  keys[42] = True  # 0.9 from 3.3 is more than a quarter.
  assert choose(times, 10.0, four, keys).tolist() == [0, 33, 66, 99]


# Long files


@pytest.fixture(scope="module")
def long(tmp_path_factory):
  """Two hours, a frame every two seconds, a keyframe every ten."""
  path = tmp_path_factory.mktemp("long") / "long.mp4"
  options = {"preset": "ultrafast", "sc_threshold": "0"}
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=Fraction(1, 2), options=options)
    stream.width = stream.height = 64
    stream.codec_context.gop_size = 5
    for i in range(3600):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(spelled(i), format="rgb24")))
    container.mux(stream.encode(None))
  return path


def test_of_two_hours_only_what_is_needed_is_decoded(long, decoded):
  clip = read_video(long, Budget(max_frames=32))
  assert len(clip.times) == decoded[0] == 32  # A keyframe each.
  np.testing.assert_allclose(clip.times, 2 * np.array(numbers(clip.frames)))
  # 7198 / 31 seconds apart, each at most 5 beside that, half the distance between keyframes; but
  # behind 7190 there is none.
  np.testing.assert_allclose(clip.times, np.linspace(0, 7198, 32), atol=8.001)


def test_two_hours_fit_in_memory(long):
  """One frame at a time beside the result: not a list of them, nor all 3600."""
  read_video(long, Budget(max_frames=8))  # Modules and their tables.
  tracemalloc.start()
  clip = read_video(long, Budget(max_frames=300))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert len(clip.times) == 300 and clip.times[-1] >= 7190
  # A second copy of the frames would take 3.7 MB more, all of the file's 44 MB; the index of 3600
  # frames takes 9 bytes each, and a few copies of that.
  assert clip.frames.nbytes == 300 * 64 * 64 * 3
  assert peak < clip.frames.nbytes + 1e6


# Size and orientation


def test_frame_sizes():
  assert Budget().size(20, 1080, 1920) == (665, 1182)  # sqrt(786,432 / 2,073,600) = 0.61584
  assert Budget().size(20, 480, 640) == (480, 640)  # Never larger than the source.
  # 235,929,600 pixels are 307,200 for each of 768: 640 x 480 is just allowed.
  assert Budget().size(768, 480, 640) == (480, 640)
  assert Budget().size(768, 960, 1280) == (480, 640)
  assert Budget(max_pixels=100).size(1, 1, 10_000) == (1, 1000)  # A side does not vanish.


def test_frames_are_shrunk_whole(tmp_path):
  path = counting(tmp_path / "a.mp4", 30, gop=12)
  clip = read_video(path, Budget(max_pixels=1024))
  assert clip.frames.shape == (4, 32, 32, 3)
  assert numbers(clip.frames) == [0, 10, 19, 29]


@pytest.mark.parametrize("codec", ["libx264", "mjpeg"])
def test_colours_are_rgb(tmp_path, codec):
  """A video's limited range and a photo's full one are told apart."""
  colours = [
    (250, 20, 20),
    (20, 200, 40),
    (30, 40, 220),
    (128, 128, 128),
    (250, 250, 250),
    (5, 5, 5),
  ]
  painted = [np.full((64, 64, 3), colour, np.uint8) for colour in colours]
  path = write(tmp_path / "a.mov", painted, codec=codec)
  found = read_video(path, Budget(fps=25.0)).frames[:, 32, 32].astype(int)
  # Rounding to 8 bits of luma and chroma, and the codec's: 3 at most. Limited range read as full
  # would make of 250 230, full read as limited of 250 255 and of 5 0.
  np.testing.assert_allclose(found, colours, atol=4)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_frames_are_upright(tmp_path, quarters, mirrored):
  """As a phone writes them: pixels as its sensor has them, and how to turn these."""
  stored = spelled(0b0000_0001_0000_1101)[:32]  # Two rows of blocks: no symmetry, and not square.
  display = {"degrees": 90 * quarters, "hflip": mirrored}  # Counter-clockwise, then mirrored.
  path = write(tmp_path / "a.mp4", [stored] * 2, display=display)
  upright = np.rot90(stored, quarters)
  upright = upright[:, ::-1] if mirrored else upright
  (frame, _) = read_video(path).frames
  np.testing.assert_array_equal(frame > 127, upright > 127)


# What is wrong with a file


def song(path, cover=None):
  """A tenth of a second of silence, and a picture of the album."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=8000)
    if cover is not None:
      picture = container.add_stream("mjpeg")
      picture.height, picture.width = cover.shape[:2]
      picture.pix_fmt, picture.disposition = "yuvj420p", Disposition.attached_pic
      container.mux([*picture.encode(av.VideoFrame.from_ndarray(cover)), *picture.encode(None)])
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    sound.rate = 8000
    container.mux([*stream.encode(sound), *stream.encode(None)])


def test_what_cannot_be_read_is_named(tmp_path):
  whole = counting(tmp_path / "a.mp4", 30).read_bytes()
  song(tmp_path / "song.m4a")
  song(tmp_path / "covered.mp4", cover=spelled(1))
  write(tmp_path / "raw.h264", [spelled(0)] * 3)
  files = {
    "empty.mp4": b"",
    "text.mp4": b"This is no video. " * 40,
    "headless.mp4": whole[: len(whole) // 2],  # The index is at the end.
    "codec.mp4": whole.replace(b"avc1", b"zzzz"),
  }
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  (tmp_path / "none").mkdir()
  wrong = {
    "no.mp4": (FileNotFoundError, "there is no video .*no.mp4"),
    "empty.mp4": (ValueError, "video .*empty.mp4 cannot be read: Invalid data"),
    "text.mp4": (ValueError, "video .*text.mp4 cannot be read: Invalid data"),
    "headless.mp4": (ValueError, "video .*headless.mp4 cannot be read: Invalid data"),
    "codec.mp4": (ValueError, "codec.mp4 is in a format that PyAV .* cannot decode"),
    "song.m4a": (ValueError, "song.m4a has no video stream"),
    "covered.mp4": (ValueError, "covered.mp4 has no video stream"),
    "raw.h264": (ValueError, "raw.h264 holds no frame with a time"),
    "none": (ValueError, "none holds no frames: files in .bmp, "),
  }
  for name, (kind, said) in wrong.items():
    with pytest.raises(kind, match=said):
      read_video(tmp_path / name)
  with pytest.raises(ValueError, match="a.mp4 has its own times: rate 5 is for a folder"):
    read_video(tmp_path / "a.mp4", rate=5.0)


@pytest.mark.parametrize(
  "name, settings",
  [
    ("a.mkv", H264),
    # The index comes first and tells of all frames; the decoder would make up half of the last one.
    ("a.mov", {"codec": "mjpeg", "flags": {"movflags": "faststart"}}),
  ],
)
def test_of_a_file_that_is_cut_off_the_beginning_is_read(tmp_path, caplog, name, settings):
  whole = counting(tmp_path / name, 250, **settings)
  cut = tmp_path / f"cut_{name}"
  with av.open(str(whole)) as container:
    packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
  at, size = packets[150]
  cut.write_bytes(whole.read_bytes()[: at + size // 2])
  with caplog.at_level(logging.WARNING):
    assert read_video(whole).times[-1] > 9.9 and not caplog.records
    clip = read_video(cut, Budget(fps=25.0))
  # Of the last frames in an h264 file the one is stored first that the others refer to.
  spelled_out, sure = numbers(clip.frames), 145 if settings["codec"] == "libx264" else 150
  assert len(spelled_out) == 150 and spelled_out[:sure] == list(range(sure))
  np.testing.assert_allclose(clip.times, np.array(spelled_out) / 25, atol=1e-3)
  (record,) = caplog.records
  left = (spelled_out[-1] + 1) / 25
  assert f"cut_{name} is cut off: {left:.1f} of 10.0 seconds are there" in record.getMessage()


def test_damage_in_the_middle_costs_what_is_damaged(tmp_path, caplog):
  path = counting(tmp_path / "a.mp4", 250, codec="mjpeg")
  with av.open(str(path)) as container:
    places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
  broken = bytearray(path.read_bytes())
  for at, size in places[100:110]:
    broken[at : at + size] = bytes(size)
  path.write_bytes(broken)
  with caplog.at_level(logging.WARNING):
    clip = read_video(path, Budget(fps=25.0))
  assert "a.mp4 is damaged: 240 of 250 frames can be read" in caplog.text
  expected = [i for i in range(250) if not 100 <= i < 110]
  assert numbers(clip.frames) == expected
  np.testing.assert_allclose(clip.times, np.array(expected) / 25, atol=1e-6)
  for at, size in places:
    broken[at : at + size] = bytes(size)
  path.write_bytes(broken)
  with pytest.raises(ValueError, match="a.mp4: none of its 250 frames can be decoded"):
    read_video(path)


def test_a_stream_that_begins_late_ends_the_file():
  """PyAV 18.1 raises there, depending on what lies behind a table of its own."""

  class Container:
    def demux(self, stream):
      yield "packet"
      raise IndexError("list index out of range")

  assert list(video._demuxed(Container(), None)) == ["packet"]


def test_a_playlist_does_not_reach_the_net(tmp_path):
  """Requests name files, and a file may name addresses inside the operator's network.

  FFmpeg lets what it opened as a file open files only.
  """
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
    path = tmp_path / "list.m3u8"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="list.m3u8 cannot be read"):
      read_video(path)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
      server.accept()


def test_a_name_is_not_a_protocol(tmp_path, monkeypatch):
  counting(tmp_path / "data:a.mp4", 4)
  monkeypatch.chdir(tmp_path)
  assert numbers(read_video("data:a.mp4").frames) == [0, 1, 2, 3]


# Folders


def folder(path, count, name="{}.png"):
  path.mkdir()
  for i in range(count):
    Image.fromarray(spelled(i)).save(path / name.format(i))
  return path


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
  path = folder(tmp_path / "walk", 12, "f{}_x.png")  # f10 after f9, not after f1.
  (path / "notes.txt").write_text("no frame")
  (path / ".hidden.png").write_text("nor this")
  clip = read_video(path)
  assert numbers(clip.frames) == list(range(12))
  assert clip.times.tolist() == [i / 2 for i in range(12)]  # fetch_video's rate for such lists.
  # 3 seconds at 4 a second give 6 of them: nearest to 0, 0.55, 1.1, 1.65, 2.2 and 2.75.
  assert read_video(path, rate=4.0).times.tolist() == [0, 0.5, 1, 1.75, 2.25, 2.75]


@pytest.mark.parametrize(
  "name, rate", [("walk_12.5fps", 12.5), ("8FPS", 8.0), ("a 10 fps b", 10.0), ("fps", 2.0)]
)
def test_the_name_tells_the_rate(tmp_path, name, rate):
  clip = read_video(folder(tmp_path / name, 5), Budget(fps=100.0))
  np.testing.assert_allclose(clip.times, np.arange(5) / rate, rtol=1e-6)


def test_saved_frames_come_back_bit_for_bit(tmp_path):
  frames = np.stack([fakes.image(11, 13, seed=i) for i in (0, 1, 0, 2, 3)])
  times = np.array([0.1, 0.2, 1 / 3, 7, 7.125], np.float32)
  save_frames(tmp_path / "deep" / "v_9fps", Video(frames=frames, times=times))
  back = read_video(tmp_path / "deep" / "v_9fps", Budget(fps=100.0))
  np.testing.assert_array_equal(back.frames, frames)
  assert back.times.dtype == np.float32 and back.times.tolist() == times.tolist()
  again = read_video(tmp_path / "deep" / "v_9fps", Budget(fps=100.0), rate=1.0)
  assert again.times.tolist() == [0, 1, 2, 3, 4]  # What the caller says holds.


@pytest.mark.parametrize(
  "content, said",
  [
    ("[0, 1", "times.json is not JSON"),
    ("[0, 1]", "times.json must be a list of 3 rising seconds"),
    ("[0, 2, 1]", "must be a list of 3 rising"),
    ("[-1, 0, 1]", "must be a list of 3 rising"),
    ("[0, 1, Infinity]", "must be a list of 3 rising"),
    ('[0, 1, "2"]', "must be a list of 3 rising"),
    ("{}", "must be a list of 3 rising"),
  ],
)
def test_wrong_times_are_refused(tmp_path, content, said):
  path = folder(tmp_path / "f", 3)
  (path / "times.json").write_text(content)
  with pytest.raises(ValueError, match=said):
    read_video(path)


def test_a_folder_with_a_frame_that_does_not_fit_is_refused(tmp_path):
  path = folder(tmp_path / "f", 3)
  Image.fromarray(fakes.image(5, 7)).save(path / "2.png")
  with pytest.raises(ValueError, match="frame .*2.png is 5 x 7 pixels, the folder's first 64 x 64"):
    read_video(path)
  (path / "2.png").write_text("no picture")
  with pytest.raises(ValueError, match="image .*2.png cannot be read"):
    read_video(path)
  with pytest.raises(ValueError, match="rate 0 must be a positive number of frames a second"):
    read_video(path, rate=0.0)


def test_importing_this_imports_no_decoder():
  code = "import sys, pixelis_jax.data.video; sys.exit('av' in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)
