"""metrics.py: nothing lost or repeated on resuming, every metric explained, intervals derived."""

import ast
import dataclasses
import json
import math
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from pixelis_jax import metrics as metrics_module
from pixelis_jax.metrics import (
  METRICS,
  SPREADS,
  Metrics,
  TrajectoryLog,
  check_wandb,
  entry,
  episodes,
  interval,
  mean_interval,
  outcomes,
  read_lines,
  spreads,
)
from pixelis_jax.types import (
  Box,
  Picture,
  Reward,
  Segment,
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

ROOT = Path(__file__).parents[1]


def steps(path):
  return [line["step"] for line in read_lines(path)]


def test_scalars_of_every_kind_are_written(tmp_path):
  with Metrics(tmp_path / "run") as metrics:
    metrics.log(3, {"train/loss": jnp.float32(0.5), "train/lr": np.float64(0.25), "stage": 7})
    accuracy = "val-core/read/acc/mean@1"
    metrics.log(4, {accuracy: 1.0, "train/loss": math.nan, "train/grad_norm": math.inf})
  first, second = read_lines(tmp_path / "run" / "metrics.jsonl")
  assert (first["step"], first["train/loss"]) == (3, 0.5)
  assert (first["train/lr"], first["stage"], second[accuracy]) == (0.25, 7.0, 1.0)
  # Strict JSON readers know no NaN.
  assert second["train/loss"] is None and second["train/grad_norm"] is None
  assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_a_line_is_on_disk_when_log_returns(tmp_path):
  with Metrics(tmp_path) as metrics:
    metrics.log(1, {"train/loss": 1.0})
    assert steps(tmp_path / "metrics.jsonl") == [1]


def test_an_unexplained_metric_is_refused_with_the_nearest(tmp_path):
  with Metrics(tmp_path) as metrics:
    with pytest.raises(ValueError, match="'actor/grad_nrom' is not explained.*'actor/grad_norm'"):
      metrics.log(0, {"actor/grad_nrom": 1.0})
    with pytest.raises(ValueError, match="'val-core/read/acc/maen@1'.*'val-core/.*/acc/mean@1'"):
      metrics.log(0, {"train/loss": 1.0, "val-core/read/acc/maen@1": 1.0})
    # A prefix is a part of the name: what has one is not explained under others, or without.
    for name in ("loss", "val-core/loss", "train/pg_loss", "shifted/stage"):
      with pytest.raises(ValueError, match=f"'{name}' is not explained"):
        metrics.log(0, {name: 1.0})
  assert read_lines(tmp_path / "metrics.jsonl") == []  # Not even the good half.


def test_a_name_that_is_known_when_it_is_logged_is_found_by_its_pattern():
  assert entry("val-core/algebra/linear/acc/mean@1") == "val-core/*/acc/mean@1"  # A file's kind.
  assert entry("pass@16") == "pass@*" and entry("actor/loss") == "actor/loss"
  assert entry("val-core/all/acc/mean@10") is None


def test_explanations_are_sentences():
  for name, text in METRICS.items():
    assert text.endswith(".") and len(text.split()) > 3, name
    assert entry(name) == name, f"{name} is explained by a pattern too"


PROGRAMS = "rft sft ttrl online evaluate lessons looks surprise timing learner".split()
PARTS = "policy_losses correction losses pseudo_rewards".split()


def literals() -> set[str]:
  """All strings of the modules that measure, those within others' too."""
  files = [f"{name}.py" for name in PROGRAMS] + [f"algo/{name}.py" for name in PARTS]
  found = set(Reward.__dataclass_fields__)
  for tree in (ast.parse((ROOT / "pixelis_jax" / file).read_text()) for file in files):
    nodes = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    found |= {value for value in nodes if isinstance(value, str)}
  return found


def logged(name: str, said: set[str]) -> bool:
  """Whether a program may: by its name, or by that behind what `named` or `part` put before it."""
  family, _, rest = name.partition("/")
  by = family in ("actor", "train", "timing_s") and rest in said
  head, pattern, _ = name.partition("*")
  return by or name in said or bool(pattern) and (head in said or name in map(entry, said))


def test_every_explained_metric_is_logged_by_some_program():
  """Those of `SPREADS` are names of what the two functions give, with nothing left over."""
  lengths = np.array([[2, 1]])
  given = outcomes(np.ones((1, 2), np.float32), np.ones((1, 2), np.float32), lengths)
  assert given.keys() | episodes([played()]).keys() == SPREADS.keys()
  spread = {f"{name}/{part}" for name in SPREADS for part in ("mean", "max", "min")}
  said = literals()
  assert [name for name in METRICS if name not in spread and not logged(name, said)] == []
  for name in ("actor/vf_loss", "answered_share", "val/loss", "perf/mfu"):
    assert not logged(name, said), "whatever is asked for is found"


def test_an_episode_is_measured_as_verl_does():
  """Prompt 5, then 4 sampled, 2 shown, 3 sampled, 1 shown, 9 sampled; a call and a bad one."""
  shown = lambda n: Segment(tokens=np.zeros(n, np.int32))
  said = lambda text, n: fakes.completion(text, context=shown(n))
  look, bad, end = played().steps
  steps = (
    dataclasses.replace(look, completion=said("look", 5)),
    dataclasses.replace(bad, completion=said("bad", 2)),
    dataclasses.replace(end, completion=said("\\boxed{3}", 1)),
  )
  episode = dataclasses.replace(played(), steps=steps)
  short = dataclasses.replace(episode, steps=steps[2:])
  assert episodes([episode, short]) == {
    "prompt_length": [5, 1],
    "response_length": [4 + 2 + 3 + 1 + 9, 9],  # Sampled tokens alone would be 16.
    "num_turns": [6, 2],  # verl has 2 where one turn is sampled: the prompt is the other.
    "tool_call_counts": [2, 0],
  }


def test_spreads_are_of_all_processes(monkeypatch):
  # 1, 2, 6 here and 0 there: a mean of the two means would be 1.5.
  theirs = {"num_turns": (0.0, 1, 0.0, 0.0)}
  monkeypatch.setattr(metrics_module, "everyone", lambda own: [own, theirs])
  got = spreads({"num_turns": [1, 2, 6]})
  assert got == {"num_turns/mean": 2.25, "num_turns/max": 6.0, "num_turns/min": 0.0}


def test_advantages_are_weighed_by_sampled_tokens():
  # (3 * 1 - 1 * 1) / 4; by episode it would be 0.
  rewards = np.array([[2.0, 0.0]], np.float32)
  got = spreads(outcomes(rewards, rewards - 1, np.array([[3, 1]])))
  assert [got[f"critic/advantages/{part}"] for part in ("mean", "max", "min")] == [0.5, 1.0, -1.0]
  assert got["critic/score/mean"] == got["critic/rewards/mean"] == 1.0


def wandb_config(mode: str) -> ConfigDict:
  return ConfigDict({"seed": 3, "wandb": {"mode": mode, "project": "pixels"}})


class Fake(ModuleType):
  """The two calls of wandb that are ours, and what they were given."""

  def __init__(self):
    super().__init__("wandb")
    self.begun, self.lines, self.axes, self.finished = [], [], [], 0

  def init(self, **how):
    self.begun.append(how)
    return self

  def define_metric(self, name, *, step_metric):
    self.axes.append((name, step_metric))

  def log(self, line):
    self.lines.append(line)

  def finish(self):
    self.finished += 1


def test_wandb_is_told_the_same_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
  fake = Fake()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
  folder = tmp_path / "demo" / "learn"
  for mode in ("offline", "online"):
    with Metrics(folder, c=wandb_config(mode)) as metrics:
      metrics.log(7, {"train/loss": jnp.float32(0.5)})
  first, again = fake.begun
  assert (first["mode"], first["project"], first["name"]) == ("offline", "pixels", "demo/learn")
  assert first["config"]["seed"] == 3 and first["dir"] == str(folder)
  assert first["id"] == again["id"] and (first["resume"], again["resume"]) == (None, "allow")
  # Steps are an axis of ours: W&B drops lines whose own step is behind its last.
  assert fake.axes == [("*", "training/global_step")] * 2
  assert fake.lines == [{"training/global_step": 7, "train/loss": 0.5}] * 2 and fake.finished == 2
  assert os.environ.pop("WANDB_ERROR_REPORTING") == "false"
  with Metrics(tmp_path / "other", c=wandb_config("offline")):
    assert fake.begun[-1]["id"] != first["id"]
  os.environ.pop("WANDB_ERROR_REPORTING")


def test_without_being_asked_wandb_is_not_imported(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # Importing it raises ImportError.
  check_wandb(wandb_config("off").wandb)
  with Metrics(tmp_path, c=wandb_config("off")) as metrics:
    metrics.log(1, {"train/loss": 1.0})
  with pytest.raises(
    ImportError, match=r"wandb.mode 'offline' .* pip install 'pixelis-jax\[wandb\]'"
  ):
    check_wandb(wandb_config("offline").wandb)
  with pytest.raises(ValueError, match="wandb.mode 'on' must be one of"):
    check_wandb(wandb_config("on").wandb)
  monkeypatch.setitem(
    sys.modules, "wandb", ModuleType("wandb")
  )  # As of the folder that runs leave.
  with pytest.raises(ImportError, match="needs the extra wandb"):
    check_wandb(wandb_config("online").wandb)


def test_resuming_cuts_the_torn_line_and_what_will_be_done_again(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with Metrics(tmp_path) as metrics:
    for step in (1, 2, 3, 4):
      metrics.log(step, {"train/loss": float(step)})
  path.write_bytes(path.read_bytes() + b'{"step": 5, "lo')  # Killed in the middle of a write.
  assert steps(path) == [1, 2, 3, 4]
  with Metrics(tmp_path) as metrics:  # Without a step everything complete stays.
    assert steps(path) == [1, 2, 3, 4]
    metrics.log(5, {"train/loss": 5.0})
  # The checkpoint is of step 2: steps 3 to 5 run again.
  with Metrics(tmp_path, resume=2) as metrics:
    assert steps(path) == [1, 2]
    metrics.log(3, {"train/loss": 30.0})
  assert [line["train/loss"] for line in read_lines(path)] == [1.0, 2.0, 30.0]


def test_a_line_that_is_not_json_is_named(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"step": 1}\nnonsense\n')
  with pytest.raises(ValueError, match=r"x\.jsonl line 2 is not JSON"):
    read_lines(tmp_path / "x.jsonl")


def test_threads_do_not_tear_each_others_lines(tmp_path):
  with Metrics(tmp_path) as metrics:

    def work(offset):
      for i in range(50):
        metrics.log(offset + i, {"train/loss": 1.0, "majority_ratio": 0.5})

    threads = [threading.Thread(target=work, args=(100 * t,)) for t in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  expected = sorted(100 * t + i for t in range(4) for i in range(50))
  assert sorted(steps(tmp_path / "metrics.jsonl")) == expected


def played(crop_seed=1):
  task = fakes.task("q1", question="which <digit>?", answer="7", kind="read")
  crop = Picture(pixels=fakes.image(4, 5, seed=crop_seed), source=0, box=Box(1.0, 2.0, 6.0, 6.5))
  look = ToolCall(name="zoom_in", arguments={"bbox_2d": [1, 2, 6, 6.5]})
  turns = (
    Step(
      completion=fakes.completion("look"),
      call=look,
      result=ToolResult(text="here", images=(crop,)),
    ),
    Step(completion=fakes.completion("bad"), result=ToolResult(text="", error="no such tool")),
    Step(completion=fakes.completion("\\boxed{3}")),
  )
  return Trajectory(task=task, steps=turns, status=Status.ANSWERED, answer="3")


VOTE = Vote(
  answer="3", confidence=0.5, share=0.75, margin=0.5, counts={"3": 0.75, "7": 0.25}, ballots=()
)


def test_a_trajectory_is_written_whole_without_its_label(tmp_path):
  with TrajectoryLog(tmp_path) as log:
    log.write(8, "stream", played(), VOTE, {"gated": True})
    log.write(9, "after", played(), truth="7")
  first, second = read_lines(tmp_path / "trajectories.jsonl")
  assert first["truth"] is None  # task.answer is "7": it must not leak into the stream's log.
  assert '"7"' not in json.dumps({k: v for k, v in first.items() if k != "vote"})
  assert second["truth"] == "7" and second["vote"] is None
  assert (first["id"], first["step"], first["tag"], first["kind"]) == ("q1", 8, "stream", "read")
  assert (first["question"], first["answer"]) == ("which <digit>?", "3")
  assert first["status"] == "answered" and first["extra"] == {"gated": True}
  assert first["vote"] == {
    "answer": "3",
    "confidence": 0.5,
    "share": 0.75,
    "margin": 0.5,
    "uncalibrated": None,
    "counts": {"3": 0.75, "7": 0.25},
  }
  look, bad, answer = first["turns"]
  assert look["call"] == {"name": "zoom_in", "arguments": {"bbox_2d": [1, 2, 6, 6.5]}}
  assert (look["text"], look["result_text"], look["error"]) == ("look", "here", None)
  (picture,) = look["images"]
  assert (picture["box"], picture["source"]) == ([1.0, 2.0, 6.0, 6.5], 0)
  assert bad["error"] == "no such tool" and bad["call"] is None and bad["images"] == []
  assert answer["text"] == "\\boxed{3}" and answer["result_text"] is None
  with Image.open(tmp_path / picture["path"]) as image:
    np.testing.assert_array_equal(np.array(image), fakes.image(4, 5, seed=1))
  with Image.open(tmp_path / first["images"][0]) as image:
    np.testing.assert_array_equal(np.array(image), fakes.image())


def watched(count, *frames):
  """An episode that looked at these frames of the second of two videos, and once at an image."""
  shown = np.stack([fakes.image(6, 9, seed=i) for i in range(count)])
  clip = Video(frames=shown, times=np.arange(count, dtype=np.float32) / 4)
  still = Video(frames=shown[:1], times=np.zeros(1, np.float32))
  task = Task(id="v", images=(fakes.image(),), question="?", answer=None, videos=(still, clip))
  crops = [
    Picture(pixels=shown[i, 1:3, 2:5], source=1, box=Box(2.0, 1.0, 5.0, 3.0), frame=i)
    for i in frames
  ]
  crops.append(Picture(pixels=fakes.image(4, 5), source=0, box=Box(1.0, 2.0, 6.0, 6.0)))
  look = ToolResult(text="here", images=tuple(crops))
  steps = (
    Step(completion=fakes.completion("look"), result=look),
    Step(completion=fakes.completion("\\boxed{3}")),
  )
  return Trajectory(task=task, steps=steps, status=Status.ANSWERED, answer="3")


def test_a_videos_frames_are_saved_with_their_times(tmp_path):
  played = watched(100, 40, 14)
  with TrajectoryLog(tmp_path) as log:
    log.write(1, "a", played)
  (line,) = read_lines(tmp_path / "trajectories.jsonl")
  still, clip = line["videos"]
  assert still["count"] == 1 and [f["frame"] for f in still["frames"]] == [0]
  # Eight over 0 to 99 in steps of 99 / 7 = 14.14: 14 is one of them, 40 is there to be drawn on.
  assert clip["count"] == 100
  assert [f["frame"] for f in clip["frames"]] == [0, 14, 28, 40, 42, 57, 71, 85, 99]
  assert [f["time"] for f in clip["frames"]] == [f["frame"] / 4 for f in clip["frames"]]
  for f in clip["frames"]:
    with Image.open(tmp_path / f["path"]) as image:
      np.testing.assert_array_equal(np.array(image), played.task.videos[1].frames[f["frame"]])
  # A picture says which frame it is of; of an image there is none to say.
  places = [(p["source"], p.get("frame")) for p in line["turns"][0]["images"]]
  assert places == [(1, 40), (1, 14), (0, None)]
  # 9 frames, one of which is the still too, the image, and 3 crops.
  assert len(list((tmp_path / "images").iterdir())) == 9 + 1 + 3


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_a_short_video_is_saved_whole(tmp_path, count):
  with TrajectoryLog(tmp_path) as log:
    log.write(1, "a", watched(count))
  (line,) = read_lines(tmp_path / "trajectories.jsonl")
  # Nine in steps of 8 / 7: 0, 1.1, 2.3, 3.4, 4.6, 5.7, 6.9, 8; without the middle one.
  expected = [0, 1, 2, 3, 5, 6, 7, 8] if count == 9 else [*range(count)]
  assert [f["frame"] for f in line["videos"][1]["frames"]] == expected


def test_equal_images_are_saved_once(tmp_path):
  with TrajectoryLog(tmp_path) as log:
    log.write(1, "a", played())
    log.write(2, "a", played())
    log.write(3, "a", played(crop_seed=2))
  assert len(list((tmp_path / "images").iterdir())) == 3  # The task's, and two different crops.


def test_trajectories_resume_like_metrics(tmp_path):
  with TrajectoryLog(tmp_path) as log:
    for step in (1, 2, 3):
      log.write(step, "a", played())
  with TrajectoryLog(tmp_path, resume=1) as log:
    log.write(2, "again", played())
  lines = read_lines(tmp_path / "trajectories.jsonl")
  assert [(line["step"], line["tag"]) for line in lines] == [(1, "a"), (2, "again")]


def test_wilson_interval():
  # p = 1/2, n = 10, z2 = 3.8414588: centre 1/2; half = sqrt(z2 (0.025 + z2 / 400)) / (1 + z2 / 10)
  # = sqrt(0.0960365 + 0.0368920) / 1.3841459 = 0.3645936 / 1.3841459 = 0.2634069. The normal
  # approximation would give 0.31.
  low, high = interval(5, 10)
  assert (low, high) == pytest.approx((0.2365931, 0.7634069), abs=1e-6)
  # All of 10: [n / (n + z2), 1] = 10 / 13.8414588; the normal approximation would be [1, 1].
  assert interval(10, 10) == (pytest.approx(0.7224672, abs=1e-6), 1.0)
  assert interval(0, 10) == (0.0, pytest.approx(1 - 0.7224672, abs=1e-6))
  assert interval(0, 0) == (0.0, 1.0)
  with pytest.raises(ValueError, match="successes 3 must be between 0 and n = 2"):
    interval(3, 2)


def test_mean_interval_is_students():
  # Mean 2, standard deviation 1 (n - 1), three values: t(2, 0.975) = 4.302653; 4.302653 / sqrt(3)
  # = 2.484138. The normal's 1.96 would give 1.13, dividing by n in the deviation 2.03.
  assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
  with pytest.raises(ValueError, match="at least 2 values, got 1"):
    mean_interval([1.0])
