"""report.html: one self-contained page about a run, from what its workdir holds."""

import base64
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from PIL import Image

from pixelis_jax.metrics import (
  METRICS,
  METRICS_FILE,
  TRAJECTORIES_FILE,
  entry,
  interval,
  read_lines,
)

RESULT_FILE = "result.json"
REPORT_FILE = "report.html"
SHOWN = 12  # trajectories
THUMBNAIL = 320  # Pixels of a video frame's longer side: a page has a hundred of them.

# A curve's drawing area in SVG units.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 150, 46, 10, 10, 22


def write_report(workdir: str | os.PathLike) -> Path:
  """Writes workdir/report.html and returns its path; the page needs no other file and no network.

  Reads result.json, trajectories.jsonl with its images, and metrics.jsonl there and in the folders
  directly below. Raises FileNotFoundError naming what is missing, ValueError for what is not JSON.
  """
  workdir = Path(workdir)
  for name in (RESULT_FILE, TRAJECTORIES_FILE):
    if not (workdir / name).is_file():
      raise FileNotFoundError(f"{workdir / name} is missing: the report needs it")
  result = _read_result(workdir / RESULT_FILE)
  environment = jinja2.Environment(
    autoescape=True,  # Model text and questions are anybody's.
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  page = environment.from_string(_PAGE).render(
    result=result,
    rows=headline(result),
    facts={k: v for k, v in result.items() if k not in _IN_TABLE and v is not None},
    sections=_curve_sections(workdir),
    trajectories=[
      _card(workdir, t) for t in choose(read_lines(workdir / TRAJECTORIES_FILE), SHOWN)
    ],
    plot={"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _WIDTH - _RIGHT},
  )
  aside = workdir / (REPORT_FILE + ".tmp")
  aside.write_text(page, encoding="utf-8")
  return aside.replace(workdir / REPORT_FILE)


_IN_TABLE = {
  f"{domain}_{when}" for domain in ("shifted", "original") for when in ("before", "after")
} | {"majority_after"}


def headline(result: Mapping[str, object]) -> list[dict]:
  """Rows of the table: accuracy before and after in percent with 95% Wilson intervals over n.

  Raises ValueError naming the fields that the result lacks.
  """
  needed = {"n", *_IN_TABLE} - {"majority_after"}
  if missing := sorted(needed - result.keys()):
    raise ValueError(f"{RESULT_FILE} lacks {missing}")
  n = int(result["n"])
  rows = []
  for domain, title in (("shifted", "Shifted domain"), ("original", "Original domain")):
    before, after = float(result[f"{domain}_before"]), float(result[f"{domain}_after"])
    plain = result.get("majority_after") if domain == "shifted" else None
    rows.append(
      {
        "title": title,
        "before": _accuracy(before, n),
        "after": _accuracy(after, n),
        "change": f"{100 * (after - before):+.1f}",
        "better": after >= before,
        "majority": None if plain is None else _accuracy(float(plain), n),
      }
    )
  return rows


def choose(lines: Sequence[dict], most: int) -> list[dict]:
  """At most `most` of them, evenly spread: first over tags, then over each tag's requests in order.

  Of several samples of one request under one tag the first stands for all. Where a tool would not
  be seen at work, the first that used each tool are taken before all others.
  """
  chosen = _spread(lines, most)
  if _tools(lines) - _tools(chosen):
    first: list[dict] = []
    for line in lines:
      if len(first) < most and _tools([line]) - _tools(first):
        first.append(line)
    taken = {(line["tag"], line["id"]) for line in first}
    others = [line for line in lines if (line["tag"], line["id"]) not in taken]
    chosen = [*first, *_spread(others, most - len(first))]
  order = {id(line): at for at, line in enumerate(lines)}
  return sorted(chosen, key=lambda line: order[id(line)])


def _tools(lines: Sequence[dict]) -> set[str]:
  """Names of those that returned something there."""
  turns = (turn for line in lines for turn in line["turns"])
  return {turn["call"]["name"] for turn in turns if turn["call"] and turn["error"] is None}


def _spread(lines: Sequence[dict], most: int) -> list[dict]:
  by_tag: dict[str, dict[str, dict]] = {}
  for line in lines:
    by_tag.setdefault(line["tag"], {}).setdefault(line["id"], line)
  chosen: list[dict] = []
  left = most
  # The smallest group first: what it can't fill is the others' to share.
  for i, group in enumerate(sorted(by_tag.values(), key=len)):
    take = min(len(group), math.ceil(left / (len(by_tag) - i)))
    items = list(group.values())
    chosen += [items[k * (len(items) - 1) // max(1, take - 1)] for k in range(take)]
    left -= take
  return chosen


def curve(points: Sequence[tuple[int, float | None]]) -> dict | None:
  """SVG geometry of one metric over steps; None where fewer than two values are known.

  A null (it was NaN) breaks the line.
  """
  known = [(x, y) for x, y in points if y is not None]
  if len(known) < 2 or known[0][0] == known[-1][0]:
    return None
  x0, x1 = min(x for x, _ in known), max(x for x, _ in known)
  y0, y1 = _rounded_range(min(y for _, y in known), max(y for _, y in known))
  across = lambda x: _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
  down = lambda y: _TOP + (y1 - y) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)
  lines: list[list[str]] = [[]]
  for x, y in points:
    if y is None:
      lines.append([])
    else:
      lines[-1].append(f"{across(x):.1f},{down(y):.1f}")
  return {
    "lines": [" ".join(line) for line in lines if line],
    "y_ticks": [(down(y), _short(y)) for y in (y0, (y0 + y1) / 2, y1)],
    "x_ticks": [(across(x), str(x)) for x in (x0, x1)],
    "last": _short(known[-1][1]),
  }


def _read_result(path: Path) -> dict:
  try:
    result = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as e:
    raise ValueError(f"{path} is not JSON: {e}") from e
  if not isinstance(result, dict):
    raise ValueError(f"{path} holds a {type(result).__name__}, a JSON object is needed")
  return result


def _accuracy(share: float, n: int) -> dict:
  low, high = interval(round(share * n), n)
  return {"value": f"{100 * share:.1f}", "low": f"{100 * low:.1f}", "high": f"{100 * high:.1f}"}


def _curve_sections(workdir: Path) -> list[dict]:
  """The run's own metrics first, then those of the folders directly below, by name."""
  files = [workdir / METRICS_FILE, *sorted(workdir.glob(f"*/{METRICS_FILE}"))]
  files = [f for f in files if f.is_file()]
  if not files:
    raise FileNotFoundError(f"{workdir / METRICS_FILE} is missing: the report needs it")
  sections = []
  for file in files:
    lines = read_lines(file)
    names = {name: None for line in lines for name in line if name not in ("step", "time")}
    rank = {key: at for at, key in enumerate(METRICS)}
    names = sorted(names, key=lambda name: (rank.get(entry(name), len(rank)), name))
    drawn = []
    for name in names:
      shape = curve([(line["step"], line[name]) for line in lines if name in line])
      if shape is not None:
        drawn.append({"name": name, "about": METRICS.get(entry(name), ""), **shape})
    title = "" if file.parent == workdir else file.parent.name
    sections.append({"title": title, "curves": drawn})
  return sections


def _rounded_range(low: float, high: float) -> tuple[float, float]:
  """A range around both whose ends are short numbers: multiples of 1, 2 or 5 powers of ten."""
  if low == high:
    spread = abs(low) or 1.0
    low, high = low - spread / 2, high + spread / 2
  power = 10.0 ** math.floor(math.log10((high - low) / 2))
  step = next(m * power for m in (1, 2, 5, 10) if m * power * 2 >= high - low)
  return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _short(value: float) -> str:
  return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.1e}"


def _card(workdir: Path, line: Mapping) -> dict:
  """One trajectory as the template takes it: images inlined, boxes with what they lie in.

  A log from before there were videos has neither "videos" nor a picture's "frame".
  """
  pictures = [p for turn in line["turns"] for p in turn["images"]]
  boxes = lambda source, frame=None: [
    p["box"] for p in pictures if (p["source"], p.get("frame")) == (source, frame)
  ]
  return {
    **line,
    "overviews": [
      {**_image(workdir, path), "boxes": boxes(i)} for i, path in enumerate(line["images"])
    ],
    "strips": [
      {
        "count": video["count"],
        "frames": [
          {
            **_thumbnail(workdir, f["path"]),
            "boxes": boxes(i, f["frame"]),
            "clock": _clock(f["time"]),
          }
          for f in video["frames"]
        ],
      }
      for i, video in enumerate(line.get("videos", []))
    ],
    "turns": [
      {**turn, "images": [{**p, **_image(workdir, p["path"])} for p in turn["images"]]}
      for turn in line["turns"]
    ],
    "counts": sorted((line["vote"] or {"counts": {}})["counts"].items(), key=lambda c: -c[1]),
  }


def _clock(seconds: float) -> str:
  """Minutes, seconds and tenths: 67.04 as 1:07.0."""
  tenths = round(10 * seconds)
  return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"


def _image(workdir: Path, name: str) -> dict:
  path = _saved(workdir, name)
  with Image.open(path) as image:
    width, height = image.size
  return {"data": _inlined("png", path.read_bytes()), "width": width, "height": height}


def _thumbnail(workdir: Path, name: str) -> dict:
  """As `_image`, fewer pixels; width and height are the saved image's, which boxes lie in."""
  with Image.open(_saved(workdir, name)) as image:
    width, height = image.size
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    jpeg = io.BytesIO()
    image.save(jpeg, "jpeg", quality=85)
  return {"data": _inlined("jpeg", jpeg.getvalue()), "width": width, "height": height}


def _saved(workdir: Path, name: str) -> Path:
  path = workdir / name
  if not path.is_file():
    raise FileNotFoundError(f"{path} is missing: {TRAJECTORIES_FILE} names it")
  return path


def _inlined(kind: str, data: bytes) -> str:
  return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# No script and no outside file; follows the reader's light or dark.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pixelis_jax run report</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --ink: #1d2433; --soft: #5b6578; --line: #d9dee7; --page: #f6f7f9; --card: #ffffff;
  --accent: #2f6fde; --good: #1a7f4b; --bad: #b4361f; --box: #ff3d7f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ef; --soft: #9aa5b8; --line: #333b49; --page: #14181f; --card: #1c222c;
    --accent: #7aa7ff; --good: #5ac18a; --bad: #f08a72; --box: #ff6b9e;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0; }
p.lead, .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); width: 100%; }
th, td { padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; }
td b { font-size: 1.15rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; margin: 1rem 0 0; }
dl div { min-width: 7rem; } dt { color: var(--soft); font-size: .82rem; } dd { margin: 0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem; }
.plot svg { width: 100%; height: auto; display: block; }
.plot .head { display: flex; justify-content: space-between; align-items: baseline; }
.plot p { margin: .2rem 0 0; font-size: .82rem; color: var(--soft); }
.plot text { font-size: 10px; fill: var(--soft); }
.plot line { stroke: var(--line); }
.plot polyline { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
.trajectory { display: grid; gap: 1rem; grid-template-columns: minmax(200px, 300px) 1fr;
  margin-bottom: 1rem; }
@media (max-width: 640px) { .trajectory { grid-template-columns: 1fr; } }
.trajectory.wide { grid-template-columns: 1fr; }
.strip { grid-column: 1 / -1; }
.strip div { display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fill, minmax(116px, 1fr)); }
figure { margin: 0; } figcaption, .strip p { color: var(--soft); font-size: .8rem; margin: 0; }
.trajectory svg, .crop { width: 100%; height: auto; display: block; border-radius: 4px; }
.shown { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .3rem; }
.crop { width: 140px; image-rendering: pixelated; border: 3px solid var(--box); }
.crop.large { width: 240px; }
.zoom { fill: none; stroke: var(--box); stroke-width: 2.5; vector-effect: non-scaling-stroke; }
.chips { display: flex; flex-wrap: wrap; gap: .35rem; margin: .3rem 0 .6rem; }
.chip { border: 1px solid var(--line); border-radius: 99px; padding: 0 .6rem; font-size: .8rem;
  color: var(--soft); }
