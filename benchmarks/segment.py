"""How well SEGMENT_OBJECT_AT outlines objects: IoU and boundary F1 on composites with exact masks.

    python benchmarks/segment.py --n 60 --seed 1 --pictures FOLDER --out runs/segment

A picture of 320 x 240 pixels has two cut-outs that do not touch, on a photo; the first is asked
for. A third of the objects is small (0.15 to 0.3 of the picture's height), a third medium (to 0.5),
a third large (to 0.75). The truth is what can be seen of it. Asked by
  box      its tight box
  loose    that box, each edge moved by up to a tenth of the box's side, in or out
  point    the point that is deepest inside
  any      a random point, at least a quarter as deep
  zoomed   the deepest point, in a crop twice the size of the box
Conditions: covered (a post hides a quarter), dark (a tenth of the light, with the camera's noise),
blurred (sigma 2 pixels), noisy (sigma 25 of 255), aslant (as a print seen from the side).

F1 is of the outlines' pixels that have one of the other outline within 0.75% of the diagonal: 3
pixels. A call that finds nothing counts 0. Means over n pictures with 95% bootstrap intervals; in
every row the same pictures. Time: the median call's CPU seconds on one thread; memory: what a call
adds to the peak of a new process. --pictures holds what scripts/fetch_pictures.py fetches; without
it cut-outs are shapes and digits. tools/segment.py was tuned on the splits train and dev.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float
from record import record  # The file beside this one.
from scipy import ndimage

from pixelis_jax.data import composites, pictures
from pixelis_jax.data.composites import Composite
from pixelis_jax.data.pictures import Cutout, Photo
from pixelis_jax.tools import segment
from pixelis_jax.tools.sight import Mistake, Sight
from pixelis_jax.tools.views import IDENTITY
from pixelis_jax.types import Box, Mask, Picture, Pixels, Task, ToolResult, value

HEIGHTS = {"small": (0.15, 0.3), "medium": (0.3, 0.5), "large": (0.5, 0.75)}
ASKED = ("box", "loose", "point", "any", "zoomed")
STRESS = ("covered", "dark", "blurred", "noisy", "aslant")
TOLERANCE = 0.0075  # Of the diagonal, at least a pixel.
SIZES = ((240, 320), (960, 1280), (6000, 8000))  # Height and width for time and memory.

Inside = Bool[np.ndarray, "height width"]


@value
class Case:
  """An object to be outlined; `band` is its size's name."""

  pixels: Pixels
  truth: Inside
  band: str
  rng: np.random.Generator


@value
class Outcome:
  """Of one call: `doubt` says whether it warned, `seconds` are of the CPU."""

  iou: float
  f1: float
  doubt: bool
  seconds: float


def cases(photos: list[Photo], cutouts: list[Cutout], n: int, seed: int, how: str) -> list[Case]:
  """n pictures in one condition; the same ones in each, but where nothing of the object is seen."""
  made = []
  for i in range(n):
    rng = np.random.default_rng([seed, i])
    band = list(HEIGHTS)[i % len(HEIGHTS)]
    scene = _scene(rng, photos, cutouts, HEIGHTS[band])
    pixels, truth = _changed(scene, rng, how)
    made.append(Case(pixels=pixels, truth=truth, band=band, rng=rng))
  return made


def _scene(
  rng: np.random.Generator,
  photos: list[Photo],
  cutouts: list[Cutout],
  heights: tuple[float, float],
) -> Composite:
  """Some cut-outs are too wide to be apart at their heights: others are drawn then."""
  while True:
    photo = photos[int(rng.integers(len(photos)))]
    pair = [cutouts[int(j)] for j in rng.choice(len(cutouts), 2, replace=False)]
    both = [float(rng.uniform(*heights)), float(rng.uniform(0.15, 0.5))]
    try:
      return composites.compose(rng, photo, pair, heights=both, turn=20, shadow=0.3)
    except ValueError:
      continue


def _changed(scene: Composite, rng: np.random.Generator, how: str) -> tuple[Pixels, Inside]:
  if how == "covered":
    scene = composites.occluded(scene, rng, 0, share=0.25)
  elif how == "aslant":
    scene = composites.seen_aslant(scene, rng, strength=0.3)
  pixels = scene.pixels
  if how == "dark":
    pixels = composites.darkened(pixels, rng, light=0.1)
  elif how == "blurred":
    pixels = composites.blurred(pixels, sigma=2.0)
  elif how == "noisy":
    pixels = composites.noisy(pixels, rng, sigma=25.0)
  return pixels, scene.objects[0].visible


