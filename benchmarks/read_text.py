"""How well READ_TEXT reads: character error rates on rendered text and on photos; time and memory.

    python benchmarks/read_text.py --n 16 --seed 1 --tessdata FOLDER --photos FOLDER --out runs/read

A page has four lines of words, or every second one of random letters and digits, in the fonts of
data/words.py, with a contrast of at least 4.5. Character error rate (CER): Levenshtein distance
over the truth's length, runs of white space taken as one space; the order of lines counts. Means
over n images with 95% bootstrap intervals, both engines on the same images. --tessdata holds
eng.traineddata (Debian's tesseract-ocr-eng), --photos scenetext01.jpg and others (Debian's
opencv-doc, doc/examples/text). tools/read.py was tuned on seed 0: report another.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from record import record  # The file beside this one.

from pixelis_jax.data.words import FONTS, WORDS, colors, font
from pixelis_jax.tools import read
from pixelis_jax.tools.sight import Sight
from pixelis_jax.tools.views import IDENTITY, VIEWS, View
from pixelis_jax.types import Pixels, Task, value

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PLAIN = (4.5, 21.0)
PARTS = "sizes degraded tight layouts views photos blank languages costs".split()

PAGE = (
  "Region-based segmentation Let us first determine markers of the coins and the background. These"
  " markers are pixels that we can label unambiguously as either object or background. Here, the"
  " markers are found at the two extreme parts of the histogram of grey values: >>> markers ="
  " np.zeros_like(coins)"
)
# opencv-doc's photos: places in them and what is written there, read by a person.
PHOTOS: dict[str, dict[tuple[int, int, int, int], str]] = {
  "scenetext01.jpg": {
    (258, 18, 442, 268): "NOTICE DOUBLE PARKING PROHIBITED AT ALL TIMES",
    (204, 498, 254, 554): "The Washington Post",
  },
  "scenetext02.jpg": {
    (425, 600, 910, 915): "Sports Centre Wivenhoe Park Conference Centre Car Parks"
  },
  "scenetext03.jpg": {(107, 525, 622, 632): "the copy centre"},
  "scenetext04.jpg": {(394, 410, 580, 464): "GM 125", (664, 348, 748, 408): "Gmmco"},
  "scenetext05.jpg": {(78, 166, 236, 225): "NO PARKING", (467, 307, 702, 397): "NO PARKING"},
  "scenetext06.jpg": {
    (283, 148, 340, 217): "priory galleries at the ship",
    (232, 280, 598, 325): "priory galleries at the ship",
  },
  "scenetext_word01.jpg": {(0, 0, 109, 32): "CHINA"},
  "scenetext_word02.jpg": {(0, 0, 242, 102): "HERE"},
  "scenetext_word03.jpg": {(0, 0, 234, 74): "riser"},
  "scenetext_word04.jpg": {(0, 0, 487, 121): "Produkt"},
}
# Sentences that hold every letter of their language.
PANGRAMS = {
  "en": "The quick brown fox jumps over the lazy dog|Pack my box with five dozen liquor jugs",
  "de": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich|Ärger Öl Übung",
  "fr": "Voix ambiguë d'un cœur qui au zéphyr préfère les jattes de kiwis|Ça va à l'île, Évêque",
  "es": "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío|Dónde está el niño",
  "pt": "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim queixoso|põe açúcar no chá, Não",
  "it": "Ma la volpe, col suo balzo, ha raggiunto il quieto Fido|Perché così è già più lassù, È",
  "nl": "Pa wijze lynx bezag vroom het fikse aquaduct|Geëerde reünie, coördinatie, één café, ruïne",
  "da": "Quizdeltagerne spiste jordbær med fløde, mens cirkusklovnen Walther spillede|Århus Østen",
  "no": "Vår sære Zulu fra badeøya spilte jo whist og quickstep i min taxi|Høvdingens kjære Ås",
  "sv": "Yxskaftbud, ge vår WC-zonmö IQ-hjälp|Flygande bäckasiner söka hwila på mjuka tuvor",
  "fi": "Törkylempijävongahdus|Albert osti fagotin ja töräytti puhkuvan melodian. Äiti",
  "pl": "Pchnąć w tę łódź jeża lub ośm skrzyń fig|Zażółć gęślą jaźń. Łódź, Żółw, Śnieg, Ćma",
  "cs": "Příliš žluťoučký kůň úpěl ďábelské ódy|Nechť již hříšné saxofony ďáblů rozezvučí síň",
  "hu": "Árvíztűrő tükörfúrógép|Egy hűtlen vejét fülöncsípő, dühös mexikói úr Wesselényinél mázol",
  "ro": "Muzicologă în bej vând whisky și tequila, preț fix|Gheorghe a reușit. Țara Șase În",
  "hr": "Gojazni đačić s biciklom drži hmelj i finu vatu u džepu nošnje|Čaša, Šuma, Žaba, Ćup",
  "tr": "Pijamalı hasta yağız şoföre çabucak güvendi|Öküz ajan hapse düştü yavrum. İstanbul Şile",
  "zh": "敏捷的棕色狐狸跳过了懒狗|天地玄黄宇宙洪荒日月盈昃|臺灣國語教學發展學會",
  "ja": "いろはにほへとちりぬるをわかよたれそつねならむ|東京都渋谷区でコーヒーを飲みました",
}
# Photos without writing, in scikit-image.
BLANK = (
  "astronaut camera chelsea coffee coins rocket brick grass gravel horse moon hubble_deep_field"
  " immunohistochemistry retina"
).split()


@value
class Case:
  """An image to be read, in one condition of a group, and what is written in it, or in `box`."""

  group: str
  condition: str
  pixels: Pixels
  truth: str
  box: tuple[int, int, int, int] | None = None
  view: View = IDENTITY
  language: str | None = None


def distance(a: str, b: str) -> int:
  """Levenshtein's: the fewest characters to insert, delete and replace."""
  row = np.arange(len(b) + 1)
  letters = np.array([*b])
  for i, letter in enumerate(a, 1):
    # With insertions: the least of what stands to the left, plus how far away it is.
    best = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
    best = np.concatenate([[i], best])
    row = np.minimum.accumulate(best - np.arange(len(best))) + np.arange(len(best))
  return int(row[-1])


