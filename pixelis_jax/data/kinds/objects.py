"""Kinds of questions that need SEGMENT_OBJECT_AT and GET_PROPERTIES: small objects, measured.

  larger  "Which covers more of the picture, the red or the blue shape?"   -> "red"
  color   "What color is the left spot in the red frame?"                     -> "blue"
  shape   "What shape is in the green frame?"                                 -> "heart"

Shown in 80 x 60, the two of `larger` are 3 or 4 pixels high and differ in shape, and in area by 8
to 30%: a fraction of a pixel along each side. The three spots of `color` are 2 to 3 pixels wide
together; the shape of `shape` is 3 pixels high. After ZOOM_IN a policy can point at them.
"""

import dataclasses
import math

import numpy as np

from pixelis_jax.data import composites
from pixelis_jax.data.composites import Canvas, Placed, Sprite
from pixelis_jax.data.kinds.puzzle import (
  TRIES,
  Kind,
  Look,
  Materials,
  Puzzle,
  Solving,
  around,
  one,
  said,
  some,
)
from pixelis_jax.data.pictures import Cutout
from pixelis_jax.data.scenes import COLORS
from pixelis_jax.tools.places import pointed
from pixelis_jax.tools.sight import Sight
from pixelis_jax.types import Box, Task, ToolCall, ToolResult

CANVAS = (480, 640)  # Height and width, as of all sizes here; in pixels.
GROUP = (132, 176)  # Where the objects are that are compared.
AREAS = (450.0, 1000.0)  # Pixels of the first of them.
APART = (1.08, 1.30)  # Ratio of the larger one's area to the smaller one's.
THIRD = (0.45, 0.7)  # Ratio of a third object's area to the first's.
FRAMES = 3
FRAME, BORDER = 80, 14  # Outer side of a frame, and how broad it is.
SPOTS = ("left", "middle", "right")  # In a frame where colours are asked for,
SPOT, GAP = (5.0, 6.0), 2  # how high they are and how far apart.
ALONE = (20.0, 26.0)  # Height of the one shape in a frame where shapes are asked for.
ROUND = ("circle", "square", "diamond")  # What a spot may be.
SLACK = 6.0  # Pixels that a solver shows beside a group or frame, at most, on each side.
NAMED = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")

QUESTIONS = {
  "larger": (
    "Which covers more of the picture, {} or {}?",
    "Which is larger in area, {} or {}?",
    "Of {} and {}, which has more pixels?",
  ),
  "color": (
    "What color is the {} spot in the {} frame?",
    "Which color does the {} spot in the {} frame have?",
    "In the {1} frame, what color is the {0} spot?",
  ),
  "shape": (
    "What shape is in the {} frame?",
    "Which shape does the {} frame hold?",
    "Name the shape in the {} frame.",
  ),
}


def _asked(rng: np.random.Generator, kind: str, *names: str) -> str:
  return str(one(rng, QUESTIONS[kind])).format(*names)


def called(cutout: Cutout | Placed) -> str:
  """The one word that answers: of a shape its colour, of a thing the last word of its name."""
  return cutout.color or cutout.name.split()[-1]


def compose_larger(rng: np.random.Generator, materials: Materials, id: str) -> Puzzle:
  """Three objects, the first two asked about. With a fetched folder half of them are things."""
  for _ in range(TRIES):
    chosen = _three(rng, materials)
    area = rng.uniform(*AREAS)
    ratio = rng.uniform(*APART) ** rng.choice((-1, 1))
    areas = (area, area * ratio, area * rng.uniform(*THIRD))
    sprites = [_covering(rng, cutout, a) for cutout, a in zip(chosen, areas, strict=True)]
    sizes = [int(sprite.solid.sum()) for sprite in sprites]
    if APART[0] <= max(sizes[:2]) / min(sizes[:2]) <= APART[1]:
      break
  else:
    raise ValueError(f"puzzle {id}: no two objects with areas {APART} apart in {TRIES} draws")
  photo = one(rng, materials.photos)
  canvas = composites.backdrop(rng, photo, CANVAS)
  ((left, top),) = composites.apart(rng, [GROUP], CANVAS)
  corners = composites.apart(rng, [sprite.alpha.shape for sprite in sprites], GROUP)
  objects = [
    _pasted(canvas, cutout, sprite, left + x, top + y)
    for cutout, sprite, (x, y) in zip(chosen, sprites, corners, strict=True)
  ]
  group = Look(name="group", box=Box(*map(float, (left, top, left + GROUP[1], top + GROUP[0]))))
  looks = [Look(name=called(placed), box=placed.box) for placed in objects]
  first, second, third = looks
  told = [f"the {c.color} shape" if c.color else f"the {called(c)}" for c in chosen[:2]]
  larger, smaller = (first, second) if sizes[0] > sizes[1] else (second, first)
  task = Task(
    id=id,
    images=(composites.levels(canvas),),
    question=_asked(rng, "larger", *told),
    answer=larger.name,
    kind="larger",
    boxes=(group.box, first.box, second.box),
  )
  # The third, which is smaller, in place of the larger one.
  taken = dataclasses.replace(third, name=larger.name)
  wrong = tuple(taken if look is larger else look for look in (first, second))
  return Puzzle(
    task=task,
    looks=(group, first, second),
    mistakes=((group, *wrong),),
    slips=(smaller.name,),
    objects=tuple(objects),
    sources=(photo.source, *(cutout.source for cutout in chosen)),
  )