.turn { border-left: 3px solid var(--line); padding-left: .8rem; margin: .6rem 0; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, monospace; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .2rem .6rem; align-items: center;
  font-size: .85rem; margin-top: .7rem; max-width: 30rem; }
.bar { background: var(--line); border-radius: 4px; height: .7rem; }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--soft); }
.bar i.won { background: var(--accent); }
</style>
</head>
<body>
{% macro accuracy(a) %}
<b>{{ a.value }}</b> <span class="soft">({{ a.low }} to {{ a.high }})</span>
{%- endmacro %}
{% macro fact(v, form) %}{{ form | format(v) if v is float else v }}{% endmacro %}

<h1>Run report</h1>
<p class="lead">Accuracy in percent on {{ result.n }} held-out questions of each domain, with 95%
Wilson intervals. Labels were used for this table and for the truths shown beside trajectories,
never for learning.</p>

<div class="scroll"><table>
<thead><tr><th>Accuracy</th><th>Before</th><th>After</th><th>Change</th>
<th>Plain majority vote</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td>{{ row.title }}</td>
<td>{{ accuracy(row.before) }}</td><td>{{ accuracy(row.after) }}</td>
<td class="{{ 'good' if row.better else 'bad' }}"><b>{{ row.change }}</b></td>
<td>{% if row.majority %}{{ accuracy(row.majority) }}{% else %}
<span class="soft">not run</span>{% endif %}</td></tr>
{% endfor %}
</tbody>
</table></div>