def cer(read: str, truth: str) -> float:
  """Can be above 1, where more is read than is written."""
  read, truth = " ".join(read.split()), " ".join(truth.split())
  return distance(read, truth) / len(truth)


def texts(rng: np.random.Generator, count: int, *, words: bool, each: int = 3) -> list[str]:
  """Lines of words of every writing, or of codes that no language helps to guess."""
  if words:
    cases = (str.lower, str.title, str.upper)
    return [
      cases[int(rng.integers(3))](" ".join(rng.choice(WORDS, each, replace=False)))
      for _ in range(count)
    ]
  lengths = rng.integers(4, 9, size=(count, each))
  return [" ".join("".join(rng.choice([*ALPHABET], n)) for n in line) for line in lengths.tolist()]


def page(
  rng: np.random.Generator,
  lines: Sequence[str],
  size: float,
  *,
  name: str = "",
  bounds: tuple[float, float] = PLAIN,
  margin: float = 0.75,
  turn: float = 0.0,
) -> Pixels:
  """The lines below each other, `margin` ems from the edge, turned by degrees on larger ground."""
  face = font(name or str(rng.choice([*FONTS])), size)
  ink, ground = colors(rng, bounds)
  boxes = [face.getbbox(line) for line in lines]
  left, right = min(b[0] for b in boxes), max(b[2] for b in boxes)
  step = round(1.4 * size)
  top, bottom = boxes[0][1], boxes[-1][3] + step * (len(lines) - 1)
  edge = round(margin * size)
  sides = round(right - left) + 2 * edge, round(bottom - top) + 2 * edge
  image = Image.new("RGB", sides, ground)
  for i, line in enumerate(lines):
    place = edge - left, edge - top + i * step
    ImageDraw.Draw(image).text(place, line, fill=ink, font=face)
  if turn:
    image = image.rotate(turn, Image.Resampling.BICUBIC, expand=True, fillcolor=ground)
  return np.array(image)


def pages(
  group: str,
  condition: str,
  n: int,
  seed: int,
  size: float,
  *,
  kinds: tuple[bool, ...] = (True, False),
  change: Callable[[Pixels, np.random.Generator], Pixels] = lambda pixels, rng: pixels,
  **settings: object,
) -> Iterator[Case]:
  """n pages, by turns of words and codes; the same texts, fonts and colours in every condition."""
  for i in range(n):
    rng = np.random.default_rng([seed, i])
    lines = texts(rng, 4, words=kinds[i % len(kinds)])
    pixels = change(page(rng, lines, size, **settings), rng)
    yield Case(group=group, condition=condition, pixels=pixels, truth=" ".join(lines))


