"""Does each kind of question need its tool? Scripted solvers with and without what it shows.

    python benchmarks/need.py --n 60 --seed 1 --out runs/need

A solver writes the calls that data/kinds has for its kind, reads the answer from what the tools
return, and knows the truth only as far as an overview shows it: where what is asked for lies. Arms,
on the same puzzles:
  tools      as in demonstrations
  overview   the same on what a policy is shown at first: pictures as large as the processor in
             --model makes them; of films as many frames as qwen_vl_utils.fetch_video takes
  elsewhere  its places are moved to random ones of the same size, its times to random ones
  exact      tools that say the truth: what the question and the solver are good for
In digit scenes nearest neighbours read what a zoom shows: of crops, or in `overview` of the patch
around the place that is asked about, each from 3,000 scenes of other handwriting.
chance is the share of the most frequent answer; where the question names its answers, guessing has
a half (larger) or a third (moved, hidden). Accuracy with 95% Wilson intervals; seconds of wall
time a question in the arm `tools`, one process. The overview bounds these tools, not a policy: one
that learned may see more in it, or less.
--pictures holds what scripts/fetch_pictures.py fetches. Kinds were adjusted on split dev, seed 7.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from readability import crop, readers  # The files beside this one.
from readability import overview as patch
from record import record
from sklearn.base import ClassifierMixin

from pixelis_jax.algo.answers import equal
from pixelis_jax.chat.family import frame_of, images_of
from pixelis_jax.chat.videos import clips_of
from pixelis_jax.data import digits, pictures, scenes, sorts, video
from pixelis_jax.data.composites import tight
from pixelis_jax.data.kinds import KINDS, PuzzleSource
from pixelis_jax.data.kinds.puzzle import Look, Puzzle
from pixelis_jax.data.tasks import TaskSource
from pixelis_jax.metrics import interval
from pixelis_jax.tools import TOOLS, Toolbox, places
from pixelis_jax.tools.sight import Shown, Sight
from pixelis_jax.tools.views import IDENTITY, View
from pixelis_jax.types import Box, Mask, Pixels, Task, ToolCall, ToolResult, Video

TAUGHT = 3000  # Scenes that a reader of digits has seen.
ARMS = ("tools", "overview", "elsewhere", "exact")
Shrink = Callable[[int, int], tuple[int, int]]


def overview(puzzle: Puzzle, size: Shrink) -> Puzzle:
  """The puzzle as it is shown at first, with its places in those pixels."""
  task = puzzle.task
  images = tuple(_shrunk(image, size) for image in task.images)
  clips = tuple(_few(clip, size) for clip in task.videos)
  before = task.images[0] if task.images else task.videos[0].frames[0]
  after = images[0] if images else clips[0].frames[0]
  down, across = np.array(after.shape[:2]) / before.shape[:2]

  def moved(look: Look) -> Look:
    box = look.box
    # Whole pixels: how large a thing is must not be told more exactly than it is shown.
    low = math.floor(box.x0 * across), math.floor(box.y0 * down)
    high = math.ceil(box.x1 * across), math.ceil(box.y1 * down)
    return dataclasses.replace(look, box=Box(*map(float, (*low, *high))))

  return dataclasses.replace(
    puzzle,
    task=dataclasses.replace(task, images=images, videos=clips),
    looks=tuple(map(moved, puzzle.looks)),
  )


def _shrunk(pixels: Pixels, size: Shrink) -> Pixels:
  height, width = size(*pixels.shape[:2])
  return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _few(clip: Video, size: Shrink) -> Video:
  seconds = float(clip.times[-1] + clip.times[1])
  chosen = video.choose(clip.times.astype(np.float64), seconds, video.DEFAULT)
  frames = np.stack([_shrunk(clip.frames[i], size) for i in chosen])
  return Video(frames=frames, times=clip.times[chosen])


def elsewhere(puzzle: Puzzle, rng: np.random.Generator) -> Puzzle:
  """With other places and times for what is asked for."""
  task = puzzle.task
  shape = task.images[0].shape if task.images else task.videos[0].frames.shape[1:]

  def moved(look: Look) -> Look:
    x = rng.uniform(0, shape[1] - look.box.width)
    y = rng.uniform(0, shape[0] - look.box.height)
    time = look.time
    if time:  # Those that begin a film stay: only there is something to be followed.
      time = float(rng.uniform(0, task.videos[0].times[-1]))
    box = Box(x, y, x + look.box.width, y + look.box.height)
    return dataclasses.replace(look, box=box, time=time)

  return dataclasses.replace(puzzle, looks=tuple(map(moved, puzzle.looks)))


class Exact(Toolbox):
  """Tools that say what is true of a puzzle, in the words in which the real ones say it.

  Pictures are those of the real ones.
  """

  def __init__(self, puzzle: Puzzle, like: Toolbox):
    super().__init__(
      tuple(TOOLS["qwen"]), shown_size=like.shown_size, shown_frames=like.shown_frames
    )
    self._puzzle = puzzle

  def run(
    self, call: ToolCall, task: Task, results: Sequence[ToolResult], view: View = IDENTITY
  ) -> ToolResult:
    say = {
      "segment_object_at": self._segment,
      "get_properties": self._measure,
      "read_text": self._read,
      "track_object": self._track,
    }.get(call.name)
    if say is None:
      return super().run(call, task, results, view)
    sight = Sight(task=task, results=results, shown_size=self.shown_size, view=view)
    if "mask" in call.arguments:
      box, shown = places.mask(sight, call.arguments["mask"]).box, sight.shown()[0]
    else:
      shown = places.pick(sight, call.arguments.get("image", 1), "image")
      box = places.box(call.arguments, shown)
    return say(sight, shown, box)

  def _segment(self, sight: Sight, shown: Shown, box: Box) -> ToolResult:
    whole = max(self._puzzle.objects, key=lambda o: o.box.iou(box)).whole
    found = tight(whole)
    rows, columns = slice(int(found.y0), int(found.y1)), slice(int(found.x0), int(found.x1))
    mask = Mask(inside=np.ascontiguousarray(whole[rows, columns]), source=0, box=found)
    text = f"Mask {len(sight.masks()) + 1}: {int(whole.sum()):,} pixels, box"
    return ToolResult(text=text, masks=(mask,))

  def _measure(self, sight: Sight, shown: Shown, box: Box) -> ToolResult:
    found = max(self._puzzle.objects, key=lambda o: o.box.iou(box))
    return ToolResult(text=f"Colour: {found.color} 100%; mean\nShape: {found.name};")

  def _read(self, sight: Sight, shown: Shown, box: Box) -> ToolResult:
    lines = self._puzzle.lines
    if shown.frame is not None:  # One line a second.
      lines = (lines[int(sight.task.videos[0].times[shown.frame])],)
    held = [line for line in lines if box.holds(line.box)]
    rows = [f"{places.told(shown, line.box)} 1.00 {line.text}" for line in held]
    return ToolResult(text="\n".join([f"{len(rows)} lines:", *rows]))

  def _track(self, sight: Sight, shown: Shown, box: Box) -> ToolResult:
    masks = max(self._puzzle.tracks, key=lambda t: t.masks[0].box.iou(box)).masks
    first, last = (places.told(shown, masks[i].box) for i in (0, -1))
    across, down = ((last[i] + last[i + 2] - first[i] - first[i + 2]) / 2 for i in (0, 1))
    far = round(float(np.hypot(across, down)))
    return ToolResult(
      text=f"1 s: seen at {last}\nBy 1 s it had moved there: {far} in a straight line."
    )


def asked(puzzle: Puzzle, arm: str, tools: Toolbox, size: Shrink, seed: int) -> str:
  """What the solver answers in an arm."""
  rng = np.random.default_rng(seed)
  if arm == "overview":
    puzzle = overview(puzzle, size)
  elif arm == "elsewhere":
    puzzle = elsewhere(puzzle, rng)
  elif arm == "exact":
    tools = Exact(puzzle, tools)
  return sorts.solve(puzzle, KINDS[puzzle.task.kind], rng, tools).answer


def row(source: PuzzleSource, n: int, tools: Toolbox, size: Shrink) -> dict:
  """One kind's line of the table."""
  right, spent, answers = Counter(), [], []
  for i in range(n):
    puzzle = source.puzzle(i)
    answers.append(puzzle.task.answer)
    for arm in ARMS:
      started = time.perf_counter()
      said = asked(puzzle, arm, tools, size, seed=i)
      if arm == "tools":
        spent.append(time.perf_counter() - started)
      right[arm] += equal(said, puzzle.task.answer)
  (kind,) = source.kinds
  return _found(kind, n, right, spent, answers)


