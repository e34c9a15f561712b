import numpy as np
import pytest

from pixelis_jax.chat.messages import Clip, read_messages

TEXT = {"type": "text", "text": "7?"}
IMAGE = {"type": "image", "image": "a.png"}
VIDEO = {"type": "video", "video": ["0.png", "1.png", "2.png"], "fps": 4}


def user(*parts):
  return [{"role": "user", "content": list(parts)}]


def test_what_is_shown_keeps_its_order():
  turns, shown = read_messages([*user(VIDEO, TEXT, IMAGE), *user(IMAGE, VIDEO | {"fps": 0.5})])
  clip = ("0.png", "1.png", "2.png")
  assert shown == [Clip(clip, 4.0), "a.png", "a.png", Clip(clip, 0.5)]
  assert turns[0]["content"] == [{"type": "video"}, TEXT, {"type": "image"}]


def test_a_clip_is_read_frame_by_frame():
  shades = {"a": 1, "b": 2, "c": 3}
  video = Clip(("b", "a", "c"), 8.0).read(lambda name: np.full((2, 3, 3), shades[name], np.uint8))
  assert video.frames[:, 0, 0, 0].tolist() == [2, 1, 3]
  assert video.times.tolist() == [0, 0.125, 0.25]


def test_frames_of_a_clip_have_one_size():
  sizes = {"a": (2, 3, 3), "b": (3, 2, 3)}
  with pytest.raises(ValueError, match="frame b is 3 x 2 pixels, the video's first 2 x 3"):
    Clip(("a", "b"), 1.0).read(lambda name: np.zeros(sizes[name], np.uint8))


@pytest.mark.parametrize(
  "messages, said",
  [
    ({}, "must be a list of at least one message"),
    ([], "must be a list of at least one message"),
    (["hi"], "message 1 must be an object with the keys"),
    ([{"role": "user"}], "message 1 lacks .*content"),
    ([{"role": "me", "content": ""}], "message 1: role 'me' must be one of"),
    ([{"role": "user", "content": 7}], "message 1: content must be a text or a list of parts"),
    (user(TEXT, {"type": "audio"}), 'message 1, part 2 .* "text", "image" or "video"'),
    (user(IMAGE | {"fps": 1}), "message 1, part 1 has unknown keys .*fps"),
    (user({"type": "image", "image": ["a"]}), "part 1: image must be a string"),
    (user({"type": "video", "video": ["a"]}), "part 1 lacks .*fps"),
    (user(VIDEO | {"video": "a.mp4"}), "video must be a list of at least one frame's name"),
    (user(VIDEO | {"video": []}), "video must be a list of at least one frame's name"),
    (user(VIDEO | {"video": ["a", 1]}), "video must be a list of at least one frame's name"),
    (user(VIDEO | {"fps": 0}), "fps must be a positive number, not 0"),
    (user(VIDEO | {"fps": True}), "fps must be a positive number, not True"),
    (user(VIDEO | {"fps": "2"}), "fps must be a positive number, not '2'"),
    (user(VIDEO | {"fps": float("inf")}), "fps must be a positive number, not inf"),
  ],
)
def test_other_forms_are_named(messages, said):
  with pytest.raises(ValueError, match=said):
    read_messages(messages)