<dl>
{% for name, value in facts.items() %}
<div><dt>{{ name | replace("_", " ") }}</dt><dd>{{ fact(value, "%.4g") }}</dd></div>
{% endfor %}
</dl>

{% for section in sections %}
<h2>Curves{% if section.title %}: {{ section.title }}{% endif %}</h2>
{% if section.curves %}
<div class="grid">
{% for c in section.curves %}
<div class="card plot">
<div class="head"><h3>{{ c.name }}</h3><span class="soft">last {{ c.last }}</span></div>
<svg viewBox="0 0 {{ plot.width }} {{ plot.height }}" role="img" aria-label="{{ c.name }}">
{% for y, label in c.y_ticks %}
<line x1="{{ plot.left }}" x2="{{ plot.right }}" y1="{{ y | round(1) }}" y2="{{ y | round(1) }}"/>
<text x="{{ plot.left - 6 }}" y="{{ (y + 3.5) | round(1) }}" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for x, label in c.x_ticks %}
<text x="{{ x | round(1) }}" y="{{ plot.height - 6 }}"
 text-anchor="{{ 'start' if loop.first else 'end' }}">{{ label }}</text>
{% endfor %}
{% for line in c.lines %}
<polyline points="{{ line }}"/>
{% endfor %}
</svg>
<p>{{ c.about }}</p>
</div>
{% endfor %}
</div>
{% else %}
<p class="soft">No metric was logged at two steps.</p>
{% endif %}
{% endfor %}