def _three(rng: np.random.Generator, materials: Materials) -> list[Cutout]:
  """Of different names and answers."""
  pool = materials.things if materials.things and rng.random() < 0.5 else materials.shapes
  chosen: list[Cutout] = []
  for cutout in some(rng, pool, len(pool)):
    apart = all(cutout.name != c.name and called(cutout) != called(c) for c in chosen)
    if apart and 0.4 < cutout.solid.shape[1] / cutout.solid.shape[0] < 2.5:
      chosen.append(cutout)
    if len(chosen) == 3:
      return chosen
  raise ValueError(f"{len(pool)} cut-outs of split {materials.split} have no three different names")


def _covering(rng: np.random.Generator, cutout: Cutout, area: float) -> Sprite:
  """A cut-out in the size in which it covers about so many pixels."""
  height = cutout.solid.shape[0] * math.sqrt(area / cutout.solid.sum())
  return _drawn(rng, cutout, height)


def _drawn(rng: np.random.Generator, cutout: Cutout, height: float) -> Sprite:
  """So many pixels high, mirrored and lit by chance."""
  image = composites.turned(rng, cutout, 0.0, True)
  return composites.sized(image, height / CANVAS[0], CANVAS, composites.random_gains(rng, 0.1))


def _pasted(canvas: Canvas, cutout: Cutout, sprite: Sprite, x: int, y: int) -> Placed:
  """Draws it, in place; nothing will hide it."""
  whole = composites.paste(canvas, sprite, x, y)
  return Placed(
    name=cutout.name, color=cutout.color, source=cutout.source, whole=whole, visible=whole
  )


def solve_larger(puzzle: Puzzle, rng: np.random.Generator, sight: Sight) -> Solving:
  group, *objects = puzzle.looks
  yield ToolCall(name="zoom_in", arguments=pointed(sight, around(rng, group.box, SLACK)))
  image, areas = len(sight.shown()), []
  for look in objects:
    arguments = pointed(sight, look.box, image)
    result = yield ToolCall(name="segment_object_at", arguments=arguments)
    areas.append(_area(result))
  return objects[int(np.argmax(areas))].name


def _area(result: ToolResult) -> int:
  """What the segmenter counted; 0 where it found nothing."""
  return int((said(r"^Mask \d+: ([\d,]+) pixels", result) or "0").replace(",", ""))


def _framed(
  canvas: Canvas, rng: np.random.Generator, name: str, corner: tuple[int, int], held: list[Cutout]
) -> tuple[Look, list[Placed]]:
  """Draws, in place, a frame with grey ground, and in it one shape or a row of spots."""
  x, y = corner
  canvas[y : y + FRAME, x : x + FRAME] = COLORS[name]
  inner = FRAME - 2 * BORDER
  ground = rng.uniform(150, 190) + rng.normal(0, 4, (inner, inner, 1))
  canvas[y + BORDER : y + BORDER + inner, x + BORDER : x + BORDER + inner] = ground
  sprites = [_drawn(rng, c, rng.uniform(*(ALONE if len(held) == 1 else SPOT))) for c in held]
  height = max(sprite.alpha.shape[0] for sprite in sprites)
  width = sum(sprite.alpha.shape[1] + GAP for sprite in sprites) - GAP
  ((dx, dy),) = composites.apart(rng, [(height, width)], (inner, inner))
  placed = []
  for cutout, sprite in zip(held, sprites, strict=True):
    placed.append(_pasted(canvas, cutout, sprite, x + BORDER + dx, y + BORDER + dy))
    dx += sprite.alpha.shape[1] + GAP
  box = Box(*map(float, (x, y, x + FRAME, y + FRAME)))
  return Look(name=name, box=box), placed


def _scene(
  rng: np.random.Generator, materials: Materials, contents: list[list[Cutout]]
) -> tuple[np.ndarray, list[Look], list[list[Placed]], tuple[str, ...]]:
  """A photo with frames of different colours; what they hold is given. The first is asked for."""
  photo = one(rng, materials.photos)
  canvas = composites.backdrop(rng, photo, CANVAS)
  corners = composites.apart(rng, [(FRAME, FRAME)] * len(contents), CANVAS)
  looks, placed = [], []
  for name, corner, held in zip(
    some(rng, tuple(COLORS), len(contents)), corners, contents, strict=True
  ):
    look, objects = _framed(canvas, rng, name, corner, held)
    looks.append(look)
    placed.append(objects)
  sources = (photo.source, *(cutout.source for held in contents for cutout in held))
  return composites.levels(canvas), looks, placed, sources