def _found(kind: str, n: int, right: Counter, spent: list[float], answers: list[str]) -> dict:
  found = {"kind": kind, "n": n, "seconds": float(np.median(spent))}
  found["chance"] = Counter(answers).most_common(1)[0][1] / n
  for arm in ARMS:
    found[arm] = [right[arm] / n, *interval(right[arm], n)]
  return found


def digit_row(kind: str, split: str, seed: int, n: int) -> dict:
  """One kind's line, of digit scenes: crops and overviews are read, each by a reader of its own."""
  told = dict(zip(pictures.SPLITS, digits.SPLITS, strict=True))[split]
  source = TaskSource(split=told, seed=seed, kinds=(kind,), size=n)
  of_crops, of_patches = _taught(crop), _taught(patch)
  rng, right, spent, answers = np.random.default_rng(seed), Counter(), [], []
  for i in range(n):
    task = source[i]
    digit = next(plate.digit for plate in source.scene(i).plates if plate.box in task.boxes)
    x, y = rng.uniform(0, scenes.CANVAS - scenes.PLATE, 2)
    moved = Box(x, y, x + scenes.PLATE, y + scenes.PLATE)
    started = time.perf_counter()
    said = {"tools": _read(of_crops, crop(task))}
    spent.append(time.perf_counter() - started)
    said["overview"] = _read(of_patches, patch(task))
    said["elsewhere"] = _read(of_crops, crop(dataclasses.replace(task, boxes=(moved,))))
    said["exact"] = int(digits.load(told).labels[digit])
    for arm, read in said.items():
      right[arm] += equal(("even", "odd")[read % 2] if kind == "parity" else str(read), task.answer)
    answers.append(task.answer)
  return _found(kind, n, right, spent, answers)


