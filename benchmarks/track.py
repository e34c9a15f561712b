"""How well TRACK_OBJECT follows: success, MOTA and HOTA on films with exact boxes; time a frame.

    python benchmarks/track.py --n 40 --seed 1 --pictures FOLDER --methods csrt --out runs/track

A film has two cut-outs that move and change size over a photo, the camera pans in half of them; the
upper object is followed from its exact box in the first frame. Conditions:
  clean      48 frames, 12 a second; only the frame's edge hides it
  covered    a post hides 75% of it for 10 to 20 of them
  hidden     a post hides all of it for as long
  leaves     it goes out of the frame
  sparse     the clean course in 12 frames: 3 a second
`csrt alone` is OpenCV's tracker without our check of what it follows: it never says it is lost.

success  area under the success plot of OTB (doi 10.1109/TPAMI.2014.2388226): the mean over 21
         thresholds 0 to 1 of the share of frames after the first with an IoU above it. A frame
         counts if the object is in it, hidden or not; a lost object has its last known box
MOTA     doi 10.1155/2008/246309, at an IoU of 0.5; HOTA: doi 10.1007/s11263-020-01375-2. The object
         is there in frames in which some of it is seen; a box is told unless it says it is lost
Means over n films with 95% bootstrap intervals; all methods see the same films. Time: the median
film's CPU milliseconds a frame on one thread. --pictures holds what scripts/fetch_pictures.py
fetches; without it cut-outs are shapes and digits. tools/track.py was tuned on split dev.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32
from record import record  # The file beside this one.
from scipy.optimize import linear_sum_assignment

from pixelis_jax.data import composites, films, pictures
from pixelis_jax.tools import track
from pixelis_jax.types import Pixels

# Of several objects in F frames, corners x0, y0, x1, y1; NaN where there is none.
Boxes = Float[np.ndarray, "F objects 4"]
Tracked = tuple[Float32[np.ndarray, "F 4"], Bool[np.ndarray, " F"]]

CONDITIONS = ("clean", "covered", "hidden", "leaves", "sparse")
ALONE = "csrt alone"
ALPHAS = np.arange(1, 20) / 20
_EPS = 1e-9


def success(truth: Float[np.ndarray, "F 4"], boxes: Float[np.ndarray, "F 4"]) -> float:
  """Area under the success plot, over frames in which there is a truth."""
  overlaps = overlap(truth[:, None], boxes[:, None])[:, 0, 0][~np.isnan(truth[:, 0])]
  return float(np.mean([(overlaps > t).mean() for t in np.linspace(0, 1, 21)]))


def overlap(truth: Boxes, told: Boxes) -> Float[np.ndarray, "F objects tracks"]:
  """IoU of each object with each track in each frame; 0 where one of them is not there."""
  a, b = truth[:, :, None], told[:, None]
  low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
  inter = np.clip(high - low, 0, None).prod(-1)
  areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
  return np.nan_to_num(inter / (areas[0] + areas[1] - inter))


def mota(truth: Boxes, told: Boxes, threshold: float = 0.5) -> float:
  """1 - (misses + false boxes + switches of identity) / boxes of the truth.

  In each frame an object keeps the track it had in the one before where their IoU still reaches the
  threshold; the rest is matched for the greatest total IoU. Frames without objects or tracks do not
  come between. As trackeval/metrics/clear.py,
  github.com/JonathonLuiten/TrackEval.
  """
  similar = overlap(truth, told)
  there, shown = ~np.isnan(truth[..., 0]), ~np.isnan(told[..., 0])
  hits = switches = 0
  ever = np.full(truth.shape[1], -1)  # The track an object had last,
  before = ever.copy()  # and in the frame before.
  for f in np.flatnonzero(there.any(1) & shown.any(1)):
    row = similar[f]
    score = row + 1000 * (np.arange(told.shape[1]) == before[:, None])
    score[row < threshold - _EPS] = 0
    objects, tracks = linear_sum_assignment(-score)
    good = score[objects, tracks] > 0
    objects, tracks = objects[good], tracks[good]
    hits += len(objects)
    switches += int(((ever[objects] >= 0) & (ever[objects] != tracks)).sum())
    ever[objects] = tracks
    before = np.full_like(ever, -1)
    before[objects] = tracks
  misses, false = there.sum() - hits, shown.sum() - hits
  return float(1 - (misses + false + switches) / there.sum())


def hota(truth: Boxes, told: Boxes) -> float:
  """Mean over the 19 thresholds of the root of detection times association accuracy.

  Pairs of a frame are matched for the greatest sum of IoU times how well the two go together in the
  whole film. As trackeval/metrics/hota.py, github.com/JonathonLuiten/TrackEval.
  """
  similar = overlap(truth, told)
  there, shown = ~np.isnan(truth[..., 0]), ~np.isnan(told[..., 0])
  sums = similar.sum(1, keepdims=True) + similar.sum(2, keepdims=True) - similar
  together = np.divide(similar, sums, out=np.zeros_like(similar), where=sums > _EPS).sum(0)
  counts = there.sum(0)[:, None] + shown.sum(0)[None, :]
  aligned = together / np.maximum(counts - together, _EPS)
  pairs = np.zeros((len(ALPHAS), *aligned.shape))
  for row in similar:
    objects, tracks = linear_sum_assignment(-aligned * row)
    reached = row[objects, tracks] >= ALPHAS[:, None] - _EPS
    pairs[:, objects, tracks] += reached
  hits = pairs.sum((1, 2))
  detection = hits / (there.sum() + shown.sum() - hits)
  association = (pairs * pairs / np.maximum(counts - pairs, 1)).sum((1, 2)) / np.maximum(hits, 1)
  return float(np.sqrt(detection * association).mean())


def film(split: str, folder: Path | None, seed: int, number: int, condition: str):
  """The same objects, photo and course in all conditions of a number, as far as they allow."""
  rng = np.random.default_rng([seed, number])
  photos, cutouts = pictures.photos(split, folder), pictures.cutouts(split, folder)
  photo = photos[rng.integers(len(photos))]
  things = [cutouts[i] for i in rng.choice(len(cutouts), 2, replace=False)]
  height = rng.uniform(0.18, 0.4)
  heights = height, height * rng.uniform(0.75, 1.33)
  other = films.wander(rng, travel=rng.uniform(0.2, 0.5), heights=(0.3, 0.3), curved=True)
  curved = bool(rng.random() < 0.5)
  course = films.wander(rng, travel=rng.uniform(0.3, 0.55), heights=heights, curved=curved)
  beyond = -0.4 if rng.random() < 0.5 else 1.4
  start, length = int(rng.integers(10, 18)), int(rng.integers(10, 21))
  pan = tuple(rng.uniform(-0.2, 0.2, 2)) if rng.random() < 0.5 else (0.0, 0.0)
  if condition == "leaves":
    end = beyond, course.end[1]
    course = films.Course(course.start, course.bend, end, course.heights)
  share = {"covered": 0.75, "hidden": 1.0}.get(condition)
  posts = [composites.Occlusion(1, start, start + length, share)] if share else []
  frames, rate = (12, 3.0) if condition == "sparse" else (48, 12.0)
  return films.film(
    rng, photo, things, [other, course], frames=frames, rate=rate, occlusions=posts, pan=pan
  )


def alone(frames: np.ndarray, box: np.ndarray) -> Tracked:
  """What OpenCV's CSRT says in every frame."""
  guess, boxes = track.TRACKERS["csrt"](frames[0], box), [box]
  for frame in frames[1:]:
    place = guess(frame, boxes[-1])
    boxes.append(boxes[-1] if place is None else place)
  return np.stack(boxes), np.ones(len(boxes), bool)


