"""Scores, and arms that change where a call points, or which one is made, and nothing else."""

import dataclasses
import json
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import common
from pixelis_jax import evaluate
from pixelis_jax.agent import Limits
from pixelis_jax.checkpoint import BEST, Checkpoints
from pixelis_jax.data.mixture import Asked, Mixture, look_at_boxes
from pixelis_jax.metrics import METRICS_FILE, Metrics, interval, read_lines
from pixelis_jax.tools import Toolbox
from pixelis_jax.types import Box, ToolCall, ToolResult, Video
from tests import fakes

LIMITS = Limits(turns=4, tokens=100_000)
CHAT = fakes.Bytes()
SOURCE, SHOWN = 448, 112
FIRST, SECOND = Box(40.0, 80.0, 80.0, 120.0), Box(300.0, 200.0, 340.0, 240.0)


def toolbox(preset: str = "qwen", names=("zoom_in",)) -> Toolbox:
  return Toolbox(names, shown_size=lambda height, width: (SHOWN, SHOWN), preset=preset)


def question(id: str, *, boxes=(FIRST,), **more):
  return fakes.task(id, images=[fakes.image(SOURCE, SOURCE)], boxes=boxes, **more)


def zoom(*corners: int) -> ToolCall:
  """In shown pixels: a quarter of the source's."""
  return ToolCall(name="zoom_in", arguments={"bbox_2d": list(corners)})


def text(*corners: int) -> str:
  body = json.dumps({"name": "zoom_in", "arguments": {"bbox_2d": list(corners)}})
  return f"<tool_call>\n{body}\n</tool_call>"


def test_scores_by_meaning_with_kinds_calls_and_hits():
  asked = [
    question("hit", answer="7", kind="digit"),
    question("miss", answer="7", kind="digit"),
    question("outside", answer="yes", kind="parity"),
    question("silent", answer="no", kind="parity"),
  ]
  script = {
    "hit": [text(10, 20, 20, 30), r"\boxed{7.0}"],  # Source 40 to 80, 80 to 120: the evidence.
    "miss": [text(60, 60, 80, 80), r"\boxed{1}"],
    "outside": [text(200, 200, 220, 220), r"\boxed{Yes}"],  # An error, then right all the same.
    "silent": ["I cannot tell."],
  }
  result = evaluate.run(
    asked, generate=fakes.scripted(CHAT, script), run=toolbox().run, limits=LIMITS
  )
  assert (result.score.n, result.accuracy) == (4, 0.5)
  assert (result.score.low, result.score.high) == interval(2, 4)
  half = evaluate.Score(n=2, accuracy=0.5, low=interval(1, 2)[0], high=interval(1, 2)[1])
  assert result.by_kind == {"digit": half, "parity": half}
  assert (result.tool_calls, result.tool_errors) == (0.75, 0.25)
  assert result.hit_rate == pytest.approx(1 / 3)  # Of the three that looked.
  assert [t.task.id for t in result.trajectories] == [t.id for t in asked]
  summary = result.summary()
  assert (summary["n"], summary["accuracy"], summary["tool_calls"]) == (4, 0.5, 0.75)
  assert summary["by_kind"]["parity"] == dataclasses.asdict(half)
  assert "trajectories" not in json.loads(json.dumps(summary))
  assert evaluate.measured(result) == {
    "val-core/digit/acc/mean@1": 0.5,
    "val-core/parity/acc/mean@1": 0.5,
    "val-core/all/acc/mean@1": 0.5,
    "val-aux/all/tool_call_counts/mean@1": 0.75,
    "val-aux/all/hit_rate/mean@1": pytest.approx(1 / 3),
  }
  one = dataclasses.replace(result, by_kind={"digit": half})  # It would be said twice.
  assert "val-core/digit/acc/mean@1" not in evaluate.measured(one)


