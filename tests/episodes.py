"""Episodes of the real sampler with random weights, which never ask for a tool of their own."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from configs import demo
from pixelis_jax.types import (
  Ballot,
  Box,
  Completion,
  Experience,
  Generate,
  Picture,
  Status,
  Step,
  Task,
  ToolResult,
  Trajectory,
  Turns,
  Vote,
)
from tests import fakes

LIFT = 30.0  # Channel 0 of every embedding: the same large input everywhere.
SCALE = 0.02  # And of the final norm.
SAMPLED = {}  # By image: the same samples whenever they are asked for.


def task(id: str, question: str = "what?", *, seed: int = 0) -> Task:
  """A question about a 40 x 40 noise image: 80 x 80 as shown, 16 image tokens."""
  return fakes.task(id, question=question, images=[fakes.image(40, 40, seed=seed)])


def unlabelled(id, seed=0):
  return dataclasses.replace(task(id, seed=seed), answer=None)


def crop(seed: int, *, height: int = 30, width: int = 30) -> ToolResult:
  """A tool result with a noise picture of this size."""
  picture = Picture(
    pixels=fakes.image(height, width, seed=seed),
    source=0,
    box=Box(0.0, 0.0, float(width), float(height)),
  )
  return ToolResult(text="Here is the zoomed image.", images=(picture,))


def tilted(params: dict, nats: dict[int, float]) -> dict:
  """Weights whose logit of a token is higher by roughly `nats`, whatever they have read.

  Embedding and head are one matrix: a channel high in every input is a constant to the head, small
  enough by the last norm's scale that logits keep their precision. A normed state's channel is at
  most sqrt(width); it is nearly that where one channel outweighs all others.
  """
  table, scale = params["text"]["embedding"], params["text"]["norm"]["scale"]
  table = table.at[:, 0].set(LIFT)
  for token, amount in nats.items():
    table = table.at[token, 0].add(amount / (SCALE * table.shape[1] ** 0.5))
  norm = {"scale": scale.at[0].set(SCALE)}
  return {**params, "text": {**params["text"], "embedding": table, "norm": norm}}


def asked(tasks: Sequence[Task]) -> list[tuple[Task, Turns]]:
  return [(task, ()) for task in tasks]


def continued(
  requests: Sequence[tuple[Task, Turns]],
  completions: Sequence[Completion],
  results: Sequence[ToolResult],
) -> list[tuple[Task, Turns]]:
  """The next turn's requests, had each completion been a call with this result."""
  return [
    (task, (*steps, Step(completion=completion, result=result)))
    for (task, steps), completion, result in zip(requests, completions, results, strict=True)
  ]


def ended(
  requests: Sequence[tuple[Task, Turns]], completions: Sequence[Completion]
) -> list[Trajectory]:
  return [
    Trajectory(
      task=task,
      steps=(*steps, Step(completion=completion)),
      status=Status.NO_ANSWER,
      answer=None,
    )
    for (task, steps), completion in zip(requests, completions, strict=True)
  ]


def two_turns(
  generate: Generate, tasks: Sequence[Task], results: Sequence[ToolResult]
) -> list[Trajectory]:
  """Every task asked, shown its result and asked again."""
  first = asked(tasks)
  second = continued(first, generate(first), results)
  return ended(second, generate(second))


def look(policy, task: Task, *, seed: int) -> Trajectory:
  """An episode of one call, which showed the crop of this seed; both turns are scripted."""
  called = Step(completion=fakes.completion("zoom"), result=crop(seed))
  shown = policy.chat.result(called.result)
  said = Step(completion=dataclasses.replace(fakes.completion("7"), context=shown))
  return Trajectory(task=task, steps=(called, said), status=Status.ANSWERED, answer="7")


def max_difference(a: dict, b: dict) -> float:
  """The largest difference of any two weights."""
  gaps = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)
  return max(jax.tree.leaves(gaps))


def copied(params: dict) -> dict:
  """Weights that a donating step may consume."""
  return jax.tree.map(jnp.copy, params)


def online_config(path: str):
  """The online loop's on random weights, with two turns an episode."""
  c = demo.get_config("debug").copy_and_resolve_references().unlock()
  c.model.path, c.model.random_seed = path, 0
  c.limits.turns = 2
  c.memory.backend = "exact"
  return c.lock()


def experience(policy, task, odd, *, id="e") -> Experience:
  """Four samples of a task, voted "1"; those in `odd` answered it, so that advantages differ."""
  image = task.images[0].tobytes()
  if image not in SAMPLED:
    generate = policy.sampler.bind(policy.params, key=jax.random.key(3), version=0)
    SAMPLED[image] = generate([(task, ())] * 4)
  samples = []
  for i, completion in enumerate(SAMPLED[image]):
    answer = "1" if i in odd else "2"
    samples.append(
      Trajectory(
        task=task, steps=(Step(completion=completion),), status=Status.ANSWERED, answer=answer
      )
    )
  vote = Vote(answer="1", confidence=0.9, share=0.9, margin=0.8, counts={"1": 0.9}, ballots=())
  key = np.zeros(2 * policy.model.config.text.width, np.float32)
  key[0] = 1.0
  return Experience(id=id, key=key, trajectories=tuple(samples), vote=vote, policy_version=0)


def seen(policy, id: str, *, plain: int, clear: int, view: str = "stretch"):
  """An experience whose looks showed these crops; its vote is what was said in this view."""
  task = unlabelled(id)
  looks = look(policy, task, seed=plain), look(policy, task, seed=clear)
  made = experience(policy, task, {0}, id=id)
  vote = dataclasses.replace(made.vote, ballots=(Ballot(answer="1", weight=1.0, view=view),))
  return dataclasses.replace(made, looks=looks, vote=vote)
