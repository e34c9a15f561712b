"""How often GET_PROPERTIES has the right word for a colour, a shape, a place; what is larger.

    python benchmarks/properties.py --n 240 --seed 1 --out runs/properties

Read from the tool's text, as a policy reads it. Masks are
  exact      those of the composites or of the rendering
  from box   what SEGMENT_OBJECT_AT finds from the object's tight box
Questions:
  colour, named      one plain colour, by a name that people gave it in Munroe's survey (as in
                     matplotlib): names that end in a basic term and hold no other colour's
  colour, painted    a shape or digit in one of six colours, with a photo's grain and light from
                     above, on a photo: data/pictures.py
  shape, painted     the shapes among these, turned by any angle
  shape, drawn       rendered in any size, angle and proportion; ragged: edges are off by 2% of the
                     root of the area; "irregular" are random blobs and Ls
  larger             which of two objects has more pixels: those with at least a tenth more
  place              which third of the picture across and down its centre is in
Prints accuracy with n and 95% Wilson intervals, then which words were wrong most often.
tools/properties.py was tuned on the splits train and dev, and on other seeds.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool
from matplotlib.colors import XKCD_COLORS
from PIL import Image, ImageDraw
from record import record  # The file beside this one.
from scipy import ndimage

from pixelis_jax.data import composites, pictures
from pixelis_jax.data.composites import Composite, Placed
from pixelis_jax.metrics import interval
from pixelis_jax.tools import properties, segment
from pixelis_jax.tools.sight import Mistake, Sight
from pixelis_jax.tools.views import IDENTITY
from pixelis_jax.types import Mask, Pixels, Task, ToolResult, value

Inside = Bool[np.ndarray, "height width"]
Corners = Sequence[tuple[float, float]]

# Parts of other colours' names: what has one is between two terms.
OTHERS = re.compile(
  "purpl|violet|green|blue|bluish|bluey|yellow|orang|brown|pink|red|grey|gray|teal|aqua|turq|lime"
  "|olive|tan|lavender|salmon|peach|rose|rosy|coral|rust|mustard|khaki|sea|plum|wine|sand|mint|navy"
  "|indigo|cyan"
)
SIZES = ((12, 24), (24, 60), (60, 200))  # Pixels from end to end, about.


@value
class Answered:
  """`said` is None where nothing could be measured."""

  question: str
  masks: str
  truth: str
  said: str | None


def told(pixels: Pixels, mask: Mask) -> str:
  """The tool's text about a mask."""
  return properties.get_properties({"mask": 1}, _sight(pixels, mask)).text


def _sight(pixels: Pixels, *masks: Mask) -> Sight:
  task = Task(id="", images=(pixels,), question="", answer=None)
  results = [ToolResult(text="", masks=masks)]
  return Sight(task=task, results=results, shown_size=lambda h, w: (h, w), view=IDENTITY)


def mask_of(inside: Inside) -> Mask:
  """The exact one."""
  box = composites.tight(inside)
  part = inside[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]
  return Mask(inside=part, source=0, box=box)


def found(pixels: Pixels, inside: Inside) -> Mask | None:
  """What the segmenter makes of the exact mask's box."""
  box = composites.tight(inside)
  try:
    result = segment.segment_object_at(
      {"bbox_2d": [box.x0, box.y0, box.x1, box.y1]}, _sight(pixels)
    )
  except Mistake:
    return None
  return result.masks[0]


def colour(text: str) -> str:
  return re.search(r"Colour: (\w+)", text)[1]


def shape(text: str) -> str:
  return re.search(r"Shape: (\w+)", text)[1]


def area(text: str) -> int:
  return int(re.search(r"Size: ([\d,]+) pixels", text)[1].replace(",", ""))


def place(text: str) -> str:
  return re.search(r"Position: .*, ([a-z ]+)\.", text)[1]


def survey() -> Iterator[Answered]:
  """A square of each colour that has a name."""
  prototypes = {h for listed in properties.PROTOTYPES.values() for h in listed.split()}
  seen = set()
  for name, code in sorted(XKCD_COLORS.items()):
    *words, term = name.removeprefix("xkcd:").replace("gray", "grey").split()
    known = term in properties.NAMES and code[1:] not in prototypes | seen
    if known and not OTHERS.search(" ".join(words)):
      seen.add(code[1:])
      pixels = np.tile(np.uint8([list(bytes.fromhex(code[1:]))]), (16, 16, 1))
      text = told(pixels, mask_of(np.ones((16, 16), bool)))
      yield Answered(question="colour, named", masks="exact", truth=term, said=colour(text))