<h2>Trajectories</h2>
<p class="lead">{{ trajectories | length }} of the run, evenly spread, each tool that was used among
them. A frame marks where a tool looked; below its call are its words and what it showed or drew: a
crop, an outline, a path, frames.</p>
{% macro overview(image, about) %}
<svg viewBox="0 0 {{ image.width }} {{ image.height }}" role="img" aria-label="{{ about }}">
<image href="{{ image.data }}" width="{{ image.width }}" height="{{ image.height }}"/>
{% for x0, y0, x1, y1 in image.boxes %}
<rect class="zoom" x="{{ x0 }}" y="{{ y0 }}" width="{{ x1 - x0 }}" height="{{ y1 - y0 }}"/>
{% endfor %}
</svg>
{% endmacro %}
{% for t in trajectories %}
<article class="card trajectory{{ '' if t.overviews else ' wide' }}">
{% for strip in t.strips %}
<div class="strip">
<p>{{ strip.frames | length }} of the {{ strip.count }} frames of a video, in minutes:seconds</p>
<div>
{% for frame in strip.frames %}
<figure>
{{ overview(frame, "frame at " ~ frame.clock) }}
<figcaption>{{ frame.clock }}</figcaption>
</figure>
{% endfor %}
</div>
</div>
{% endfor %}
{% if t.overviews %}
<div>
{% for image in t.overviews %}
{{ overview(image, "question's image") }}
{% endfor %}
</div>
{% endif %}
<div>
<h3>{{ t.question }}</h3>
<div class="chips">
<span class="chip">{{ t.tag }}, step {{ t.step }}</span><span class="chip">{{ t.id }}</span>
{% if t.kind %}<span class="chip">{{ t.kind }}</span>{% endif %}
<span class="chip">{{ t.status | replace("_", " ") }}</span>
{% for name, value in t.extra.items() %}
<span class="chip">{{ name | replace("_", " ") }}: {{ fact(value, "%.3g") }}</span>
{% endfor %}
</div>
{% for turn in t.turns %}
<div class="turn">
<pre>{{ turn.text }}</pre>
{% if turn.error is not none %}<pre class="bad">{{ turn.error }}</pre>{% endif %}
{% if turn.result_text %}<pre class="soft">{{ turn.result_text }}</pre>{% endif %}
{% if turn.images %}
<div class="shown">
{% for p in turn.images %}
<img class="crop{{ ' large' if p.width > 160 }}" src="{{ p.data }}" width="{{ p.width }}"
 height="{{ p.height }}" alt="{{ 'of ' ~ turn.call.name if turn.call else 'crop' }}">
{% endfor %}
</div>
{% endif %}
</div>
{% endfor %}
<p>Answer <b>{{ t.answer if t.answer is not none else "none" }}</b>
{%- if t.truth is not none %}, truth <b>{{ t.truth }}</b>{% endif %}
{% if t.vote %}, voted <b>{{ t.vote.answer if t.vote.answer is not none else "none" }}</b>
<span class="soft">(confidence {{ "%.2f" | format(t.vote.confidence) }},
margin {{ "%.2f" | format(t.vote.margin) }})</span>{% endif %}</p>
{% if t.counts %}
<div class="bars">
{% for answer, share in t.counts %}
<span>{{ answer }}</span>
<div class="bar"><i class="{{ 'won' if answer == t.vote.answer else 'lost' }}"
 style="width: {{ '%.1f' | format(100 * share) }}%"></i></div>
<span>{{ "%.0f" | format(100 * share) }}%</span>
{% endfor %}
</div>
{% endif %}
</div>
</article>
{% endfor %}
</body>
</html>
"""