def ask(case: Case, asked: str) -> Outcome:
  """One call of the tool, as a policy makes it."""
  task = Task(id="", images=(case.pixels,), question="", answer=None)
  arguments, shown = arguments_of(case, asked)
  results = [ToolResult(text="", images=(shown,))] if shown else []
  sight = Sight(task=task, results=results, shown_size=lambda h, w: (h, w), view=IDENTITY)
  started = time.process_time()
  try:
    result = segment.segment_object_at(arguments, sight)
  except Mistake:
    return Outcome(iou=0.0, f1=0.0, doubt=True, seconds=time.process_time() - started)
  seconds = time.process_time() - started
  found = whole(result.masks[0], case.truth)
  return Outcome(
    iou=float((found & case.truth).sum() / (found | case.truth).sum()),
    f1=boundary_f1(found, case.truth),
    doubt="It may be wrong" in result.text,
    seconds=seconds,
  )


def arguments_of(case: Case, asked: str) -> tuple[Mapping[str, object], Picture | None]:
  """What the policy writes, and the crop it was shown before, if it points in one."""
  box = composites.tight(case.truth)
  height, width = case.truth.shape
  rng = np.random.default_rng(case.rng.integers(2**32))
  corners = [box.x0, box.y0, box.x1, box.y1]
  if asked == "box":
    return {"bbox_2d": corners}, None
  if asked == "loose":
    sides = np.array([box.width, box.height] * 2)
    return {"bbox_2d": (corners + rng.uniform(-0.1, 0.1, 4) * sides).tolist()}, None
  depth = ndimage.distance_transform_edt(np.pad(case.truth, 1))[1:-1, 1:-1]
  if asked == "any":
    inner = np.argwhere(depth >= depth.max() / 4)
    y, x = inner[int(rng.integers(len(inner)))]
  else:
    y, x = np.unravel_index(depth.argmax(), depth.shape)
  if asked != "zoomed":
    return {"point_2d": [float(x) + 0.5, float(y) + 0.5]}, None
  x0, y0 = max(0, int(box.x0 - box.width / 2)), max(0, int(box.y0 - box.height / 2))
  x1, y1 = min(width, int(box.x1 + box.width / 2)), min(height, int(box.y1 + box.height / 2))
  crop = Box(float(x0), float(y0), float(x1), float(y1))
  picture = Picture(pixels=case.pixels[y0:y1, x0:x1], source=0, box=crop)
  return {"point_2d": [float(x - x0) + 0.5, float(y - y0) + 0.5], "image": 2}, picture


def whole(mask: Mask, like: Inside) -> Inside:
  """The mask in all of its picture."""
  found = np.zeros_like(like)
  x, y = int(mask.box.x0), int(mask.box.y0)
  found[y : y + mask.inside.shape[0], x : x + mask.inside.shape[1]] = mask.inside
  return found


def boundary_f1(found: Inside, truth: Inside) -> float:
  """Csurka et al., BMVC 2013: the harmonic mean of both outlines' shares near the other one."""
  tolerance = max(1.0, round(TOLERANCE * float(np.hypot(*truth.shape))))
  outlines = [mask & ~ndimage.binary_erosion(mask) for mask in (found, truth)]
  near = [ndimage.distance_transform_edt(~outline) <= tolerance for outline in outlines]
  precision = float((outlines[0] & near[1]).sum() / max(1, outlines[0].sum()))
  recall = float((outlines[1] & near[0]).sum() / max(1, outlines[1].sum()))
  return 2 * precision * recall / max(1e-9, precision + recall)


def interval(values: Float[np.ndarray, " N"]) -> tuple[float, float]:
  """95% bootstrap interval of the mean, by percentiles of 2,000 resamples."""
  rng = np.random.default_rng(0)
  means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
  low, high = np.percentile(means, (2.5, 97.5))
  return float(low), float(high)