def test_answers_are_scored_by_a_benchmarks_rule():
  asked = [question("near", answer="100"), question("far", answer="100"), question("no")]
  script = {"near": [r"\boxed{104}"], "far": [r"\boxed{107}"], "no": ["I cannot tell."]}
  how = {"generate": fakes.scripted(CHAT, script), "run": toolbox().run, "limits": LIMITS}
  found = {
    rule: evaluate.run(asked, verifier=rule, **how).score
    for rule in ("equal", "relaxed", "tolerance")
  }
  assert found["equal"].accuracy == 0.0
  assert found["relaxed"] == evaluate.Score.of(np.float32([1, 0, 0]))
  # 7% off, of 5 to 20%: (1 + cos(2 pi / 15)) / 2 = 0.9568; the third said nothing.
  near = np.array([1.0, 0.95677, 0.0])
  assert found["tolerance"].accuracy == pytest.approx(near.mean(), abs=1e-4)
  # Three shares are no counts: Student's t, of which half lies beyond what a mean can be.
  assert found["tolerance"].high == 1.0
  assert found["tolerance"].low == pytest.approx(0.0, abs=1e-9)
  with pytest.raises(ValueError, match="task 'near' cannot be scored by verifier 'iou'.*a box"):
    evaluate.run(asked, verifier="iou", **how)
  with pytest.raises(ValueError, match="verifier 'exact' must be one of"):
    evaluate.run(asked, verifier="exact", **how)


def test_the_interval_of_shares_is_students():
  shares = np.array([0.5, 0.7, 0.6, 0.6], np.float32)
  # Mean 0.6, deviation sqrt(0.02 / 3), t of 3 degrees of freedom 3.1824.
  half = 3.1824 * np.sqrt(0.02 / 3 / 4)
  score = evaluate.Score.of(shares)
  assert (score.low, score.high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-5)
  alone = evaluate.Score.of(shares[:1])
  assert (alone.low, alone.high) == (0.0, 1.0)
  assert evaluate.Score.of(np.array([-0.5, -0.5, 1.0])).low == -0.5  # As trance_penalty has it.


def test_what_nobody_looked_at_is_no_hit():
  generate = fakes.scripted(CHAT, {"a": [r"\boxed{7}"]})
  result = evaluate.run([question("a")], generate=generate, run=toolbox().run, limits=LIMITS)
  assert (result.accuracy, result.hit_rate, result.tool_calls) == (1.0, 0.0, 0.0)


def test_unlabelled_questions_cannot_be_scored():
  asked = [question("a"), question("b", answer=None), question("c", answer=None)]
  with pytest.raises(ValueError, match="2 tasks have no answer to score against, first 'b'"):
    evaluate.run(asked, generate=fakes.scripted(CHAT, {}), run=toolbox().run, limits=LIMITS)


def test_random_crops_have_the_asked_size_elsewhere_inside():
  tools, task = toolbox(), question("a")
  asked = tools.run(zoom(10, 20, 20, 30), task, ()).images[0].box
  moved = evaluate.random_places(tools, seed=0)
  boxes = []
  for i in range(50):
    task = question(f"a{i}")
    (picture,) = moved(zoom(10, 20, 20, 30), task, ()).images
    box = picture.box
    # A place between pixels is widened to whole ones.
    assert asked.width <= box.width <= asked.width + 1
    assert asked.height <= box.height <= asked.height + 1
    assert 0 <= box.x0 and box.x1 <= SOURCE and 0 <= box.y0 and box.y1 <= SOURCE
    np.testing.assert_array_equal(
      picture.pixels, task.images[0][int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]
    )
    boxes.append(box)
  # All over the image, not around the evidence: centres span most of 408 pixels.
  assert np.ptp([b.x0 for b in boxes]) > 300 and np.ptp([b.y0 for b in boxes]) > 300
  again = evaluate.random_places(tools, seed=0)  # Whatever was asked before.
  assert again(zoom(10, 20, 20, 30), task, ()).images[0].box == boxes[-1]
  other = evaluate.random_places(tools, seed=1)
  assert other(zoom(10, 20, 20, 30), task, ()).images[0].box != boxes[-1]


class Heard(Toolbox):
  """Real tools that keep the calls they ran."""

  def __init__(self, *names: str):
    shown = lambda video: (np.arange(0, len(video.frames), 2), (SHOWN, SHOWN))
    super().__init__(names, shown_size=lambda height, width: (SHOWN, SHOWN), shown_frames=shown)
    self.calls = []

  def run(self, call, *rest):
    self.calls.append(call)
    return super().run(call, *rest)


def random_call(tools: Heard, task, call: ToolCall, *results: ToolResult) -> dict:
  """The arguments with which an arm makes it."""
  assert evaluate.random_places(tools, seed=0)(call, task, results).error is None
  asked, moved = tools.calls[-2:]
  assert asked == call and moved.name == call.name
  return dict(moved.arguments)


