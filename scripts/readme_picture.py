"""Draws assets/readme.png: of three kinds the first held-out question that is answered right.

python scripts/readme_picture.py --model assets/tiny-vl --out assets/readme.png
"""

import argparse
from pathlib import Path

import jax
from PIL import Image, ImageDraw, ImageFont

from configs import common, evaluate
from pixelis_jax import agent, sampler
from pixelis_jax.algo.answers import equal
from pixelis_jax.evaluate import made
from pixelis_jax.types import Trajectory

KINDS = ("framed", "shape", "clock")  # Each needs other tools.
HEIGHT, GAP, LINE, WIDTH = 150, 10, 21, 1000


def row(trajectory: Trajectory) -> Image.Image:
  """What was shown, from left to right; below it the question, each call and what it said."""
  task = trajectory.task
  given = [Image.fromarray(image) for image in task.images]
  given += [Image.fromarray(video.frames[0]) for video in task.videos]
  for picture in trajectory.pictures[:1]:  # Where it looked first.
    box = (picture.box.x0, picture.box.y0, picture.box.x1, picture.box.y1)
    ImageDraw.Draw(given[picture.source]).rectangle(box, outline="white", width=5)
  shown = [scaled(image) for image in given]
  shown += [scaled(Image.fromarray(picture.pixels)) for picture in trajectory.pictures]
  told = [task.question]
  for step in trajectory.steps[:-1]:
    arguments = ", ".join(f"{name}={value}" for name, value in step.call.arguments.items())
    said = step.result.error or step.result.text
    told.append(f"{step.call.name}({arguments}): {' '.join(said.split())}")
  told.append(f"It answers: {trajectory.answer}.")

  sheet = Image.new("RGB", (WIDTH, HEIGHT + GAP + LINE * len(told) + 2 * GAP), "white")
  draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(size=16), 0
  for image in shown:
    sheet.paste(image, (left, 0))
    left += image.width + GAP
  for i, line in enumerate(told):
    while draw.textlength(line, font=font) > WIDTH:
      line = line.removesuffix(" ...")[:-1] + " ..."
    draw.text((0, HEIGHT + GAP + LINE * i), line, fill="black", font=font)
  return sheet


def scaled(image: Image.Image) -> Image.Image:
  """To `HEIGHT`."""
  size = round(image.width * HEIGHT / image.height), HEIGHT
  return image.resize(size, Image.Resampling.LANCZOS)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="assets/tiny-vl")
  parser.add_argument("--out", type=Path, default=Path("assets/readme.png"))
  args = parser.parse_args()
  c = evaluate.get_config("tools")
  c.model.path = args.model
  policy = sampler.load_policy(c.model)
  asked = common.scenes("held_out", n=60, seed=7)
  asked.kinds = KINDS
  asked = made(asked)
  generate = policy.sampler.bind(policy.params, key=jax.random.key(0), version=0, temperature=0.0)
  limits = agent.Limits(**c.limits)
  played = agent.play(list(asked), generate=generate, run=policy.tools.run, limits=limits)
  right = [t for t in played if equal(t.answer or "", t.task.answer)]
  rows = [row(next(t for t in right if t.task.kind == kind)) for kind in KINDS]
  sheet = Image.new("RGB", (WIDTH, sum(drawn.height for drawn in rows)), "white")
  top = 0
  for drawn in rows:
    sheet.paste(drawn, (0, top))
    top += drawn.height
  sheet.save(args.out, optimize=True)
  print(f"wrote {args.out}")


if __name__ == "__main__":
  main()
