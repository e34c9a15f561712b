"""How often the policy is right, and whether its tools are why: the four-arm ablation.

Arms, same weights and same questions: `tools` as trained; `no_tools`, a prompt that offers none;
`random_crop`, each zoom shows a box of the asked size somewhere else; `oracle_crop`, each zoom
shows the evidence itself.

    python -m pixelis_jax.evaluate --config=configs/evaluate.py --workdir=runs/evaluate
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixelis_jax import agent, cluster, program
from pixelis_jax.algo.answers import equal
from pixelis_jax.checkpoint import BEST, Checkpoints
from pixelis_jax.data.questions import QuestionFile
from pixelis_jax.data.tasks import TaskSource
from pixelis_jax.metrics import Metrics, interval
from pixelis_jax.sampler import Params, Policy, load_policy, with_tools
from pixelis_jax.tools import TOOLS, Toolbox
from pixelis_jax.tools.views import IDENTITY, View
from pixelis_jax.types import (
  Box,
  Generate,
  Task,
  ToolCall,
  ToolResult,
  Trajectory,
  content_key,
)

OTHERS = TOOLS["qwen"].keys() - {"zoom_in"}  # Tools whose calls no arm moves.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
  """Accuracy in 0 to 1 with its 95% Wilson interval, over n questions; calls, errors a question.

  `hit_rate` is, of episodes that looked, the share in which a crop shows the evidence's centre.
  """

  n: int
  accuracy: float
  low: float
  high: float
  tool_calls: float
  tool_errors: float
  hit_rate: float
  by_kind: dict[str, float]
  trajectories: tuple[Trajectory, ...]

  def summary(self) -> dict[str, Any]:
    """Everything but the trajectories, for json."""
    return {
      f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "trajectories"
    }


def run(
  asked: Sequence[Task], *, generate: Generate, run: agent.Run, limits: agent.Limits
) -> Result:
  """Plays every task once and compares answers by meaning. Every task must have its answer.

  Several processes play some each; the numbers are of all, the trajectories the process's own.
  """
  unlabelled = [t.id for t in asked if t.answer is None]
  if unlabelled:
    raise ValueError(
      f"{len(unlabelled)} tasks have no answer to score against, first {unlabelled[0]!r}"
    )
  own = cluster.split(len(asked))
  mine = asked[own.start : own.stop]
  played = agent.play(mine, generate=generate, run=run, limits=limits)
  found = np.zeros((len(asked), 5), np.float32)
  for i, t in zip(own, played, strict=True):
    right = t.answer is not None and equal(t.answer, t.task.answer)
    hit = bool(t.calls) and _saw_evidence(t)
    found[i] = right, t.calls, t.errors, bool(t.calls), hit
  right, calls, errors, looked, hits = cluster.summed(found).T
  kinds = sorted({t.kind for t in asked})
  low, high = interval(int(right.sum()), len(right))
  return Result(
    n=len(right),
    accuracy=float(right.mean()),
    low=low,
    high=high,
    tool_calls=float(calls.mean()),
    tool_errors=float(errors.mean()),
    hit_rate=float(hits.sum() / looked.sum()) if looked.any() else 0.0,
    by_kind={k: float(right[[t.kind == k for t in asked]].mean()) for k in kinds},
    trajectories=tuple(played),
  )


def greedy(
  policy: Policy,
  params: Params,
  asked: Sequence[Task],
  *,
  limits: agent.Limits,
  execute: agent.Run | None = None,
) -> Result:
  """`run` with these parameters at temperature 0; the policy's own tools execute by default."""
  generate = policy.sampler.bind(params, key=jax.random.key(0), version=0, temperature=0.0)
  return run(asked, generate=generate, run=execute or policy.tools.run, limits=limits)


def _saw_evidence(trajectory: Trajectory) -> bool:
  for x, y in (box.center for box in trajectory.task.boxes):
    if any(p.box.x0 <= x < p.box.x1 and p.box.y0 <= y < p.box.y1 for p in trajectory.pictures):
      return True
  return False


def random_crop(tools: Toolbox, *, seed: int) -> agent.Run:
  """Executes zooms at a random place of the first image, with the size the policy asked for."""

  def place(box: Box, task: Task, shown: int) -> tuple[float, float]:
    # The same whenever the call is executed: those of a round are in any order.
    rng = np.random.default_rng([seed, int(content_key(task.id), 16), shown])
    height, width = task.images[0].shape[:2]
    return rng.uniform(0, width - box.width), rng.uniform(0, height - box.height)

  return _moved(tools, place)


def oracle_crop(tools: Toolbox) -> agent.Run:
  """Executes zooms around the task's evidence, with the size the policy asked for.

  Evidence is shown in order; the last box serves further calls. Raises ValueError for a task that
  has none.
  """

  def place(box: Box, task: Task, shown: int) -> tuple[float, float]:
    if not task.boxes:
      raise ValueError(f"task {task.id!r} has no evidence box for the oracle to show")
    height, width = task.images[0].shape[:2]
    x, y = task.boxes[min(shown, len(task.boxes) - 1)].center
    inside = lambda start, size, limit: min(max(start - size / 2, 0.0), limit - size)
    return inside(x, box.width, width), inside(y, box.height, height)

  return _moved(tools, place)


def _moved(tools: Toolbox, place: Callable[[Box, Task, int], tuple[float, float]]) -> agent.Run:
  """Runs zooms with their box moved to where `place` says.

  Failed calls stay as they are, and so do those of tools that do not zoom.
  """

  def execute(
    call: ToolCall, task: Task, results: Sequence[ToolResult], view: View = IDENTITY
  ) -> ToolResult:
    asked = tools.run(call, task, results, view)
    if asked.error is not None or call.name in OTHERS:
      return asked
    box = asked.images[0].box
    shown = sum(bool(result.images) for result in results)  # A failed call showed nothing.
    x, y = place(box, task, shown)
    moved = Box(x, y, x + box.width, y + box.height)
    return tools.run(_at(moved, task, tools), task, results, view)

  return execute