def painted(n: int, seed: int, split: str) -> Iterator[Answered]:
  """Colour, shape, size and place of two made cut-outs on a photo."""
  photos, cutouts = pictures.photos(split), pictures.cutouts(split)
  for i in range(n):
    scene = _scene(np.random.default_rng([seed, i]), photos, cutouts)
    for masks, get in (("exact", lambda _, o: mask_of(o.visible)), ("from box", _segmented)):
      texts = []
      for placed in scene.objects:
        mask = get(scene.pixels, placed)
        texts.append(None if mask is None else told(scene.pixels, mask))
      yield from _about(scene.objects, texts, masks)


def _segmented(pixels: Pixels, placed: Placed) -> Mask | None:
  return found(pixels, placed.visible)


def _scene(
  rng: np.random.Generator,
  photos: Sequence[pictures.Photo],
  cutouts: Sequence[pictures.Cutout],
) -> Composite:
  while True:  # Some pairs find no place.
    photo = photos[int(rng.integers(len(photos)))]
    pair = [cutouts[int(j)] for j in rng.choice(len(cutouts), 2, replace=False)]
    try:
      return composites.compose(
        rng, photo, pair, heights=rng.uniform(0.12, 0.5, 2).tolist(), turn=180, shadow=0.3
      )
    except ValueError:
      continue


def _about(
  objects: Sequence[Placed], texts: Sequence[str | None], masks: str
) -> Iterator[Answered]:
  def answered(question: str, truth: str, read: Callable[[str], str], text: str | None) -> Answered:
    said = None if text is None else read(text)
    return Answered(question=question, masks=masks, truth=truth, said=said)

  for placed, text in zip(objects, texts, strict=True):
    yield answered("colour, painted", placed.color, colour, text)
    if placed.name in pictures.SHAPES:
      yield answered("shape, painted", placed.name, shape, text)
    yield answered("place", third(placed.visible), place, text)
  first, second = (int(placed.visible.sum()) for placed in objects)
  if max(first, second) >= 1.1 * min(first, second):
    areas = [0 if text is None else area(text) for text in texts]
    yield Answered(
      question="larger",
      masks=masks,
      truth=("first", "second")[second > first],
      said=("first", "second")[areas[1] > areas[0]],
    )


def third(inside: Inside) -> str:
  """In words, of the centre of the mask."""
  y, x = (np.argwhere(inside).mean(0) + 0.5) / inside.shape
  down = ("upper", "middle", "lower")[int(3 * y)]
  across = ("left", "middle", "right")[int(3 * x)]
  return "centre" if down == across == "middle" else f"{down} {across}"


def drawn(n: int, seed: int) -> Iterator[Answered]:
  """Every shape n / 12 times in each range of sizes, with clean and with ragged edges."""
  for low, high in SIZES:
    for ragged in (0.0, 0.02):
      question = f"shape, drawn, {low} to {high} px" + (", ragged" if ragged else "")
      for kind in KINDS:
        for i in range(n // 12):
          rng = np.random.default_rng([seed, i, low, len(kind), ord(kind[0])])
          inside = KINDS[kind](rng, float(rng.uniform(low, high)))
          inside = roughened(inside, rng, ragged)
          text = told(np.zeros((*inside.shape, 3), np.uint8), mask_of(inside))
          yield Answered(question=question, masks="exact", truth=kind, said=shape(text))


def polygon(corners: Corners, rng: np.random.Generator, long: float) -> Inside:
  """At any angle, `long` pixels from end to end."""
  at = np.array(corners, float)
  at -= at.mean(0)
  turn = rng.uniform(0, 2 * np.pi)
  at = at @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
  at *= long / np.hypot(*(at[:, None] - at[None]).reshape(-1, 2).T).max()
  side = int(long) + 8
  image = Image.new("L", (side * 8, side * 8))
  ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in (at + side / 2) * 8], fill=255)
  return np.asarray(image.resize((side, side), Image.Resampling.BOX)) >= 128


def regular(count: int, squeeze: float = 1.0) -> Corners:
  angles = 2 * np.pi * np.arange(count) / count
  return list(zip(np.cos(angles), squeeze * np.sin(angles), strict=True))


def triangle(rng: np.random.Generator, long: float) -> Inside:
  """Of any angles, none below 35 degrees."""
  a, b = rng.uniform(35, 90, 2)
  while not 35 <= 180 - a - b:
    a, b = rng.uniform(35, 90, 2)
  left, right = np.tan(np.radians([a, b]))
  x = right / (left + right)
  return polygon([(0, 0), (1, 0), (x, x * left)], rng, long)