def test_every_tool_that_points_is_moved_in_the_image_it_points_in():
  tools = Heard("zoom_in", "get_properties", "read_text")
  task = question("a")
  crop = tools.run(zoom(0, 0, 50, 50), task, ())
  # 20 wide of 112, of which 10 lie outside: 10 are asked for, and 10 are moved, in image 2.
  call = ToolCall(name="get_properties", arguments={"bbox_2d": [102, 20, 122, 60], "image": 2})
  moved = random_call(tools, task, call, crop)
  x0, y0, x1, y1 = moved["bbox_2d"]
  assert (x1 - x0, y1 - y0) == (pytest.approx(10), pytest.approx(40)) and moved["image"] == 2
  assert 0 <= x0 and x1 <= SHOWN and 0 <= y0 and y1 <= SHOWN and x0 != 102
  # What takes all of an image points nowhere: nothing is elsewhere.
  call = ToolCall(name="zoom_in", arguments={"bbox_2d": [0, 0, SHOWN, SHOWN]})
  assert random_call(tools, task, call) == {"bbox_2d": [0, 0, SHOWN, SHOWN]}


def test_frames_are_taken_at_random_times():
  frames = np.stack([fakes.image(32, 32, seed=i) for i in range(8)])
  clip = Video(frames=frames, times=np.arange(8, dtype=np.float32))
  task = dataclasses.replace(fakes.task("v", images=[]), videos=(clip,))
  tools = Heard("select_frames")
  asked = lambda **which: random_call(tools, task, ToolCall(name="select_frames", arguments=which))
  times = asked(times=[1.0, 2.0])["times"]
  assert len(times) == 2 and all(0 <= t <= 7 for t in times) and times != [1.0, 2.0]
  numbers = asked(frames=[1, 1, 1])["frames"]  # Of the four that are shown.
  assert len(numbers) == 3 and set(numbers) <= {1, 2, 3, 4}


def boxed(task) -> Asked:
  return Asked(task=task, tools=("zoom_in",), solve=partial(look_at_boxes, task, toolbox().zoom))


def test_the_oracle_makes_the_solvers_calls_in_order():
  tools, task = toolbox(), question("a", boxes=(FIRST, SECOND))
  moved = evaluate.oracle(tools, [boxed(task)])
  failed = ToolResult(text="", error="not JSON")
  one = moved(zoom(60, 60, 70, 70), task, (failed,))  # What failed showed nothing.
  assert one.images[0].box == FIRST
  two = moved(zoom(60, 60, 70, 70), task, (failed, one))
  assert two.images[0].box == SECOND
  assert moved(zoom(60, 60, 70, 70), task, (one, two)).images[0].box == SECOND
  x0, y0 = int(FIRST.x0), int(FIRST.y0)
  np.testing.assert_array_equal(one.images[0].pixels, task.images[0][y0 : y0 + 40, x0 : x0 + 40])


def test_the_oracle_solves_a_puzzle_whatever_is_called():
  """Two calls of the policy, at nothing, are the zoom and the measurement of the solver."""
  source = Mixture(split="held_out", kinds=("color",), size=3)
  asked = source.asked(0)
  shown = lambda height, width: (60, 80) if width > height else (80, 80)
  tools = Toolbox(("zoom_in", "get_properties"), shown_size=shown)
  moved, call = evaluate.oracle(tools, [asked]), zoom(0, 0, 9, 9)
  one = moved(call, asked.task, ())
  (spot,) = asked.task.boxes
  assert one.images[0].box.holds(spot)
  assert f"Colour: {asked.task.answer} " in moved(call, asked.task, (one,)).text
  with pytest.raises(ValueError, match=r"has no solver for the oracle with \['zoom_in'\]"):
    evaluate.oracle(toolbox(), [asked])
  with pytest.raises(ValueError, match="task 'b' has no solver"):
    evaluate.oracle(tools, [Asked(task=question("b"))])


@pytest.mark.parametrize(
  "arm",
  [
    lambda tools, task: evaluate.random_places(tools, seed=0),
    lambda tools, task: evaluate.oracle(tools, [boxed(task)]),
  ],
)
def test_arms_do_not_repair_the_policys_mistakes(arm):
  tools, task = toolbox(), question("a")
  for call in (zoom(200, 200, 220, 220), ToolCall(name="other", arguments={})):
    assert arm(tools, task)(call, task, ()).error == tools.run(call, task, ()).error is not None