def measure(made: films.Film, run: Callable[[Pixels, np.ndarray], Tracked]) -> dict:
  """Of the upper object, in the frames after the first."""
  target = made.tracks[1]
  nothing = [np.nan] * 4
  truth = np.array(
    [
      nothing if mask is None else [mask.box.x0, mask.box.y0, mask.box.x1, mask.box.y1]
      for mask in target.masks
    ]
  )
  started = time.process_time()
  boxes, seen = run(made.video.frames, truth[0].astype(np.float32))
  spent = time.process_time() - started
  height, width = made.video.frames.shape[1:3]
  boxes = np.clip(boxes, 0, [width, height, width, height])  # As the truth's are.
  there = np.where(target.shares[:, None] > 0, truth, np.nan)[1:, None]
  told = np.where(seen[:, None], boxes, np.nan)[1:, None]
  return {
    "success": success(truth[1:], boxes[1:]),
    "mota": mota(there, told),
    "hota": hota(there, told),
    "milliseconds": 1000 * spent / (len(boxes) - 1),
  }


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
  """95% interval of the mean: percentiles over 10,000 resamples, always the same ones."""
  draws = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
  low, high = np.percentile(np.asarray(values)[draws].mean(axis=1), [2.5, 97.5])
  return float(low), float(high)


def rows(args: argparse.Namespace) -> list[dict]:
  """One a condition and method."""
  found: dict[tuple[str, str], list[dict]] = {}
  for condition in args.conditions:
    for number in range(args.n):
      made = film(args.split, args.pictures, args.seed, number, condition)
      for method in args.methods:  # Interleaved: all see the machine in the same state.
        run = lambda frames, box, method=method: (
          alone(frames, box) if method == ALONE else track.follow(frames, box, method)
        )
        found.setdefault((condition, method), []).append(measure(made, run))
  table = []
  for (condition, method), results in found.items():
    row = {"condition": condition, "method": method, "n": len(results)}
    row["milliseconds"] = float(np.median([r["milliseconds"] for r in results]))
    for name in ("success", "mota", "hota"):
      values = [r[name] for r in results]
      row[name] = [float(np.mean(values)), *bootstrap(values)]
    table.append(row)
  return table


def table(rows: list[dict]) -> str:
  """Markdown."""
  lines = ["| condition | method | n | success | MOTA | HOTA | ms a frame |", "|---" * 7 + "|"]
  for row in rows:
    spans = (row["success"], row["mota"], row["hota"])
    cells = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in spans]
    lines.append(
      f"| {row['condition']} | {row['method']} | {row['n']} | {' | '.join(cells)} |"
      f" {row['milliseconds']:.1f} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--n", type=int, default=40, help="films a condition")
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--split", choices=pictures.SPLITS, default="test")
  parser.add_argument("--pictures", type=Path, help="folder of scripts/fetch_pictures.py")
  methods = (*track.TRACKERS, ALONE)
  parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
  parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS)
  parser.add_argument("--out", type=Path, default=Path("runs/track"))
  args = parser.parse_args()
  cv2.setNumThreads(1)
  found = rows(args)
  print(table(found))
  print(json.dumps(record(args.out, "track", {"split": args.split, "rows": found})))


if __name__ == "__main__":
  main()
