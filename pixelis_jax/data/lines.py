"""A record of a dataset for people: a line of JSON, its pictures and films as files beside it.

Its fields are those of a question (data/questions.py), so that evaluation, RFT and the request
stream read the same file, and sort, weight, difficulty and turns.
"""

import json

from pixelis_jax.data.difficulty import difficulty
from pixelis_jax.data.examples import Record
from pixelis_jax.data.video import TIMES_FILE
from pixelis_jax.memory.values import Writer, box_to_json, pixels_key
from pixelis_jax.types import DemoTurn, Mask, Picture, Pixels, Task, Video, content_key


def line(record: Record, writer: Writer, files: dict[str, bytes]) -> dict:
  """What the line says; `files` gets the files it names, by relative path.

  Args:
    writer: of the record's images, so that none is made into a PNG twice.
  """
  task = record.demo.task
  images, videos = shown(task)
  for name, pixels in zip(images, task.images, strict=True):
    files[name] = _png(pixels, writer)
  for name, video in zip(videos, task.videos, strict=True):
    files |= {f"{name}/{i:06d}.png": _png(frame, writer) for i, frame in enumerate(video.frames)}
    files[f"{name}/{TIMES_FILE}"] = json.dumps(video.times.tolist()).encode()
  return {
    "request_id": task.id,
    "question": task.question,
    "answer": task.answer,
    "kind": task.kind,
    "sort": record.sort,
    "weight": record.weight,
    "difficulty": difficulty(record.demo),
    "images": images,
    "videos": [_clip(name, video) for name, video in zip(videos, task.videos, strict=True)],
    "boxes": [box_to_json(box) for box in task.boxes],
    "turns": [_turn(turn, writer, files) for turn in record.demo.turns],
  }


def shown(task: Task) -> tuple[list[str], list[str]]:
  """Names of its images and of its videos: equal names, equal content."""
  return [_image(pixels) for pixels in task.images], [_film(video) for video in task.videos]


def _turn(turn: DemoTurn, writer: Writer, files: dict[str, bytes]) -> dict:
  told = {"text": turn.text, "supervised": turn.supervised}
  if turn.result is None:
    return told
  pictures = []
  for picture in turn.result.images:
    name = _image(picture.pixels)
    files[name] = _png(picture.pixels, writer)
    pictures.append({"path": name, **_place(picture)})
  return told | {
    "result": turn.result.text,
    "error": turn.result.error,
    "images": pictures,
    "masks": [_place(mask) for mask in turn.result.masks],
  }


def _image(pixels: Pixels) -> str:
  return f"images/{pixels_key(pixels)}.png"


def _film(video: Video) -> str:
  frames = content_key(repr(video.frames.shape), video.frames.tobytes(), video.times.tobytes())
  return f"videos/{frames}"


def _png(pixels: Pixels, writer: Writer) -> bytes:
  return writer.blobs[writer.image(pixels)]


def _clip(name: str, video: Video) -> dict:
  """The field that reads all of its frames again."""
  count, seconds = len(video.times), float(video.times[-1] - video.times[0])
  return {"path": name} | ({"fps": (count + 1) / seconds} if count > 1 else {})


def _place(of: Picture | Mask) -> dict:
  place = {"source": of.source, "box": box_to_json(of.box)}
  return place if of.frame is None else place | {"frame": of.frame}