@pytest.mark.parametrize(
  ("preset", "arguments", "size"),
  [
    # A quarter by a half of the image, padded by a tenth each: (0.25 + 0.2) 448 by (0.5 + 0.2) 448.
    ("pixel_reasoner", {"bbox_2d": [0.7, 0.2, 0.95, 0.7], "target_image": 1}, (201.6, 313.6)),
    ("pixel_reasoner", {"bbox_2d": [200, 90, 312, 314], "target_image": 1}, (201.6, 313.6)),
    ("deepeyes", {"bbox_2d": [100, 100, 140, 180]}, (40, 80)),  # The source's own pixels.
  ],
)
def test_calls_are_moved_in_the_coordinates_of_their_format(preset, arguments, size):
  tools = toolbox(preset)
  call = ToolCall(name=tools.zoom.name, arguments=arguments)
  arm = evaluate.random_places(tools, seed=0)
  shown = [arm(call, question(f"q{i}"), ()).images[0].box for i in range(30)]
  assert all(0 <= b.x0 and b.x1 <= SOURCE and 0 <= b.y0 and b.y1 <= SOURCE for b in shown)
  # What is padded is cut off at the image's edge; the largest is whole, up to rounding.
  assert max(b.width for b in shown) == pytest.approx(size[0], abs=1.5)
  assert max(b.height for b in shown) == pytest.approx(size[1], abs=1.5)
  assert np.ptp([b.center[0] for b in shown]) > SOURCE / 3


def test_frames_of_the_other_format_are_taken_at_random():
  frames = np.stack([fakes.image(32, 32, seed=i) for i in range(8)])
  clip = Video(frames=frames, times=np.arange(8, dtype=np.float32))
  task = dataclasses.replace(fakes.task("v", images=[]), videos=(clip,))
  shown = lambda video: (np.arange(0, len(video.frames), 2), (SHOWN, SHOWN))
  how = {"shown_size": lambda height, width: (SHOWN, SHOWN), "shown_frames": shown}
  tools = Toolbox(("select_frames",), preset="pixel_reasoner", **how)
  call = ToolCall(name="select_frames", arguments={"target_frames": [1] * 8})
  result = evaluate.random_places(tools, seed=0)(call, task, ())
  assert result.error is None and len(result.images) == 8
  assert len({picture.frame for picture in result.images}) > 1


@pytest.mark.parametrize("preset", ["pixel_reasoner", "deepeyes"])
def test_a_file_with_boxes_has_an_oracle_in_every_format(policy, tmp_path, preset):
  Image.fromarray(fakes.image(SOURCE, SOURCE)).save(tmp_path / "a.png")
  ask = {"request_id": "a", "question": "?", "image": "a.png", "answer": "7"}
  boxes = [[300, 200, 340, 240]]
  (tmp_path / "q.jsonl").write_text(json.dumps({**ask, "boxes": boxes}))
  c = common.questions(n=2)
  c.file = str(tmp_path / "q.jsonl")
  tools = toolbox(preset)
  (asked,) = evaluate.questions(c, dataclasses.replace(policy, tools=tools))
  assert asked.tools == (tools.zoom.name,)
  arguments = {"bbox_2d": [0.1, 0.1, 0.2, 0.2], "target_image": 1}
  if preset == "deepeyes":
    arguments = {"bbox_2d": [0, 0, 50, 50]}
  call = ToolCall(name=tools.zoom.name, arguments=arguments)
  (picture,) = evaluate.oracle(tools, [asked])(call, asked.task, ()).images
  assert picture.box.holds(SECOND)
  blind = evaluate.questions(c, dataclasses.replace(policy, tools=toolbox(names=())))
  assert blind[0].solve is None


def test_questions_of_a_config(policy):
  c = common.questions("held_out", "rotate", n=3, seed=5)
  asked = evaluate.tasks(c, policy)
  assert len(asked) == 3 and len({t.id for t in asked}) == 3
  assert all(t.answer is not None and t.boxes for t in asked)
  assert [t.question for t in evaluate.made(c)] == [t.question for t in asked]
  assert all(one.solve is not None for one in evaluate.questions(c, policy))
  c.skew = 8
  assert [t.id for t in evaluate.made(c)] != [t.id for t in asked]