def blurred(pixels: Pixels, rng: np.random.Generator, *, sigma: float) -> Pixels:
  """Gaussian, in pixels."""
  return np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(pixels: Pixels, rng: np.random.Generator, *, sigma: float) -> Pixels:
  """Gaussian of each channel, in levels of 256."""
  return np.clip(np.rint(pixels + rng.normal(0, sigma, pixels.shape)), 0, 255).astype(np.uint8)


def sizes(n: int, seed: int) -> Iterator[Case]:
  """Clean pages: letters of 6 to 96 pixels an em, and each font."""
  for kind, words in (("words", True), ("codes", False)):
    yield from pages("text at 16 px", kind, n, seed, 16, kinds=(words,))
  for size in (6, 7, 8, 10, 12, 16, 24, 48, 96):
    yield from pages("font size, px", f"{size}", n, seed, size)
  for name in FONTS:
    yield from pages("font at 16 px", name, n, seed, 16, name=name)


def degraded(n: int, seed: int) -> Iterator[Case]:
  """Letters of 24 pixels an em, one thing at a time."""
  for turn in (-30, -10, 5, 10, 30, 45, 90, 180):
    yield from pages("turned, degrees", f"{turn:+d}", n, seed, 24, turn=turn)
  for sigma in (1, 2, 3, 4):
    change = partial(blurred, sigma=sigma)
    yield from pages("blur, sigma in px", f"{sigma}", n, seed, 24, change=change)
  for sigma in (20, 40, 80, 120):
    change = partial(noisy, sigma=sigma)
    yield from pages("noise, sigma of 255", f"{sigma}", n, seed, 24, change=change)
  for low, high in ((1.05, 1.1), (1.1, 1.2), (1.2, 1.5), (1.5, 2.0), (2.0, 4.5)):
    condition = f"{low:g} to {high:g}"
    yield from pages("contrast", condition, n, seed, 24, bounds=(low, high))


def tight(n: int, seed: int) -> Iterator[Case]:
  """Crops as a policy makes them: one word or one character, with little or nothing around it."""
  for kind in ("character", "word", "line"):
    for margin in (0.0, 0.25):
      for i in range(n):
        rng = np.random.default_rng([seed, i])
        words = texts(rng, 1, words=i % 2 == 0, each=3 if kind == "line" else 1)[0]
        text = str(rng.choice([*"ABCDEFGHKLMNPRTUVXY2346789"])) if kind == "character" else words
        size = float(rng.choice([10, 16, 24, 48, 96]))
        pixels = page(rng, [text], size, margin=margin)
        condition = f"{kind}, {margin:g} em around"
        yield Case(group="tight crop", condition=condition, pixels=pixels, truth=text)


def layouts(n: int, seed: int) -> Iterator[Case]:
  """Two columns of prose under a title; and a receipt, whose rows are read across."""
  for i in range(n):
    rng = np.random.default_rng([seed, i])
    face = font(str(rng.choice([*FONTS])), 20)
    title, left, right = (texts(rng, k, words=True, each=4) for k in (1, 6, 6))
    gutter = 40 + round(max(face.getlength(line) for line in left))
    placed = [(title[0], 100, 20)]
    placed += [(line, 20, 80 + 28 * k) for k, line in enumerate(left)]
    placed += [(line, 20 + gutter, 80 + 28 * k) for k, line in enumerate(right)]
    yield _placed("two columns", placed, face, 2 * gutter + 100)
    words = rng.choice(WORDS, 8, replace=False).tolist()
    placed = []
    for k, (word, cents) in enumerate(zip(words, rng.integers(100, 9999, 8).tolist(), strict=True)):
      price = f"{cents / 100:.2f}"
      placed += [(word, 20, 20 + 32 * k), (price, 380 - round(face.getlength(price)), 20 + 32 * k)]
    yield _placed("receipt", placed, face, 400)


def _placed(
  condition: str, placed: list[tuple[str, int, int]], face: ImageFont.FreeTypeFont, width: int
) -> Case:
  paper = Image.new("RGB", (width, 60 + max(y for _, _, y in placed)), "white")
  for text, x, y in placed:
    ImageDraw.Draw(paper).text((x, y), text, fill="black", font=face)
  truth = " ".join(text for text, _, _ in placed)
  return Case(group="layout", condition=condition, pixels=np.array(paper), truth=truth)


