"""Kinds of questions that need TRACK_OBJECT: three equal things move, and only their paths differ.

  moved   "Which star moved farthest, the left, middle or right one?"     -> "middle"
  hidden  "Where does the star that began on the left end?"              -> "right"

What first and last frames show is the same whoever went where. The things are 3 to 4 pixels high
where a frame is shown in 80 x 60. In `hidden` a post hides the one that is asked for on its way.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from pixelis_jax.data import films
from pixelis_jax.data.composites import Occlusion
from pixelis_jax.data.films import Course, Film, Track
from pixelis_jax.data.kinds.puzzle import (
  Kind,
  Look,
  Materials,
  Puzzle,
  Solving,
  around,
  one,
  said,
)
from pixelis_jax.tools.places import pointed
from pixelis_jax.tools.sight import Sight
from pixelis_jax.types import Task, ToolCall

SLACK = 1.0  # Pixels that a solver's box is wider than a thing, at most, on each side.
CANVAS = (240, 320)  # Height and width in pixels.
FRAMES, RATE = 16, 8.0  # And frames a second.
THIRDS = ("left", "middle", "right")
HEIGHT = (0.085, 0.095)  # Of the things, in parts of the canvas's.
FARTHER = 1.4  # Ratio, at least, of the longest of three ways to the second longest.
NEAREST = 2.0  # Distance of two things, at least, at any time, in heights.
HIDDEN = (2, 3)  # Frames behind the post.
CLEAR = 4.5  # How far the others then are from where it was last seen, at least, in heights.
SOLID = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "arrow")
_DRAWS = 3000  # Of courses until some fit; of the rarest ends one in twenty does.
_ROOM = 0.08  # From a thing's middle to the border, in parts of the sides.

QUESTIONS = {
  "moved": (
    "There is a {0} on the left, in the middle and on the right. Which one moves farthest?",
    "Which {0} ends farthest from where it began: the left, the middle or the right one?",
    "Which {0} moved farthest, the one that began left, middle or right?",
  ),
  "hidden": (
    "Where does the {} that began {} end: left, middle or right?",
    "The {} that began {}: does it end on the left, in the middle or on the right?",
    "In which third of the last frame is the {} that began {}: left, middle or right?",
  ),
}
BEGAN = dict(zip(THIRDS, ("on the left", "in the middle", "on the right"), strict=True))


def compose_moved(rng: np.random.Generator, materials: Materials, id: str) -> Puzzle:
  """`tracks` are in the order of their beginnings, from left to right."""

  wanted = int(rng.integers(len(THIRDS)))

  def fits(courses: list[Course]) -> bool:
    ways = list(map(_way, courses))
    *_, second, first = sorted(ways)
    return ways[wanted] == first >= FARTHER * second

  played, name, sources = _played(
    rng, materials, id, lambda: rng.permutation(len(THIRDS)).tolist(), fits
  )
  looks = _looks(played)
  ways = [_went(track) for track in played.tracks]
  farthest, nearest = int(np.argmax(ways)), int(np.argmin(ways))
  answer = THIRDS[farthest]
  # The one that moves least is followed in place of the one that moves most.
  taken = Look(name=answer, box=looks[nearest].box, time=0.0)
  mistake = tuple(taken if i == farthest else look for i, look in enumerate(looks))
  task = Task(
    id=id,
    images=(),
    question=str(one(rng, QUESTIONS["moved"])).format(name),
    answer=answer,
    kind="moved",
    videos=(played.video,),
  )
  return Puzzle(
    task=task,
    looks=looks,
    mistakes=(mistake,),
    slips=tuple(third for third in THIRDS if third != answer),
    tracks=played.tracks,
    sources=sources,
  )


def solve_moved(puzzle: Puzzle, rng: np.random.Generator, sight: Sight) -> Solving:
  yield ToolCall(name="select_frames", arguments={"times": [0.0]})
  image, ways = len(sight.shown()), []
  for look in puzzle.looks:
    arguments = {**pointed(sight, around(rng, look.box, SLACK), image), "frames": 1}
    result = yield ToolCall(name="track_object", arguments=arguments)
    ways.append(float(said(r"moved .*: (\d+) in a straight line", result) or 0))
  return puzzle.looks[int(np.argmax(ways))].name


def compose_hidden(rng: np.random.Generator, materials: Materials, id: str) -> Puzzle:
  """`tracks` as of `moved`; `shares` say when the one asked for is behind the post."""
  asked = int(rng.integers(len(THIRDS)))
  start = int(rng.integers(FRAMES // 3, FRAMES // 2))
  stop = start + int(rng.integers(HIDDEN[0], HIDDEN[1] + 1))
  # Not drawn again with the courses: most of those that fit stay in their third.
  ends = rng.permutation(len(THIRDS)).tolist()
  post = Occlusion(number=asked, start=start, stop=stop, share=1.0)

  def fits(courses: list[Course]) -> bool:
    paths = [_places(course) for course in courses]
    last = paths[asked][start - 1]
    others = [path[start : stop + 2] for i, path in enumerate(paths) if i != asked]
    nearest = min(np.hypot(*(path - last).T).min() for path in others)
    return bool(nearest >= CLEAR * courses[asked].heights[0] * CANVAS[0])

  played, name, sources = _played(rng, materials, id, lambda: ends, fits, [post])
  looks = _looks(played)
  answer = _third(played.tracks[asked], -1)
  task = Task(
    id=id,
    images=(),
    question=_asked(rng, name, THIRDS[asked]),
    answer=answer,
    kind="hidden",
    videos=(played.video,),
  )
  return Puzzle(
    task=task,
    looks=(looks[asked],),
    mistakes=tuple((look,) for i, look in enumerate(looks) if i != asked),
    slips=tuple(third for third in THIRDS if third != answer),
    tracks=played.tracks,
    sources=sources,
  )


def _asked(rng: np.random.Generator, name: str, third: str) -> str:
  return str(one(rng, QUESTIONS["hidden"])).format(name, BEGAN[third])


def solve_hidden(puzzle: Puzzle, rng: np.random.Generator, sight: Sight) -> Solving:
  (look,) = puzzle.looks
  yield ToolCall(name="select_frames", arguments={"times": [0.0]})
  image = len(sight.shown())
  arguments = {**pointed(sight, around(rng, look.box, SLACK), image), "frames": 1}
  result = yield ToolCall(name="track_object", arguments=arguments)
  edges = said(r"seen at \[(.*)\]", result)
  if edges is None:
    return ""
  x0, _, x1, _ = map(int, edges.split(", "))
  return THIRDS[min(3 * (x0 + x1) // (2 * sight.shown()[image - 1].size[1]), 2)]


def _played(
  rng: np.random.Generator,
  materials: Materials,
  id: str,
  ends: Callable[[], Sequence[int]],
  fits: Callable[[list[Course]], bool],
  occlusions: Sequence[Occlusion] = (),
) -> tuple[Film, str, tuple[str, ...]]:
  """A film of three equal things whose courses fit, what they are called, and the sources.

  `ends` gives the thirds in which those that began left, middle and right are to end.
  """
  solid = tuple(cutout for cutout in materials.shapes if cutout.name in SOLID)
  photo, cutout = one(rng, materials.photos), one(rng, solid)
  height = float(rng.uniform(*HEIGHT))
  for _ in range(_DRAWS):
    courses = _courses(rng, height, ends())
    if _apart(courses, height) and fits(courses):
      break
  else:
    raise ValueError(f"puzzle {id}: no three courses fit in {_DRAWS} draws")
  played = films.film(
    rng,
    photo,
    [cutout] * len(courses),
    courses,
    frames=FRAMES,
    rate=RATE,
    size=CANVAS,
    occlusions=occlusions,
    flip=False,
    jitter=0.0,
  )
  return played, cutout.name, (photo.source, cutout.source)


def _courses(rng: np.random.Generator, height: float, ends: Sequence[int]) -> list[Course]:
  """From each third of the picture to the one that is given for it; bent at random."""
  courses = []
  for start, end in enumerate(ends):
    begin, stop = _spot(rng, start), _spot(rng, end)
    bend = tuple(
      float(c) for c in np.clip(np.add(begin, stop) / 2 + rng.uniform(-0.3, 0.3, 2), 0, 1)
    )
    courses.append(Course(start=begin, bend=bend, end=stop, heights=(height, height)))
  return courses


def _spot(rng: np.random.Generator, third: int) -> tuple[float, float]:
  """Well inside a third."""
  x = (third + rng.uniform(0.25, 0.75)) / len(THIRDS)
  return float(x), float(rng.uniform(_ROOM, 1 - _ROOM))


def _places(course: Course) -> np.ndarray:
  """The middles in all frames, in pixels."""
  points = [course.at(f / (FRAMES - 1))[:2] for f in range(FRAMES)]
  return np.array(points) * (CANVAS[1], CANVAS[0])


def _apart(courses: list[Course], height: float) -> bool:
  least = NEAREST * height * CANVAS[0]
  paths = [_places(course) for course in courses]
  return all(np.hypot(*(a - b).T).min() >= least for i, a in enumerate(paths) for b in paths[:i])


def _way(course: Course) -> float:
  """From beginning to end in a straight line, in pixels."""
  ends = _places(course)[[0, -1]]
  return float(math.dist(*ends))


def _went(track: Track) -> float:
  return math.dist(track.masks[0].box.center, track.masks[-1].box.center)


def _third(track: Track, frame: int) -> str:
  x, _ = track.masks[frame].box.center
  return THIRDS[int(len(THIRDS) * x / CANVAS[1])]


def _looks(played: Film) -> tuple[Look, ...]:
  return tuple(
    Look(name=third, box=track.masks[0].box, time=0.0)
    for third, track in zip(THIRDS, played.tracks, strict=True)
  )


KINDS = {
  "moved": Kind(tools=("select_frames", "track_object"), compose=compose_moved, solve=solve_moved),
  "hidden": Kind(
    tools=("select_frames", "track_object"),
    compose=compose_hidden,
    solve=solve_hidden,
    about=lambda rng, puzzle, looks: _asked(rng, puzzle.tracks[0].name, looks[0].name),
  ),
}