def row(condition: str, asked: str, band: str, outcomes: list[Outcome]) -> dict:
  """One line of the table."""
  ious, f1s = (np.array([getattr(o, name) for o in outcomes]) for name in ("iou", "f1"))
  doubts = np.array([o.doubt for o in outcomes])
  low, high = interval(ious)
  f1_low, f1_high = interval(f1s)
  return {
    "condition": condition,
    "asked": asked,
    "size": band,
    "n": len(outcomes),
    "iou": float(ious.mean()),
    "low": low,
    "high": high,
    "above 0.7": float((ious > 0.7).mean()),
    "f1": float(f1s.mean()),
    "f1 low": f1_low,
    "f1 high": f1_high,
    "warned": float(doubts.mean()),
    "iou warned": float(ious[doubts].mean()) if doubts.any() else None,
    "iou not warned": float(ious[~doubts].mean()) if not doubts.all() else None,
    "seconds": float(np.median([o.seconds for o in outcomes])),
  }


def rows(photos: list[Photo], cutouts: list[Cutout], n: int, seed: int) -> Iterator[dict]:
  """All conditions, and for clean pictures each size."""
  for condition in ("clean", *STRESS):
    for asked in ASKED if condition == "clean" else ("box", "point"):
      made = cases(photos, cutouts, n, seed, condition)  # Anew: a call draws from a case's rng.
      outcomes = [ask(case, asked) for case in made]
      yield row(condition, asked, "all", outcomes)
      for band in HEIGHTS if condition == "clean" else ():
        these = [o for o, case in zip(outcomes, made, strict=True) if case.band == band]
        yield row(condition, asked, band, these)


def told(r: dict) -> str:
  """A row as it is printed."""
  number = lambda x: "    -" if x is None else f"{x:5.2f}"
  return (
    f"{r['condition']:9}{r['asked']:8}{r['size']:8}{r['n']:4}  {r['iou']:.3f}"
    f" [{r['low']:.3f}, {r['high']:.3f}]  {r['above 0.7']:4.0%}  {r['f1']:.3f}"
    f" [{r['f1 low']:.3f}, {r['f1 high']:.3f}]  {r['warned']:4.0%} {number(r['iou warned'])}"
    f" {number(r['iou not warned'])}  {r['seconds']:.2f}"
  )


def cost(size: tuple[int, int], asked: str) -> dict:
  """Seconds of the CPU and megabytes that a call takes in this new process, packages imported."""
  cv2.setNumThreads(1)
  small = _disc((120, 160))
  ask(small, asked)
  case = _disc(size)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  outcome = ask(case, asked)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  return {
    "size": f"{size[1]} x {size[0]}",
    "asked": asked,
    "seconds": outcome.seconds,
    "megabytes": grown * 1024 / 1e6,  # Linux counts in KiB.
    "iou": outcome.iou,
  }


def _disc(size: tuple[int, int]) -> Case:
  """A disc that fills a third of the height, on noise."""
  height, width = size
  y, x = np.ogrid[:height, :width]
  truth = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 6) ** 2
  pixels = np.random.default_rng(0).integers(60, 90, (height, width, 3), np.uint8)
  pixels[truth] += np.uint8(90)
  return Case(pixels=pixels, truth=truth, band="", rng=np.random.default_rng(0))


def costs() -> list[dict]:
  """Each in a process of its own: the peak of one would hide the next."""
  found = []
  for size in SIZES:
    for asked in ("box", "point"):
      with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found.append(pool.submit(cost, size, asked).result())
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--n", type=int, default=60, help="pictures a row")
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--split", default="test", choices=pictures.SPLITS)
  parser.add_argument("--pictures", type=Path, default=None)
  parser.add_argument("--out", type=Path, default=Path("runs/segment"))
  args = parser.parse_args()
  cv2.setNumThreads(1)
  photos = list(pictures.photos(args.split, args.pictures))
  cutouts = list(pictures.cutouts(args.split, args.pictures))
  print(f"split {args.split}: {len(photos)} photos, {len(cutouts)} cut-outs")
  print(
    f"{'condition':9}{'asked':8}{'size':8}   n  IoU   95% interval    >0.7  F1    95% interval"
    "    warned: IoU, else  seconds"
  )
  found = []
  for r in rows(photos, cutouts, args.n, args.seed):
    found.append(r)
    print(told(r), flush=True)
  prices = costs()
  for p in prices:
    print(
      f"{p['size']:12}{p['asked']:6}{p['seconds']:6.2f} s {p['megabytes']:7.0f} MB"
      f"  IoU {p['iou']:.3f}"
    )
  print(json.dumps(record(args.out, "segment", {"rows": found, "costs": prices})))


if __name__ == "__main__":
  main()