def _different(
  rng: np.random.Generator, pool: tuple[Cutout, ...], names: tuple[str, ...], count: int
) -> list[Cutout]:
  """Of these shapes; no two of one colour, and no two of one shape where there are enough."""
  chosen: list[Cutout] = []
  for cutout in some(rng, pool, len(pool)):
    fresh = cutout.name not in {c.name for c in chosen} or len(names) <= count
    if cutout.name in names and fresh and cutout.color not in {c.color for c in chosen}:
      chosen.append(cutout)
  return chosen[:count]


def compose_color(rng: np.random.Generator, materials: Materials, id: str) -> Puzzle:
  """Frames with a row of three spots each; one of the first frame's is asked for."""
  contents = [_different(rng, materials.shapes, ROUND, len(SPOTS)) for _ in range(FRAMES)]
  pixels, frames, placed, sources = _scene(rng, materials, contents)
  at = int(rng.integers(len(SPOTS)))
  asked = placed[0][at]
  looks = [
    [(frame, Look(name=name, box=spot.box)) for name, spot in zip(SPOTS, row, strict=True)]
    for frame, row in zip(frames, placed, strict=True)
  ]
  task = Task(
    id=id,
    images=(pixels,),
    question=_asked(rng, "color", SPOTS[at], frames[0].name),
    answer=asked.color,
    kind="color",
    boxes=(asked.box,),
  )
  beside = [pair for i, pair in enumerate(looks[0]) if i != at]
  return Puzzle(
    task=task,
    looks=looks[0][at],
    mistakes=(*beside, *(row[at] for row in looks[1:])),
    slips=tuple(sorted({frames[0].name, *(spot.color for spot in placed[0])} - {asked.color})),
    objects=tuple(spot for row in placed for spot in row),
    sources=sources,
  )


def solve_color(puzzle: Puzzle, rng: np.random.Generator, sight: Sight) -> Solving:
  frame, spot = puzzle.looks
  yield ToolCall(name="zoom_in", arguments=pointed(sight, around(rng, frame.box, SLACK)))
  image = len(sight.shown())
  result = yield ToolCall(name="get_properties", arguments=pointed(sight, spot.box, image))
  return _hue(result)


def _hue(result: ToolResult) -> str:
  """The commonest of the colours that shapes have: around them it is grey."""
  line = said(r"^Colour: (.*);", result) or ""
  told = [word for word in line.replace(",", "").split() if word in COLORS]
  return told[0] if told else ""


def compose_shape(rng: np.random.Generator, materials: Materials, id: str) -> Puzzle:
  """Frames with one shape each, all different; that of the first is asked for."""
  contents = [[cutout] for cutout in _different(rng, materials.shapes, NAMED, FRAMES)]
  pixels, frames, placed, sources = _scene(rng, materials, contents)
  looks = [
    (frame, Look(name=f"shape in {frame.name}", box=held[0].box))
    for frame, held in zip(frames, placed, strict=True)
  ]
  asked = placed[0][0]
  task = Task(
    id=id,
    images=(pixels,),
    question=_asked(rng, "shape", frames[0].name),
    answer=asked.name,
    kind="shape",
    boxes=(frames[0].box,),
  )
  return Puzzle(
    task=task,
    looks=looks[0],
    mistakes=tuple(looks[1:]),
    slips=tuple(some(rng, tuple(name for name in NAMED if name != asked.name), 2)),
    objects=tuple(o for held in placed for o in held),
    sources=sources,
  )


def solve_shape(puzzle: Puzzle, rng: np.random.Generator, sight: Sight) -> Solving:
  frame, spot = puzzle.looks
  yield ToolCall(name="zoom_in", arguments=pointed(sight, around(rng, frame.box, SLACK)))
  image = len(sight.shown())
  result = yield ToolCall(name="segment_object_at", arguments=pointed(sight, spot.box, image))
  mask = said(r"^Mask (\d+):", result)
  if mask is None:
    return ""
  result = yield ToolCall(name="get_properties", arguments={"mask": int(mask)})
  return said(r"^Shape: (\w+)", result) or ""


KINDS = {
  "larger": Kind(
    tools=("zoom_in", "segment_object_at"), compose=compose_larger, solve=solve_larger
  ),
  "color": Kind(
    tools=("zoom_in", "get_properties"),
    compose=compose_color,
    solve=solve_color,
    about=lambda rng, puzzle, looks: _asked(rng, "color", looks[1].name, looks[0].name),
  ),
  "shape": Kind(
    tools=("zoom_in", "segment_object_at", "get_properties"),
    compose=compose_shape,
    solve=solve_shape,
    about=lambda rng, puzzle, looks: _asked(rng, "shape", looks[0].name),
  ),
}