def viewed(n: int, seed: int) -> Iterator[Case]:
  """A line in a close box, under the views of a ballot."""
  for view in VIEWS:
    for i in range(n):
      rng = np.random.default_rng([seed, i])
      (line,) = texts(rng, 1, words=i % 2 == 0)
      pixels = page(rng, [line], 20, margin=4)
      height, width = pixels.shape[:2]
      box = (75, 75, width - 75, height - 75)  # A quarter of an em around it.
      yield Case(group="view", condition=view.name, pixels=pixels, truth=line, box=box, view=view)


def languages(zh: Path | None, ja: Path | None) -> Iterator[Case]:
  """Sentences with all letters of a language, in three fonts, without and with its name given."""
  for language, sentences in PANGRAMS.items():
    files = {"zh": zh, "ja": ja}
    if language in files and files[language] is None:
      continue
    for size in (16, 24, 32):
      for name in ("DejaVu Sans", "DejaVu Serif", "STIX"):
        file = files.get(language)
        face = font(name, size) if file is None else ImageFont.truetype(file, size)
        placed = [(s, 20, 20 + 2 * size * k) for k, s in enumerate(sentences.split("|"))]
        width = 40 + round(max(face.getlength(s) for s, _, _ in placed))
        case = _placed("", placed, face, width)
        for given in (None, language):
          yield Case(
            group="language, not given" if given is None else "language, given",
            condition=language,
            pixels=case.pixels,
            truth=case.truth,
            language=given,
          )


def photos(folder: Path | None) -> Iterator[Case]:
  """Real pictures: a page of scikit-image, and regions of signs in small and in capital letters."""
  printed = np.repeat(skimage.data.page()[..., None], 3, axis=-1)
  yield Case(group="photo", condition="skimage.data.page", pixels=printed, truth=PAGE)
  for name, regions in PHOTOS.items() if folder else ():
    pixels = np.array(Image.open(folder / name).convert("RGB"))
    for box, truth in regions.items():
      yield Case(group="photo", condition=truth, pixels=pixels, truth=truth, box=box)
    everything = " ".join(regions.values())
    yield Case(group="whole photo", condition=name, pixels=pixels, truth=everything)


def blank(n: int, seed: int) -> Iterator[Case]:
  """Photos without writing, and regions of them: what is read there is made up."""
  whole = []
  for name in BLANK:
    pixels = getattr(skimage.data, name)()
    pixels = (pixels * 255 if pixels.dtype == bool else pixels).astype(np.uint8)
    whole.append(pixels[..., :3] if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1))
    yield Case(group="nothing written", condition="photo", pixels=whole[-1], truth="")
  rng = np.random.default_rng(seed)
  for _ in range(n):
    pixels = whole[int(rng.integers(len(whole)))]
    height = int(rng.integers(24, 160))
    width = min(int(height * rng.uniform(1, 4)), pixels.shape[1])
    y, x = (
      int(rng.integers(pixels.shape[0] - height)),
      int(rng.integers(pixels.shape[1] - width + 1)),
    )
    box = (x, y, x + width, y + height)
    yield Case(group="nothing written", condition="region", pixels=pixels, truth="", box=box)


def said(case: Case, engine: str) -> list[str]:
  """The lines that the tool tells the policy."""
  task = Task(id="", images=(case.pixels,), question="", answer=None)
  sight = Sight(task=task, results=(), shown_size=lambda h, w: (h, w), view=case.view)
  arguments = {"bbox_2d": [*case.box]} if case.box else {}
  arguments |= {"language": case.language} if case.language else {}
  result = read.read_text(arguments, sight, reader=engine)
  return re.findall(r"^\[[\d, ]+\] \d\.\d\d (.*)$", result.text, re.MULTILINE)


def wrong(case: Case, lines: Sequence[str]) -> float:
  """CER; of a whole photo the share of words not found, of an empty one whether any was."""
  read, truth = " ".join(lines), case.truth
  if case.group == "nothing written":
    return float(bool(read))
  if "photo" in case.group:  # Signs have letters that are neither small nor capital.
    read, truth = read.lower(), truth.lower()
  if case.group == "whole photo":
    words = truth.split()
    return sum(word not in read.split() for word in words) / len(words)
  return cer(read, truth)


def rows(cases: Iterator[Case], engines: Sequence[str]) -> list[dict]:
  """One a condition and engine, in the order in which they come."""
  errors: dict[tuple[str, str, str], list[float]] = {}
  heard: dict[tuple[str, str, str], list[str]] = {}
  for case in cases:
    for engine in engines:
      key = case.group, case.condition, engine
      lines = said(case, engine)
      errors.setdefault(key, []).append(wrong(case, lines))
      heard[key] = lines
  made = []
  for (group, condition, engine), values in errors.items():
    low, high = bootstrap(values)
    row = {"group": group, "condition": condition, "engine": engine, "n": len(values)}
    row |= {"error": float(np.mean(values)), "low": low, "high": high}
    made.append(row | {"read": heard[group, condition, engine]} if len(values) == 1 else row)
  return made


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
  """95% interval of the mean: percentiles over 10,000 resamples, always the same ones."""
  draws = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
  low, high = np.percentile(np.asarray(values)[draws].mean(axis=1), [2.5, 97.5])
  return float(low), float(high)