@functools.cache
def _taught(sees: Callable[[Task], np.ndarray]) -> ClassifierMixin:
  """Knows what so many scenes look like, and which digit is there."""
  source = TaskSource(split="train", kinds=("framed", "beside"))
  tasks = [source[i] for i in range(TAUGHT)]
  return readers()["5-nn"].fit(np.stack([sees(t) for t in tasks]), [int(t.answer) for t in tasks])


def _read(reader: ClassifierMixin, seen: np.ndarray) -> int:
  return int(reader.predict(seen[None])[0])


def told(found: dict) -> str:
  """A row as it is printed."""
  arms = "".join(
    f"{f'{share:.2f} ({low:.2f} to {high:.2f})':22}" for share, low, high in map(found.get, ARMS)
  )
  return f"{found['kind']:8}{found['n']:4}  {found['chance']:6.2f}  {arms}{found['seconds']:7.2f}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--n", type=int, default=60, help="puzzles a kind")
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--split", default="dev", choices=pictures.SPLITS)
  kinds = (*scenes.KINDS, *KINDS)
  parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
  parser.add_argument("--model", type=Path, default=Path("assets/tiny-vl"), help="whose overview")
  parser.add_argument("--pictures", type=Path, default=None)
  parser.add_argument("--out", type=Path, default=Path("runs/need"))
  args = parser.parse_args()
  cv2.setNumThreads(1)
  tools = Toolbox(
    tuple(TOOLS["qwen"]), shown_size=frame_of(args.model), shown_frames=clips_of(args.model)
  )
  size = images_of(args.model).shown_size
  print(f"{'kind':8}{'n':>4}  {'chance':6}  {''.join(f'{arm:22}' for arm in ARMS)}seconds")
  rows = []
  for kind in args.kinds:
    if kind in scenes.KINDS:
      rows.append(digit_row(kind, args.split, args.seed, args.n))
    else:
      source = PuzzleSource(
        split=args.split, seed=args.seed, kinds=(kind,), size=args.n, folder=args.pictures
      )
      rows.append(row(source, args.n, tools, size))
    print(told(rows[-1]), flush=True)
  print(json.dumps(record(args.out, "need", {"split": args.split, "rows": rows})))


if __name__ == "__main__":
  main()
