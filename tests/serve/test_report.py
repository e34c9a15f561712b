"""serve/report.py: one file, nothing fetched, nothing unescaped, numbers where they belong."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from pixelis_jax.metrics import Metrics, TrajectoryLog, read_lines
from pixelis_jax.serve.report import choose, curve, headline, write_report
from pixelis_jax.types import (
  Box,
  Picture,
  Status,
  Step,
  Task,
  ToolCall,
  ToolResult,
  Trajectory,
  Video,
  Vote,
)
from tests import fakes

RESULT = {
  "shift": "rotate",
  "seed": 7,
  "n": 200,
  "shifted_before": 0.5,
  "shifted_after": 0.75,
  "original_before": 0.98,
  "original_after": 0.97,
  "majority_after": 0.6,
  "tool_calls_per_question": 1.0123456,
  "updates_applied": 31,
  "updates_refused": 2,
  "answer_p50_s": 0.25,
  "answer_p95_s": 0.5,
}
VOTE = Vote(
  answer="3", confidence=0.5, share=0.75, margin=0.5, counts={"7": 0.25, "3": 0.75}, ballots=()
)


def played(id, *, text="look", question="which digit?"):
  seed = sum(id.encode())
  task = fakes.task(
    id, question=question, answer="7", images=[fakes.image(48, 64, seed=seed)], kind="read"
  )
  crop = Picture(
    pixels=np.array(task.images[0][10:20, 30:50]), source=0, box=Box(30.0, 10.0, 50.0, 20.0)
  )
  look = ToolCall(name="zoom_in", arguments={"bbox_2d": [30, 10, 50, 20]})
  turns = (
    Step(
      completion=fakes.completion(text), call=look, result=ToolResult(text="here", images=(crop,))
    ),
    Step(completion=fakes.completion("hm"), result=ToolResult(text="", error="no such tool")),
    Step(completion=fakes.completion("\\boxed{3}")),
  )
  return Trajectory(task=task, steps=turns, status=Status.ANSWERED, answer="3")


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / "result.json").write_text(json.dumps(RESULT))
  with Metrics(tmp_path) as metrics:
    for step in range(0, 50, 10):
      metrics.log(step, {"majority_ratio": 0.5 + step / 100, "memory_size": 8 * step})
  with Metrics(tmp_path / "learn") as metrics:
    for step in range(5):
      metrics.log(step, {"actor/kl": 0.01 * step if step != 2 else float("nan")})
  with TrajectoryLog(tmp_path) as log:
    for i in range(30):
      log.write(i, "stream", played(f"r{i}"), VOTE, {"gated": True})
    for i in range(3):
      log.write(99, "after", played(f"h{i}"), truth="7")
  return tmp_path


class Page(HTMLParser):
  """Every tag with its attributes, unclosed tags, and the text."""

  VOID = {"meta", "link", "img"}

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.words = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, f"</{tag}> closes something else"

  def handle_data(self, data):
    self.words.append(data)

  def all(self, tag, **wanted):
    return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


def test_the_page_is_whole_and_needs_nothing_else(workdir):
  path = write_report(workdir)
  text = path.read_text()
  assert path == workdir / "report.html" and text.startswith("<!doctype html>")
  page = Page(text)
  assert page.open == []  # Every tag is closed, in order.
  references = [a[k] for _, a in page.tags for k in ("src", "href") if k in a]
  assert references and all(r.startswith("data:") for r in references)
  assert "http" not in text and "<script" not in text and "url(" not in text
  assert len(page.all("article")) == 12
  assert not list(workdir.glob("*.tmp"))


def test_the_headline_has_both_domains_with_intervals():
  shifted, original = headline(RESULT)
  assert (shifted["before"]["value"], shifted["after"]["value"]) == ("50.0", "75.0")
  assert shifted["change"] == "+25.0" and shifted["better"]
  # Wilson at 100 of 200, z2 = 3.8414588: 1/2 +- sqrt(z2 (1/800 + z2 / 160000)) / (1 + z2 / 200)
  # = 1/2 +- sqrt(0.0048018 + 0.0000922) / 1.0192073 = 1/2 +- 0.0686386.
  assert (shifted["before"]["low"], shifted["before"]["high"]) == ("43.1", "56.9")
  assert original["change"] == "-1.0" and not original["better"]
  assert shifted["majority"]["value"] == "60.0" and original["majority"] is None
  assert headline(RESULT | {"majority_after": None})[0]["majority"] is None


def test_the_table_and_facts_are_shown(workdir):
  words = re.sub(r"\s+", " ", " ".join(Page(write_report(workdir).read_text()).words))
  for shown in (
    "50.0 (43.1 to 56.9)",
    "+25.0",
    "updates refused",
    "answer p50 s",
    "rotate",
    "1.012",
  ):
    assert shown in words
  assert "Curves: learn" in words and "majority_ratio" in words
  assert "Weight share of the voted answer" in words  # The metric is explained beside its curve.


def test_a_trajectory_shows_box_crop_text_vote_and_truth_only_if_known(workdir):
  text = write_report(workdir).read_text()
  page = Page(text)
  rects = page.all("rect")
  assert len(rects) == 12
  assert (rects[0]["x"], rects[0]["y"]) == ("30.0", "10.0")
  assert (rects[0]["width"], rects[0]["height"]) == ("20.0", "10.0")
  # The frame is in source pixels because the drawing's own units are the source image's pixels.
  views = [a["viewbox"] for a in page.all("svg") if a["viewbox"] == "0 0 64 48"]
  assert len(views) == 12
  crops = page.all("img")
  assert len(crops) == 12 and (crops[0]["width"], crops[0]["height"]) == ("20", "10")
  assert text.count("truth <b>7</b>") == 3  # The three of the evaluation; the stream has none.
  bars = [a["style"] for a in page.all("i")]
  assert bars[:2] == ["width: 75.0%", "width: 25.0%"]  # The winner first.
  assert "gated: True" in text and "no such tool" in text and "\\boxed{3}" in text


def test_a_video_is_a_strip_with_boxes_on_the_frames_they_lie_in(workdir):
  """A crop of frame 13 of video 1 is marked there: not on the image, nor on video 0."""
  frames = np.stack([fakes.image(300, 400, seed=i) for i in range(20)])
  times = np.arange(20, dtype=np.float32) * np.float32(7.495)
  clip, other = (Video(frames=f, times=times) for f in (frames, frames[::-1].copy()))
  image = fakes.image(48, 64)
  task = Task(id="v", images=(image,), question="?", answer=None, videos=(other, clip))
  crops = (
    Picture(pixels=frames[13, 10:20, 30:50], source=1, box=Box(30.0, 10.0, 50.0, 20.0), frame=13),
    Picture(pixels=image[5:9, 5:9], source=0, box=Box(5.0, 5.0, 9.0, 9.0)),
  )
  steps = (
    Step(completion=fakes.completion("look"), result=ToolResult(text="", images=crops)),
    Step(completion=fakes.completion("\\boxed{3}")),
  )
  played = Trajectory(task=task, steps=steps, status=Status.ANSWERED, answer="3")
  with TrajectoryLog(workdir, resume=-1) as log:
    log.write(0, "stream", played)
  path = write_report(workdir)
  page = Page(path.read_text())
  assert page.open == []
  # Of each video eight frames; of the second also the one that was looked at.
  assert len(page.all("figure")) == 8 + 9
  labels, marked = [], []
  for tag, attributes in page.tags:
    if tag == "svg":
      labels.append(attributes["aria-label"])
    elif tag == "rect":
      corner = attributes["x"], attributes["y"], attributes["width"], attributes["height"]
      marked.append((labels[-1], corner))
  assert marked == [
    ("frame at 1:37.4", ("30.0", "10.0", "20.0", "10.0")),  # 13 * 7.495 seconds.
    ("question's image", ("5.0", "5.0", "4.0", "4.0")),
  ]
  # Boxes lie in the frame's own pixels, whatever the size of the picture in the page.
  views = [a["viewbox"] for a in page.all("svg", role="img") if "frame at" in a["aria-label"]]
  assert views == ["0 0 400 300"] * 17
  # Frame 8 is at 59.96 seconds: no minute has 60.0.
  assert labels.count("frame at 1:00.0") == 2 and "8 of the 20 frames" in path.read_text()
  # As they are saved, 17 frames of noise would take 480 KB each.
  assert path.stat().st_size < 17 * 100_000


def test_a_question_about_a_video_alone_has_no_empty_column(workdir):
  clip = Video(frames=fakes.image(8, 8)[None], times=np.zeros(1, np.float32))
  task = Task(id="v", images=(), question="?", answer=None, videos=(clip,))
  steps = (Step(completion=fakes.completion("\\boxed{3}")),)
  played = Trajectory(task=task, steps=steps, status=Status.ANSWERED, answer="3")
  with TrajectoryLog(workdir, resume=-1) as log:
    log.write(0, "stream", played)
  page = Page(write_report(workdir).read_text())
  assert [a["class"] for a in page.all("article")] == ["card trajectory wide"]
  assert len(page.all("figure")) == 1


def test_a_log_from_before_there_were_videos_gives_the_same_report(workdir):
  new = write_report(workdir).read_text()
  path = workdir / "trajectories.jsonl"
  lines = read_lines(path)
  assert all(line.pop("videos") == [] for line in lines)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert write_report(workdir).read_text() == new


def test_text_from_the_model_or_the_user_is_escaped(workdir):
  evil = "<script>alert(1)</script>"
  with TrajectoryLog(workdir, resume=-1) as log:
    shown = played("e<b>", text=evil, question=f"{evil}?")
    vote = dataclasses.replace(VOTE, answer=evil, counts={evil: 1.0})
    log.write(0, "a<i>", dataclasses.replace(shown, answer=evil), vote, {"<u>": "<s>"}, truth=evil)
  page = Page(write_report(workdir).read_text())
  assert not {tag for tag, _ in page.tags} & {"script", "u", "s"}
  assert "".join(page.words).count(evil) == 6  # Question, text, answer, truth, vote, its bar.


@pytest.mark.parametrize("name", ["result.json", "trajectories.jsonl"])
def test_a_missing_file_is_named(workdir, name):
  (workdir / name).unlink()
  with pytest.raises(FileNotFoundError, match=name):
    write_report(workdir)


def test_missing_metrics_are_named_unless_a_folder_has_them(workdir):
  (workdir / "metrics.jsonl").unlink()
  write_report(workdir)
  (workdir / "learn" / "metrics.jsonl").unlink()
  with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is missing"):
    write_report(workdir)


def test_a_missing_image_is_named(workdir):
  for image in (workdir / "images").iterdir():
    image.unlink()
  with pytest.raises(FileNotFoundError, match=r"images/[0-9a-f]{32}\.png is missing"):
    write_report(workdir)


def test_a_wrong_result_is_named(workdir):
  (workdir / "result.json").write_text('{"n": 4, "shifted_before": 1}')
  with pytest.raises(ValueError, match=r"lacks \['original_after', 'original_before', 'shifted_af"):
    write_report(workdir)
  (workdir / "result.json").write_text("[1]")
  with pytest.raises(ValueError, match=r"result\.json holds a list"):
    write_report(workdir)
  (workdir / "result.json").write_text("{")
  with pytest.raises(ValueError, match=r"result\.json is not JSON"):
    write_report(workdir)


def test_trajectories_are_spread_over_tags_and_requests():
  stream = [{"tag": "stream", "id": f"r{i}", "turns": []} for i in range(20) for _ in range(8)]
  after = [{"tag": "after", "id": f"h{i}", "turns": []} for i in range(2)]
  chosen = choose([*stream, *after], 12)
  # Two of the small group, ten of the large one: first and last request among them, none twice.
  assert [c["id"] for c in chosen if c["tag"] == "after"] == ["h0", "h1"]
  ids = [c["id"] for c in chosen if c["tag"] == "stream"]
  assert len(ids) == len(set(ids)) == 10 and ids[0] == "r0" and ids[-1] == "r19"
  assert choose([], 12) == []
  assert len(choose(stream, 500)) == 20


def used(id: str, *names: str, error: str | None = None) -> dict:
  turns = [{"call": {"name": name}, "error": error} for name in names]
  return {"tag": "stream", "id": id, "turns": [*turns, {"call": None, "error": None}]}


def test_every_tool_that_worked_is_among_the_trajectories():
  lines = [used(f"r{i}", "zoom_in") for i in range(20)]
  spread = choose(lines, 4)
  lines[3] = used("r3", "segment_object_at", "get_properties")
  lines[5] = used("r5", "segment_object_at", "track_object")
  lines[7] = used("r7", "read_text", error="no such image")
  chosen = [line["id"] for line in choose(lines, 4)]
  # r0 zooms, r3 and r5 are the first with the others; what failed shows nothing.
  assert {"r0", "r3", "r5"} <= set(chosen) and "r7" not in chosen and len(set(chosen)) == 4
  # Nothing changes where the spread shows them all.
  lines = [used(f"r{i}", "zoom_in") for i in range(20)]
  assert [c["id"] for c in choose(lines, 4)] == [c["id"] for c in spread]


def test_what_a_tool_drew_is_shown_large(workdir):
  """An overlay of 224 pixels, under the words of the tool."""
  task = fakes.task("m", images=[fakes.image(48, 64)])
  drawn = Picture(pixels=fakes.image(224, 180), source=0, box=Box(0.0, 0.0, 9.0, 9.0))
  call = ToolCall(name="segment_object_at", arguments={"bbox_2d": [1, 1, 8, 8]})
  result = ToolResult(text="Mask 1: 40 pixels", images=(drawn,))
  steps = (
    Step(completion=fakes.completion("look"), call=call, result=result),
    Step(completion=fakes.completion("\\boxed{3}")),
  )
  with TrajectoryLog(workdir, resume=100) as log:
    log.write(100, "stream", Trajectory(task=task, steps=steps, status=Status.ANSWERED, answer="3"))
  page = Page(write_report(workdir).read_text())
  (shown,) = page.all("img", alt="of segment_object_at")
  assert shown["class"] == "crop large" and (shown["width"], shown["height"]) == ("180", "224")
  assert len(page.all("article")) == 12


def test_curve_geometry():
  shape = curve([(0, 0.0), (5, 0.5), (10, 1.0)])
  # x: 46 to 310, y: 128 (0) to 10 (1).
  assert shape["lines"] == ["46.0,128.0 178.0,69.0 310.0,10.0"]
  assert [label for _, label in shape["y_ticks"]] == ["0", "0.5", "1"]
  assert [label for _, label in shape["x_ticks"]] == ["0", "10"]
  broken = curve([(0, 0.0), (1, 1.0), (2, None), (3, 1.0), (4, 0.0)])
  assert [len(line.split()) for line in broken["lines"]] == [2, 2]  # NaN is a gap, not a bridge.
  assert curve([(0, 1.0)]) is None and curve([(0, None), (1, 2.0)]) is None
  flat = curve([(0, 3.0), (1, 3.0)])
  assert flat["lines"][0].endswith("310.0,69.0")  # In the middle, and no division by zero.
  assert curve([(0, 0.0), (1, 0.0)]) is not None
