"""How often the policy is right, and whether its tools are why: the four-arm ablation.

Arms, same weights and same questions: `tools` as trained; `no_tools`, a prompt that offers none;
`random`, each call of a tool points somewhere else; `oracle`, in the place of each call one is made
that the scripted solver of the question's kind would make, who knows where to look.

    python -m pixelis_jax.evaluate --config=configs/evaluate.py --workdir=runs/evaluate
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixelis_jax import agent, cluster, program
from pixelis_jax.algo.verifiers import verify
from pixelis_jax.checkpoint import BEST, Checkpoints
from pixelis_jax.data.mixture import Asked, Mixture, look_at_boxes
from pixelis_jax.data.questions import QuestionFile
from pixelis_jax.metrics import Metrics, interval, mean_interval
from pixelis_jax.sampler import Params, Policy, load_policy, with_tools
from pixelis_jax.tools import Tool, Toolbox
from pixelis_jax.tools.sight import Sight
from pixelis_jax.tools.views import IDENTITY, View
from pixelis_jax.types import Generate, Task, ToolCall, ToolResult, Trajectory, content_key

ACCURACY = "val-core/all/acc/mean@1"  # As it is logged, of all held-out questions.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Score:
  """Accuracy in 0 to 1 with its 95% interval, over n questions."""

  n: int
  accuracy: float
  low: float
  high: float

  @classmethod
  def of(cls, right: np.ndarray) -> "Score":
    """Of one number a question, from 0 to 1: how right its answer is.

    The interval is Wilson's where answers are right or wrong. Where one is partly right it is
    Student's t, as far as the numbers go; of a single question all of that.
    """
    n, lowest = len(right), min(0.0, float(right.min(initial=0.0)))  # A rule may take off.
    if np.isin(right, (0, 1)).all():
      low, high = interval(int(right.sum()), n)
    else:
      low, high = mean_interval(right.tolist()) if n > 1 else (lowest, 1.0)
    return cls(n=n, accuracy=float(right.mean()), low=max(low, lowest), high=min(high, 1.0))

  def __str__(self) -> str:
    """In percent."""
    return f"{100 * self.accuracy:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
  """The score of all questions and of each kind; calls and errors a question.

  `hit_rate` is, of episodes that looked and whose evidence is known, the share in which a crop
  shows the evidence's centre.
  """

  score: Score
  tool_calls: float
  tool_errors: float
  hit_rate: float
  by_kind: dict[str, Score]
  trajectories: tuple[Trajectory, ...]

  @property
  def accuracy(self) -> float:
    """Of all questions, 0 to 1."""
    return self.score.accuracy

  def summary(self) -> dict[str, Any]:
    """Everything but the trajectories, for json."""
    own = ("tool_calls", "tool_errors", "hit_rate")
    return {
      **dataclasses.asdict(self.score),
      **{name: getattr(self, name) for name in own},
      "by_kind": {kind: dataclasses.asdict(score) for kind, score in self.by_kind.items()},
    }


def run(
  asked: Sequence[Task],
  *,
  generate: Generate,
  run: agent.Run,
  limits: agent.Limits,
  verifier: str = "equal",
) -> Result:
  """Plays every task once and says how right its answer is, by a rule of `VERIFIERS`.

  Several processes play some each; the numbers are of all, the trajectories the process's own.

  Raises:
    ValueError: a task has no answer, or one that this rule cannot hold others against.
  """
  unlabelled = [t.id for t in asked if t.answer is None]
  if unlabelled:
    raise ValueError(
      f"{len(unlabelled)} tasks have no answer to score against, first {unlabelled[0]!r}"
    )
  for task in asked:
    try:
      verify(task.answer, task.answer, verifier=verifier)
    except ValueError as e:
      raise ValueError(f"task {task.id!r} cannot be scored by verifier {verifier!r}: {e}") from e
  own = cluster.split(len(asked))
  mine = asked[own.start : own.stop]
  played = agent.play(mine, generate=generate, run=run, limits=limits)
  found = np.zeros((len(asked), 5), np.float32)
  for i, t in zip(own, played, strict=True):
    right = verify(t.answer, t.task.answer, verifier=verifier)
    looked = bool(t.calls and t.task.boxes)
    found[i] = right, t.calls, t.errors, looked, looked and _saw_evidence(t)
  right, calls, errors, looked, hits = cluster.summed(found).T
  kinds = sorted({t.kind for t in asked})
  return Result(
    score=Score.of(right),
    tool_calls=float(calls.mean()),
    tool_errors=float(errors.mean()),
    hit_rate=float(hits.sum() / looked.sum()) if looked.any() else 0.0,
    by_kind={k: Score.of(right[[t.kind == k for t in asked]]) for k in kinds},
    trajectories=tuple(played),
  )


def greedy(
  policy: Policy,
  params: Params,
  asked: Sequence[Task],
  *,
  limits: agent.Limits,
  execute: agent.Run | None = None,
  verifier: str = "equal",
) -> Result:
  """`run` with these parameters at temperature 0; the policy's own tools execute by default."""
  generate = policy.sampler.bind(params, key=jax.random.key(0), version=0, temperature=0.0)
  how = {"run": execute or policy.tools.run, "limits": limits, "verifier": verifier}
  return run(asked, generate=generate, **how)