def blob(rng: np.random.Generator, long: float) -> Inside:
  """A wavy outline, or an L of any proportions."""
  if rng.random() < 0.3:
    x, y = rng.uniform(0.25, 0.45, 2)
    return polygon([(0, 0), (1, 0), (1, y), (x, y), (x, 1), (0, 1)], rng, long)
  angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
  waves = np.arange(2, 6)
  sizes, phases = rng.uniform(0.12, 0.3, 4), rng.uniform(0, 2 * np.pi, 4)
  radii = 1 + (sizes[:, None] * np.cos(waves[:, None] * angles + phases[:, None])).sum(0)
  radii = np.maximum(radii, 0.2)
  return polygon(list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True)), rng, long)


def stretched(rng: np.random.Generator) -> float:
  return float(rng.uniform(0.35, 0.8))


def pasted(name: str) -> Callable[[np.random.Generator, float], Inside]:
  """One of the shapes of data/pictures.py."""

  def draw(rng: np.random.Generator, long: float) -> Inside:
    image = Image.fromarray(np.rint(255 * pictures.shape(name)).astype(np.uint8))
    image = image.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC, expand=True)
    scale = long / max(image.size)
    size = [max(4, round(scale * side)) for side in image.size]
    return np.pad(np.asarray(image.resize(size, Image.Resampling.BICUBIC)) >= 128, 3)

  return draw


BAR = ((-1, -1), (1, -1), (1, 1), (-1, 1))
KINDS: dict[str, Callable[[np.random.Generator, float], Inside]] = {
  "circle": lambda rng, long: polygon(regular(90), rng, long),
  "ellipse": lambda rng, long: polygon(regular(90, stretched(rng)), rng, long),
  "square": lambda rng, long: polygon(BAR, rng, long),
  "rectangle": lambda rng, long: polygon(np.array(BAR) * (1, stretched(rng)), rng, long),
  "triangle": triangle,
  "pentagon": lambda rng, long: polygon(regular(5), rng, long),
  "hexagon": lambda rng, long: polygon(regular(6), rng, long),
  "semicircle": lambda rng, long: polygon(regular(90)[:46], rng, long),
  **{
    name: pasted(name)
    for name in ("diamond", "star", "heart", "cross", "ring", "crescent", "arrow")
  },
  "irregular": blob,
}


def roughened(inside: Inside, rng: np.random.Generator, amount: float) -> Inside:
  """Its edge moved by waves, `amount` of the root of its area; the largest part of it."""
  if not amount:
    return inside
  padded = np.pad(inside, 6)
  within, beyond = map(ndimage.distance_transform_edt, (padded, ~padded))
  distance = np.where(padded, within - 0.5, 0.5 - beyond)  # The edge is between two pixels.
  size = np.sqrt(padded.sum())
  waves = ndimage.gaussian_filter(rng.normal(size=padded.shape), max(1.5, 0.04 * size))
  parts, _ = ndimage.label(distance + amount * size * waves / waves.std() > 0)
  areas = np.bincount(parts.ravel())
  areas[0] = 0
  return parts == areas.argmax()


def rows(answers: Sequence[Answered]) -> list[dict]:
  """One a question and kind of mask, in their order."""
  made = []
  for question, masks in dict.fromkeys((a.question, a.masks) for a in answers):
    these = [a for a in answers if (a.question, a.masks) == (question, masks)]
    right = sum(a.truth == a.said for a in these)
    low, high = interval(right, len(these))
    wrong = Counter((a.truth, a.said) for a in these if a.truth != a.said)
    made.append(
      {"question": question, "masks": masks, "n": len(these), "right": right / len(these)}
      | {"low": low, "high": high, "wrong": [[*pair, k] for pair, k in wrong.most_common(3)]}
    )
  return made


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--n", type=int, default=240, help="pictures, and drawn shapes a row")
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--split", default="test", choices=pictures.SPLITS)
  parser.add_argument("--out", type=Path, default=Path("runs/properties"))
  args = parser.parse_args()
  cv2.setNumThreads(1)
  answers = [*survey(), *painted(args.n, args.seed, args.split), *drawn(args.n, args.seed)]
  made = rows(answers)
  print(f"{'question':36}{'masks':10}{'n':>5}  right  95% interval    most often wrong")
  for r in made:
    wrong = ", ".join(f"{truth} as {said} {k}" for truth, said, k in r["wrong"])
    print(
      f"{r['question']:36}{r['masks']:10}{r['n']:5}  {r['right']:.3f}"
      f"  [{r['low']:.3f}, {r['high']:.3f}]  {wrong}"
    )
  print(json.dumps(record(args.out, "properties", {"rows": made})))


if __name__ == "__main__":
  main()