def cost(engine: str, sides: tuple[int, int], lines: int) -> dict:
  """Median seconds of three calls after a first one, and the peak of memory, of this process."""
  rng = np.random.default_rng(0)
  width, height = sides
  paper = np.full((height, width, 3), 255, np.uint8)
  for k, line in enumerate(texts(rng, lines, words=True)):
    part = page(rng, [line], 16)[:height, :width]
    y, x = k * height // lines, int(rng.integers(width - part.shape[1] + 1))
    paper[y : y + part.shape[0], x : x + part.shape[1]] = part[: height - y]
  started, seconds = time.perf_counter(), []
  for _ in range(4):
    read.lines(paper, engine, None)
    seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  about = {"engine": engine, "width": width, "height": height, "lines": lines}
  return about | {"first": seconds[0], "seconds": float(np.median(seconds[1:])), "gigabytes": peak}


def costs(engines: Sequence[str]) -> list[dict]:
  """Each in a process of its own."""
  spawn = multiprocessing.get_context("spawn")
  made = []
  for engine in engines:
    for sides, lines in (
      ((320, 60), 1),
      ((640, 480), 8),
      ((1280, 960), 16),
      ((2000, 2000), 40),
      ((6000, 4000), 40),
    ):
      with ProcessPoolExecutor(1, spawn) as pool:
        made.append(pool.submit(cost, engine, sides, lines).result())
  return made


def table(rows: list[dict], engines: Sequence[str]) -> str:
  """Markdown: a row a condition, a column an engine."""
  lines = [f"| group | condition | n | {' | '.join(engines)} |", "|---" * (len(engines) + 3) + "|"]
  for group, condition, n in dict.fromkeys((r["group"], r["condition"], r["n"]) for r in rows):
    cells = [
      f"{r['error']:.3f}" + (f" ({r['low']:.3f} to {r['high']:.3f})" if n > 1 else "")
      for r in rows
      if (r["group"], r["condition"]) == (group, condition)
    ]
    lines.append(f"| {group} | {condition} | {n} | {' | '.join(cells)} |")
  return "\n".join(lines)


def cost_table(rows: list[dict]) -> str:
  """Markdown."""
  lines = [
    "| engine | pixels | lines | seconds | first call | peak GB |",
    "|---|---|---|---|---|---|",
  ]
  lines += [
    f"| {r['engine']} | {r['width']} x {r['height']} | {r['lines']} | {r['seconds']:.2f} |"
    f" {r['first']:.2f} | {r['gigabytes']:.2f} |"
    for r in rows
  ]
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--n", type=int, default=16, help="images a condition")
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
  parser.add_argument("--tessdata", type=Path, help="also read with Tesseract; its data's folder")
  parser.add_argument("--photos", type=Path)
  parser.add_argument("--zh", type=Path, help="a font with Chinese letters")
  parser.add_argument("--ja", type=Path, help="a font with Japanese letters")
  parser.add_argument("--out", type=Path, default=Path("runs/read_text"))
  args = parser.parse_args()
  engines = ["rapidocr"]
  if args.tessdata:
    os.environ["TESSDATA_PREFIX"] = str(args.tessdata)
    engines.append("tesseract")
  cases = {
    "sizes": sizes(args.n, args.seed),
    "degraded": degraded(args.n, args.seed),
    "tight": tight(args.n, args.seed),
    "layouts": layouts(args.n, args.seed),
    "views": viewed(args.n, args.seed),
    "photos": photos(args.photos),
    "blank": blank(args.n, args.seed),
  }
  found = [row for part in cases if part in args.only for row in rows(cases[part], engines)]
  if "languages" in args.only:  # Tesseract would need the data of each.
    found += rows(languages(args.zh, args.ja), ["rapidocr"])
  spent = costs(engines) if "costs" in args.only else []
  print(table(found, engines))
  print(cost_table(spent))
  print(json.dumps(record(args.out, "read_text", {"rows": found, "costs": spent})))


if __name__ == "__main__":
  main()
