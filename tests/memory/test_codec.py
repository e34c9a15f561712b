"""memory/codec.py: what comes back is what went in, or a ValueError."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pixelis_jax.chat.template import Chat
from pixelis_jax.memory import codec
from pixelis_jax.types import Box, Mask, Picture, Step, Task, ToolResult, Video
from tests.memory.experiences import (
  completion,
  experience,
  pixels,
  plain,
  process,
  trajectory,
  video,
)

ASSETS = Path(__file__).parents[2] / "assets" / "tiny-vl"


def test_roundtrip_is_exact():
  original = experience()
  restored = codec.restore(codec.encode(original), process)
  assert plain(restored) == plain(original)


def test_what_a_real_chat_was_shown_is_made_again():
  """As the online loop restores it: `Chat.patches` is the process for images and for videos."""
  chat = Chat.from_directory(ASSETS, tools=())
  clip = Video(frames=np.stack([pixels(40, 56, i) for i in range(4)]), times=video(1, 1, 0).times)
  task = Task(id="r", images=(pixels(70, 50, 9),), question="?", answer=None, videos=(clip,))
  frame = Picture(pixels=clip.frames[1], source=0, box=Box(0.0, 0.0, 56.0, 40.0), frame=1)
  result = ToolResult(text="here", images=(frame,))
  told = [completion((), "", i) for i in range(2)]
  steps = (
    Step(completion=dataclasses.replace(told[0], context=chat.prompt(task)), result=result),
    Step(completion=dataclasses.replace(told[1], context=chat.result(result))),
  )
  only = dataclasses.replace(experience().trajectories[0], task=task, steps=steps)
  original = dataclasses.replace(experience(), trajectories=(only,))
  restored = codec.restore(codec.encode(original), chat.patches)
  assert plain(restored) == plain(original)
  image, shown = restored.trajectories[0].steps[0].completion.context.images
  assert image.interval is None and shown.interval is not None


def test_encoding_is_deterministic():
  assert codec.encode(experience()) == codec.encode(experience())


def test_an_experience_without_an_answer_or_trajectories():
  original = dataclasses.replace(experience(answer=None), trajectories=())
  assert plain(codec.restore(codec.encode(original), process)) == plain(original)


def test_what_the_samples_share_is_stored_and_processed_once():
  one = dataclasses.replace(experience(), trajectories=experience().trajectories[:1])
  eight = dataclasses.replace(one, trajectories=one.trajectories * 8)
  # Two task images, one crop and three different frames, however many samples saw them; the picture
  # of a whole frame is one of these.
  assert codec.encode(eight).count(b"\x89PNG\r\n") == 6
  calls = []

  def counted(shown):
    calls.append(shown.frames.shape if isinstance(shown, Video) else shown.shape)
    return process(shown)

  restored = codec.restore(codec.encode(eight), counted)
  assert sorted(calls) == [(4, 4, 5, 3), (4, 5, 3), (6, 7, 3), (12, 10, 3), (12, 10, 3)]
  assert len({id(t.task) for t in restored.trajectories}) == 1


def test_videos_of_the_same_frames_at_other_times_are_two():
  original = experience()
  (first,) = original.trajectories[0].task.videos
  slower = Video(frames=first.frames, times=first.times * 2)
  task = dataclasses.replace(original.trajectories[0].task, videos=(first, slower, first))
  step = Step(completion=completion((*task.images, *task.videos), "hm", 0))
  only = dataclasses.replace(original.trajectories[0], task=task, steps=(step,))
  original = dataclasses.replace(original, trajectories=(only,))
  data = codec.encode(original)
  assert data.count(b"\x89PNG\r\n") == 5  # Two images and three frames.
  restored = codec.restore(data, process)
  assert plain(restored) == plain(original)
  one, other, again = restored.trajectories[0].task.videos
  assert one is again and one is not other


def test_masks_take_a_bit_a_pixel():
  """A mask of a whole photo is among the largest things in an experience."""
  original = experience()
  box = Box(0.0, 0.0, 1000.0, 800.0)
  inside = np.random.default_rng(0).random((800, 1000)) < 0.5
  big = Mask(inside=inside, source=0, box=box)

  def masked(*masks):
    first = original.trajectories[0]
    result = dataclasses.replace(first.steps[0].result, masks=masks)
    steps = (dataclasses.replace(first.steps[0], result=result), *first.steps[1:])
    trajectory = dataclasses.replace(first, steps=steps)
    return codec.encode(dataclasses.replace(original, trajectories=(trajectory,)))

  # 100,000 bytes of bits and a line of JSON; as bytes they would be 800,000.
  assert 100_000 < len(masked(big)) - len(masked()) < 100_300


def test_patches_are_not_stored():
  # Their floats, 8 bytes a byte of pixels, are many times the rest: of one large image alone.
  original = experience()
  task = dataclasses.replace(original.trajectories[0].task, images=(pixels(40, 50, 0),), videos=())
  step = Step(completion=completion(task.images, "hm", 0))
  only = dataclasses.replace(original.trajectories[0], task=task, steps=(step,))
  data = codec.encode(dataclasses.replace(original, trajectories=(only,)))
  floats = step.completion.context.images[0].patches
  assert floats.nbytes == 8 * 40 * 50 * 3
  assert floats.tobytes()[:64] not in data
  assert len(data) < floats.nbytes / 4


@pytest.mark.parametrize("change", [{"key": "0" * 32}, {"grid": (2, 1, 1)}, {"size": (1, 1)}])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_another_processor_is_refused(kind, change):
  def other(shown):
    made = process(shown)
    return dataclasses.replace(made, **change) if isinstance(shown, Video) == of_video else made

  of_video = kind == "video"
  said = f"the {kind} processor gives .* restore with the processor settings"
  with pytest.raises(ValueError, match=said):
    codec.restore(codec.encode(experience()), other)


def test_a_video_sampled_otherwise_is_refused():
  """The same frames, told at another rate: positions in time would differ from those seen."""

  def other(shown):
    made = process(shown)
    return made if made.interval is None else dataclasses.replace(made, interval=0.5)

  with pytest.raises(ValueError, match="the video processor gives .*'interval': 0.5"):
    codec.restore(codec.encode(experience()), other)


def test_every_truncation_and_every_flipped_byte_is_refused():
  data = codec.encode(experience())
  for end in [*range(0, 40), len(data) // 2, len(data) - 1]:
    with pytest.raises(ValueError):
      codec.restore(data[:end], process)
  for at in [*range(17), *range(17, len(data), 97), len(data) - 1]:
    garbled = bytearray(data)
    garbled[at] ^= 0x40
    with pytest.raises(ValueError):
      codec.restore(bytes(garbled), process)
  with pytest.raises(ValueError, match="truncated or garbled"):
    codec.restore(data + b"x", process)


def test_messages_say_what_is_wrong():
  data = codec.encode(experience())
  with pytest.raises(ValueError, match="not an encoded experience: 5 bytes starting b'hello'"):
    codec.restore(b"hello", process)
  with pytest.raises(ValueError, match="format version 9, this code reads version 3"):
    codec.restore(data[:4] + bytes([9]) + data[5:], process)


def test_a_segment_whose_images_were_never_shown_is_refused():
  original = experience()
  first = original.trajectories[0]
  with pytest.raises(ValueError, match="step 0 of .*'r1': its segment has 0 images, 3 were shown"):
    swapped = dataclasses.replace(first, steps=first.steps[::-1])
    codec.encode(dataclasses.replace(original, trajectories=(swapped,)))


def test_restored_arrays_are_writable_and_native():
  restored = codec.restore(codec.encode(experience()), process)
  tokens = restored.trajectories[0].steps[0].completion.tokens
  assert tokens.flags.writeable and tokens.dtype == np.int32 and tokens.dtype.isnative


def test_looks_are_kept_and_share_what_they_have():
  """The two looks were shown the task's pictures, which are stored once with the samples'."""
  original = experience()
  task = original.trajectories[0].task
  looks = trajectory(task, "3", 20), trajectory(task, None, 30)
  seen = dataclasses.replace(original, looks=looks)
  data = codec.encode(seen)
  assert plain(codec.restore(data, process)) == plain(seen)
  # One more picture each: what its call showed.
  pictures = lambda record: record.count(b"\x89PNG\r\n")
  assert pictures(data) == pictures(codec.encode(original)) + 2