def _saw_evidence(trajectory: Trajectory) -> bool:
  for x, y in (box.center for box in trajectory.task.boxes):
    if any(p.box.x0 <= x < p.box.x1 and p.box.y0 <= y < p.box.y1 for p in trajectory.pictures):
      return True
  return False


def random_places(tools: Toolbox, *, seed: int) -> agent.Run:
  """Executes calls at random places of the image they point in, and frames at random times.

  Boxes keep their size. What points nowhere else stays: masks, which came of such calls; and calls
  that take all of an image, as nothing of it is elsewhere.
  """

  def moved(call: ToolCall, task: Task, results: Sequence[ToolResult], view: View) -> ToolCall:
    # The same whenever the call is executed: those of a round are in any order.
    shown = sum(result.error is None for result in results)
    rng = np.random.default_rng([seed, int(content_key(task.id), 16), shown])
    sight = tools.sight(task, results, view)
    return ToolCall(name=call.name, arguments=_elsewhere(call, tools.tools[call.name], sight, rng))

  return _instead(tools, moved)


def _elsewhere(
  call: ToolCall, tool: Tool, sight: Sight, rng: np.random.Generator
) -> dict[str, object]:
  """The call's arguments with other places and times; the call was executed, so they are right."""
  arguments = dict(call.arguments)
  if "bbox_2d" in arguments or "point_2d" in arguments:
    height, width = tool.frame(arguments, sight)
    x0, y0, x1, y1 = arguments.get("bbox_2d", (0, 0, 0, 0))
    across, down = min(x1, width) - max(x0, 0), min(y1, height) - max(y0, 0)
    x, y = rng.uniform(0, width - across), rng.uniform(0, height - down)
    if "bbox_2d" in arguments:
      arguments["bbox_2d"] = [x, y, x + across, y + down]
    else:
      arguments["point_2d"] = [x, y]
  if call.name == "select_frames":
    video = sight.task.videos[int(arguments.get("video", 1)) - 1]
    if "times" in arguments:
      arguments["times"] = rng.uniform(0, video.times[-1], len(arguments["times"])).tolist()
    else:
      name = "frames" if "frames" in arguments else "target_frames"
      numbers, _ = sight.shown_frames(video)
      arguments[name] = rng.integers(1, len(numbers) + 1, len(arguments[name])).tolist()
  return arguments


def oracle(tools: Toolbox, asked: Sequence[Asked]) -> agent.Run:
  """Executes the calls of each question's solver in the place of the policy's, one by one.

  The last of them serves further calls. Raises ValueError for a question that nobody can solve with
  these tools.
  """
  solvers = {}
  for one in asked:
    if one.solve is None or not set(one.tools) <= set(tools.tools):
      raise ValueError(f"task {one.task.id!r} has no solver for the oracle with {[*tools.tools]}")
    solvers[one.task.id] = one.solve

  def told(call: ToolCall, task: Task, results: Sequence[ToolResult], view: View) -> ToolCall:
    shown: list[ToolResult] = []
    solver = solvers[task.id](tools.sight(task, shown, view))
    made = next(solver)
    for result in (r for r in results if r.error is None):  # A failed call showed nothing.
      shown.append(result)
      try:
        made = solver.send(result)
      except StopIteration:
        break
    return made

  return _instead(tools, told)


def _instead(
  tools: Toolbox, other: Callable[[ToolCall, Task, Sequence[ToolResult], View], ToolCall]
) -> agent.Run:
  """Runs what `other` says in the place of a call. Failed calls stay as they are."""

  def execute(
    call: ToolCall, task: Task, results: Sequence[ToolResult], view: View = IDENTITY
  ) -> ToolResult:
    given = tools.run(call, task, results, view)
    if given.error is not None:
      return given
    return tools.run(other(call, task, results, view), task, results, view)

  return execute


def arms(
  policy: Policy,
  asked: Sequence[Asked],
  *,
  limits: agent.Limits,
  seed: int,
  verifier: str = "equal",
) -> dict[str, Result]:
  """The four arms on the same questions, greedy; of a policy without tools one.

  Calls are moved where all questions show something, and are the solvers' where all have one.
  """
  blind = with_tools(policy.settings, policy.model, policy.params, ())
  played = {"no_tools": (blind, blind.tools.run)}
  tools, tasks = policy.tools, [one.task for one in asked]
  if tools.tools:
    played = {"tools": (policy, tools.run), **played}
    if all(task.images or task.videos for task in tasks):
      played["random"] = (policy, random_places(tools, seed=seed))
    if all(one.solve is not None and set(one.tools) <= set(tools.tools) for one in asked):
      played["oracle"] = (policy, oracle(tools, asked))
  how = {"limits": limits, "verifier": verifier}
  return {
    name: greedy(p, p.params, tasks, execute=execute, **how)
    for name, (p, execute) in played.items()
  }


