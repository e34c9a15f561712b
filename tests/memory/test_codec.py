"""memory/codec.py: what comes back is what went in, or a ValueError."""

import dataclasses

import numpy as np
import pytest

from pixelis_jax.memory import codec
from pixelis_jax.types import Patches
from tests.memory.experiences import experience, plain, process


def test_roundtrip_is_exact():
  original = experience()
  restored = codec.restore(codec.encode(original), process)
  assert plain(restored) == plain(original)


def test_encoding_is_deterministic():
  assert codec.encode(experience()) == codec.encode(experience())


def test_an_experience_without_an_answer_or_trajectories():
  original = dataclasses.replace(experience(answer=None), trajectories=())
  assert plain(codec.restore(codec.encode(original), process)) == plain(original)


def test_what_the_samples_share_is_stored_and_processed_once():
  one = dataclasses.replace(experience(), trajectories=experience().trajectories[:1])
  eight = dataclasses.replace(one, trajectories=one.trajectories * 8)
  # Two task images and one crop, however many samples saw them.
  assert codec.encode(eight).count(b"\x89PNG\r\n") == 3
  calls = []

  def counted(pixels):
    calls.append(pixels.shape)
    return process(pixels)

  restored = codec.restore(codec.encode(eight), counted)
  assert sorted(calls) == [(6, 7, 3), (12, 10, 3), (12, 10, 3)]
  assert len({id(t.task) for t in restored.trajectories}) == 1


def test_patches_are_not_stored():
  # Two trajectories with two images each, 2 x 12 x 10 x 3 floats of 4 bytes a piece: 11.5 KB.
  original = experience()
  one = original.trajectories[0].steps[0].completion.context.images[0].patches
  assert one.nbytes == 2880
  assert one.tobytes()[:64] not in codec.encode(original)
  assert len(codec.encode(original)) < 4 * one.nbytes


def test_another_image_processor_is_refused():
  def other(pixels):
    made = process(pixels)
    return Patches(patches=made.patches, grid=made.grid, size=made.size, key="0" * 32)

  with pytest.raises(ValueError, match="restore with the processor settings"):
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
  with pytest.raises(ValueError, match="format version 9, this code reads version 1"):
    codec.restore(data[:4] + bytes([9]) + data[5:], process)


def test_a_segment_whose_images_were_never_shown_is_refused():
  original = experience()
  first = original.trajectories[0]
  with pytest.raises(ValueError, match="step 0 of .*'r1': its segment has 0 images, 2 were shown"):
    swapped = dataclasses.replace(first, steps=first.steps[::-1])
    codec.encode(dataclasses.replace(original, trajectories=(swapped,)))


def test_restored_arrays_are_writable_and_native():
  restored = codec.restore(codec.encode(experience()), process)
  tokens = restored.trajectories[0].steps[0].completion.tokens
  assert tokens.flags.writeable and tokens.dtype == np.int32 and tokens.dtype.isnative