def test_the_table_has_a_line_a_kind():
  answered = ([1, 1, 0, 1], [1, 1], [0, 1])
  scores = [evaluate.Score.of(np.array(right, np.float32)) for right in answered]
  kinds = dict(zip(("color", "read"), scores[1:], strict=True))
  one = evaluate.Result(
    score=scores[0], tool_calls=1.5, tool_errors=0.25, hit_rate=0.5, by_kind=kinds, trajectories=()
  )
  lines = evaluate.table({"tools": one, "oracle": one}).splitlines()
  assert [line.split()[0] for line in lines] == "kind all color read calls errors hits".split()
  assert lines[0].split() == ["kind", "n", "tools", "oracle"]
  # Wilson at 1 of 2, z2 = 3.8415: 1/2 +- sqrt(z2 (1/8 + z2 / 16)) / (1 + z2 / 2) = 1/2 +- 0.4055.
  assert lines[3].split() == ["read", "2", *(["50.0", "(9.5", "to", "90.5)"] * 2)]
  assert lines[4].split() == ["calls", "1.50", "1.50"]


def test_questions_of_a_file(policy, tmp_path):
  c = common.questions(n=2)
  c.file = str(tmp_path / "q.jsonl")
  ask = {"question": "?", "images": [], "answer": "x"}
  (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"request_id": i, **ask}) for i in "abc"))
  assert [(t.id, t.answer) for t in evaluate.tasks(c, policy)] == [("a", "x"), ("b", "x")]
  c.n = 10
  assert len(evaluate.tasks(c, policy)) == 3


def test_the_best_weights_are_kept_over_a_restart(model_config, policy, tmp_path, monkeypatch):
  c = ConfigDict({"eval": common.evaluation(n=2), "limits": common.limits()})
  plain = evaluate.run(
    [question("a", answer="7")],
    generate=fakes.scripted(CHAT, {"a": ["?"]}),
    run=toolbox().run,
    limits=LIMITS,
  )
  accuracy = iter((0.4, 0.7, 0.6, 0.7, 0.65, 0.8))
  score = lambda: dataclasses.replace(plain.score, accuracy=next(accuracy))
  result = lambda *_, **__: dataclasses.replace(plain, score=score())
  monkeypatch.setattr(evaluate, "greedy", result)
  trained = lambda step: {"w": jnp.full(3, float(step))}

  def run(steps):
    with Metrics(tmp_path, resume=steps.start - 1) as metrics:
      held_out = evaluate.HeldOut(c, policy, tmp_path)
      for step in steps:
        asked = held_out.ask(step, policy.params, trained(step), metrics)
        assert asked.accuracy <= held_out.best
      held_out.close()
    with Checkpoints(tmp_path / BEST, read_only=True) as kept:
      step = kept.latest_step()
      (found, extra) = kept.restore({"params": trained(0)})
    assert float(found["params"]["w"][0]) == step
    return step, extra["accuracy"]

  assert run(range(1, 4)) == (2, 0.7)
  assert run(range(2, 4)) == (2, 0.7)  # Killed and done again: as good as before is not better.
  assert run(range(4, 5)) == (4, 0.8)
  lines = read_lines(tmp_path / METRICS_FILE)
  assert [line[evaluate.ACCURACY] for line in lines] == [0.4, 0.7, 0.65, 0.8]


def test_the_program_writes_all_four_arms(model_config, tmp_path, capsys):
  c = ConfigDict()
  c.model = model_config.copy_and_resolve_references()
  c.model.max_tokens = 3
  c.limits = common.limits()
  c.limits.turns = 2
  c.eval = common.evaluation(n=2)
  results = evaluate.main(c, tmp_path / "out")
  assert list(results) == ["tools", "no_tools", "random", "oracle"]
  written = json.loads((tmp_path / "out" / "evaluate.json").read_text())
  assert written["arms"] == {name: r.summary() for name, r in results.items()}
  assert written["config"]["eval"]["n"] == 2
  # The prompt without tools is another prompt, and the shorter one.
  lengths = {
    name: [len(t.steps[0].completion.context.tokens) for t in r.trajectories]
    for name, r in results.items()
  }
  assert lengths["no_tools"] < lengths["tools"] == lengths["oracle"]
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split() == ["kind", "n", *results]