def _at(box: Box, task: Task, tools: Toolbox) -> ToolCall:
  """A zoom call on a box in source pixels of the first image.

  Raises ValueError for tools that are not of preset "qwen": other frames are not written yet.
  """
  if "zoom_in" not in tools.tools:
    raise ValueError(f"tools {sorted(tools.tools)}: crops are moved in preset 'qwen' only")
  height, width = task.images[0].shape[:2]
  shown_height, shown_width = tools.shown_size(height, width)
  sx, sy = shown_width / width, shown_height / height
  corners = [box.x0 * sx, box.y0 * sy, box.x1 * sx, box.y1 * sy]
  return ToolCall(name="zoom_in", arguments={"bbox_2d": corners})


def arms(
  policy: Policy, asked: Sequence[Task], *, limits: agent.Limits, seed: int
) -> dict[str, Result]:
  """The four arms on the same questions, greedy; of a policy without tools one.

  Crops are moved where all questions have an image, and to the evidence where it is known for all.
  """
  blind = with_tools(policy.settings, policy.model, policy.params, ())
  played = {"no_tools": (blind, blind.tools.run)}
  if policy.tools.tools:
    played = {"tools": (policy, policy.tools.run), **played}
    if all(task.images for task in asked):
      played["random_crop"] = (policy, random_crop(policy.tools, seed=seed))
    if all(task.images and task.boxes for task in asked):
      played["oracle_crop"] = (policy, oracle_crop(policy.tools))
  results = {}
  for name, (p, execute) in played.items():
    results[name] = greedy(p, p.params, asked, limits=limits, execute=execute)
  return results


def table(results: dict[str, Result]) -> str:
  """One line an arm: accuracy in percent with its 95% interval, calls a question, by kind."""
  kinds = [kind for kind in next(iter(results.values())).by_kind if kind]
  lines = [f"{'arm':<12} {'accuracy (95%)':<22} {'calls':>5} {'hits':>6}  " + "  ".join(kinds)]
  for name, r in results.items():
    span = f"{100 * r.accuracy:5.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})"
    by_kind = "  ".join(f"{100 * r.by_kind[k]:{len(k)}.1f}" for k in kinds)
    lines.append(f"{name:<12} {span:<22} {r.tool_calls:5.2f} {100 * r.hit_rate:5.1f}%  {by_kind}")
  return "\n".join(lines)


def tasks(c: Any, policy: Policy) -> list[Task]:
  """The questions of an evaluation of this policy: the first `c.n` of `c.file`, or scenes.

  Args:
    c: fields file and n, and those of `scenes`.

  Raises:
    ValueError: a policy that only reads is to be shown scenes, or as `QuestionFile.open` says.
  """
  if not c.file:
    if not policy.sees:
      raise ValueError("the model only reads: give it questions from a file, here one is empty")
    return scenes(c)
  file = QuestionFile.open(c.file, sees=policy.sees)
  return [file[i] for i in range(min(c.n, len(file)))]


def scenes(c: Any) -> list[Task]:
  """Digit scenes with their answers.

  Args:
    c: fields split, seed, shift, skew (a digit or -1 for none), kinds, n.
  """
  skew = None if c.skew < 0 else c.skew
  source = TaskSource(
    split=c.split, seed=c.seed, shift=c.shift, skew=skew, kinds=tuple(c.kinds), size=c.n
  )
  return [source[i] for i in range(c.n)]


def measured(result: Result) -> dict[str, float]:
  """What of a result goes into the metrics."""
  return {"accuracy": result.accuracy, "tool_calls": result.tool_calls, "hit_rate": result.hit_rate}


class HeldOut:
  """The held-out questions of a training run, and in `best/` the weights that answered most."""

  def __init__(self, c: Any, policy: Policy, workdir: Path):
    """Args:
    c: fields eval, as for `tasks`, and limits, those of `agent.Limits`.
    """
    self._policy, self._limits = policy, agent.Limits(**c.limits)
    self._tasks = tasks(c.eval, policy)
    self._kept = Checkpoints(workdir / BEST, keep=1, background=True)
    step = self._kept.latest_step()
    self.best = 0.0 if step is None else float(self._kept.extra(step)["accuracy"])

  def ask(self, step: int, params: Params, trained: Any, metrics: Metrics) -> None:
    """Logs and prints how they are answered; keeps what was trained if never so well before."""
    result = greedy(self._policy, params, self._tasks, limits=self._limits)
    metrics.log(step, measured(result))
    program.say(f"step {step}: {table({'tools': result})}")
    if result.accuracy > self.best:
      self.best = result.accuracy
      self._kept.save(step, {"params": trained}, {"accuracy": result.accuracy})

  def close(self) -> None:
    """Waits until the best is on disk."""
    self._kept.close()


def main(c: Any, workdir: Path) -> dict[str, Result]:
  workdir.mkdir(parents=True, exist_ok=True)
  policy = load_policy(c.model)
  asked = tasks(c.eval, policy)
  results = arms(policy, asked, limits=agent.Limits(**c.limits), seed=c.eval.seed)
  source = c.eval.file or f"{c.eval.split}, shift {c.eval.shift}, seed {c.eval.seed}"
  print(f"{c.model.path} on {source}, n {len(asked)}")
  print(table(results))
  out = {"config": c.to_dict(), "arms": {name: r.summary() for name, r in results.items()}}
  (workdir / "evaluate.json").write_text(json.dumps(out, indent=2))
  return results


if __name__ == "__main__":
  program.launch(main)