def table(results: Mapping[str, Result]) -> str:
  """One line for all questions and one a kind: accuracy in percent with its 95% interval, by arm.

  Below them calls and errors a question, and hits in percent.
  """
  first = next(iter(results.values()))
  kinds = [kind for kind in first.by_kind if kind]
  line = lambda name, n, cells: f"{name:<8} {n:>5}  " + "".join(f"{cell:<23}" for cell in cells)
  lines = [line("kind", "n", results)]
  lines.append(line("all", first.score.n, [str(r.score) for r in results.values()]))
  for kind in kinds if len(kinds) > 1 else ():
    scores = [r.by_kind[kind] for r in results.values()]
    lines.append(line(kind, scores[0].n, map(str, scores)))
  lines.append(line("calls", "", [f"{r.tool_calls:.2f}" for r in results.values()]))
  lines.append(line("errors", "", [f"{r.tool_errors:.2f}" for r in results.values()]))
  lines.append(line("hits", "", [f"{100 * r.hit_rate:.1f}" for r in results.values()]))
  return "\n".join(text.rstrip() for text in lines)


def questions(c: Any, policy: Policy) -> list[Asked]:
  """The questions of an evaluation of this policy: the first `c.n` of `c.file`, or made ones.

  Args:
    c: fields file and n, and those of `made`.

  Raises:
    ValueError: a policy that only reads is to be shown scenes, or as `QuestionFile.open` says.
  """
  if not c.file:
    if not policy.sees:
      raise ValueError("the model only reads: give it questions from a file, here one is empty")
    source = made(c)
    return [source.asked(i) for i in range(len(source))]
  file = QuestionFile.open(c.file, sees=policy.sees)
  return [_of_file(file[i], policy.tools.zoom) for i in range(min(c.n, len(file)))]


def _of_file(task: Task, zoom: Tool | None) -> Asked:
  if not task.images or not task.boxes or zoom is None:
    return Asked(task=task)
  return Asked(task=task, tools=(zoom.name,), solve=partial(look_at_boxes, task, zoom))


def tasks(c: Any, policy: Policy) -> list[Task]:
  """Those of `questions`."""
  return [one.task for one in questions(c, policy)]


def made(c: Any) -> Mixture:
  """Digit scenes and puzzles with their answers.

  Args:
    c: fields split, seed, shift, skew (a digit or -1 for none), kinds, n.
  """
  skew = None if c.skew < 0 else c.skew
  return Mixture(
    split=c.split, seed=c.seed, shift=c.shift, skew=skew, kinds=tuple(c.kinds), size=c.n
  )


def measured(result: Result) -> dict[str, float]:
  """What of a result goes into the metrics: accuracies of each kind, where several, and of all."""
  scores = result.by_kind if len(result.by_kind) > 1 else {}
  return {
    **{f"val-core/{kind}/acc/mean@1": score.accuracy for kind, score in scores.items()},
    ACCURACY: result.accuracy,
    "val-aux/all/tool_call_counts/mean@1": result.tool_calls,
    "val-aux/all/hit_rate/mean@1": result.hit_rate,
  }


class HeldOut:
  """The held-out questions of a training run, and in `best/` the weights that answered most."""

  def __init__(self, c: Any, policy: Policy, workdir: Path):
    """Args:
    c: fields eval, as for `tasks` and verifier, and limits, those of `agent.Limits`.
    """
    self._policy = policy
    self._how = {"limits": agent.Limits(**c.limits), "verifier": c.eval.verifier}
    self._tasks = tasks(c.eval, policy)
    self._kept = Checkpoints(workdir / BEST, keep=1, background=True)
    step = self._kept.latest_step()
    self.best = 0.0 if step is None else float(self._kept.extra(step)["accuracy"])

  def ask(self, step: int, params: Params, trained: Any, metrics: Metrics) -> Result:
    """Logs and prints how they are answered; keeps what was trained if never so well before.

    The numbers are the same in all processes.
    """
    result = greedy(self._policy, params, self._tasks, **self._how)
    metrics.log(step, measured(result))
    program.say(f"step {step}: {table({'tools': result})}")
    if result.accuracy > self.best:
      self.best = result.accuracy
      self._kept.save(step, {"params": trained}, {"accuracy": result.accuracy})
    return result

  def close(self) -> None:
    """Waits until the best is on disk."""
    self._kept.close()


def main(c: Any, workdir: Path) -> dict[str, Result]:
  workdir.mkdir(parents=True, exist_ok=True)
  policy = load_policy(c.model)
  asked = questions(c.eval, policy)
  how = {"limits": agent.Limits(**c.limits), "verifier": c.eval.verifier}
  results = arms(policy, asked, seed=c.eval.seed, **how)
  source = c.eval.file or f"{c.eval.split}, shift {c.eval.shift}, seed {c.eval.seed}"
  print(f"{c.model.path} on {source}, n {len(asked)}")
  print(table(results))
  out = {"config": c.to_dict(), "arms": {name: r.summary() for name, r in results.items()}}
  (workdir / "evaluate.json").write_text(json.dumps(out, indent=2))
  return results


if __name__ == "__main__":
  program.launch(main)
