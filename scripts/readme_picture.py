"""Draws assets/readme.png: held-out questions, where the policy looked, what it saw and said.

python scripts/readme_picture.py --model assets/tiny-vl --out assets/readme.png
"""

import argparse
from pathlib import Path

import jax
from PIL import Image, ImageDraw, ImageFont

from configs import common
from pixelis_jax import agent, evaluate, sampler
from pixelis_jax.data.scenes import KINDS
from pixelis_jax.types import Trajectory

SIDE, GAP, TEXT = 300, 12, 84


def panel(trajectory: Trajectory) -> Image.Image:
  """The scene with the looked-at box, the crop beside it, question and answer below."""
  task = trajectory.task
  sheet = Image.new("RGB", (2 * SIDE + GAP, SIDE + TEXT), "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=19)
  whole = Image.fromarray(task.images[0])
  scale = SIDE / whole.width
  sheet.paste(whole.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (0, 0))
  pictures = trajectory.pictures
  for picture in pictures[:1]:
    box = picture.box
    edges = tuple(round(scale * edge) for edge in (box.x0, box.y0, box.x1, box.y1))
    draw.rectangle(edges, outline="white", width=3)
    crop = Image.fromarray(picture.pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    sheet.paste(crop, (SIDE + GAP, 0))
  draw.text((0, SIDE + 6), task.question, fill="black", font=font)
  call = f"zoom_in {list(trajectory.steps[0].call.arguments['bbox_2d'])}" if pictures else "no look"
  said = f"{call}, then answers {trajectory.answer} (truth {task.answer})"
  draw.text((0, SIDE + 36), said, fill="black", font=font)
  return sheet


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="assets/tiny-vl")
  parser.add_argument("--out", type=Path, default=Path("assets/readme.png"))
  args = parser.parse_args()
  policy = sampler.load_policy(common.model(args.model))
  asked = evaluate.made(common.scenes("held_out", n=24, seed=7))
  first = [next(task for task in asked if task.kind == kind) for kind in KINDS]
  generate = policy.sampler.bind(policy.params, key=jax.random.key(0), version=0, temperature=0.0)
  limits = agent.Limits(**common.limits())
  panels = [
    panel(t) for t in agent.play(first, generate=generate, run=policy.tools.run, limits=limits)
  ]
  width = sum(p.width for p in panels) + 2 * GAP * (len(panels) - 1)
  sheet = Image.new("RGB", (width, panels[0].height), "white")
  for i, drawn in enumerate(panels):
    sheet.paste(drawn, (i * (drawn.width + 2 * GAP), 0))
  sheet.save(args.out, optimize=True)
  print(f"wrote {args.out}")


if __name__ == "__main__":
  main()
