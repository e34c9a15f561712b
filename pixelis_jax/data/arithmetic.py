"""Word problems of arithmetic with exact answers, in splits that share no numbers.

A problem is a template, a name, a thing and whole numbers; its answer is a positive whole number.
Which numbers occur together decides the split: 3 and 5, whatever is done with them, in whatever
order and words, are in one split only. So nothing that was learned by heart helps on another.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from pixelis_jax.types import Task

# Of all sets of numbers, in order.
SPLITS = {"stream": 0.6, "dev": 0.2, "held_out": 0.2}
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pens", "stamps")


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
  """`text` has fields name, things, a, b and with two steps c; `answer` takes the numbers."""

  kind: str
  text: str
  answer: Callable[..., int]


def _templates(kind: str, answer: Callable[..., int], *texts: str) -> tuple[Template, ...]:
  return tuple(Template(kind, text, answer) for text in texts)


# By the number of steps.
TEMPLATES = {
  1: (
    *_templates(
      "add",
      lambda a, b: a + b,
      "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
      "There are {a} {things} on a table and {b} in a drawer. How many {things} are there in all?",
      "{name} found {a} {things} yesterday and {b} today. How many {things} did {name} find?",
    ),
    *_templates(
      "subtract",
      lambda a, b: a - b,
      "{name} had {a} {things} and gave {b} of them away. How many {things} does {name} have left?",
      "There were {a} {things} in a box. {name} took {b} out. How many {things} are still in it?",
      "{name} needs {a} {things} and has {b}. How many more {things} does {name} need?",
    ),
    *_templates(
      "multiply",
      lambda a, b: a * b,
      "{name} has {a} bags with {b} {things} in each. How many {things} does {name} have?",
      "{name} buys {b} {things} each day for {a} days. How many {things} does {name} buy?",
      "A box holds {b} {things}. How many {things} do {a} boxes hold?",
    ),
  ),
  2: (
    *_templates(
      "add, subtract",
      lambda a, b, c: a + b - c,
      "{name} has {a} {things}, buys {b} more and gives {c} away. How many {things} are left?",
      "A shop had {a} {things}, got {b} more and sold {c}. How many {things} does it have now?",
    ),
    *_templates(
      "multiply, add",
      lambda a, b, c: a * b + c,
      "{name} has {a} bags with {b} {things} in each and {c} more in a box. How many {things} does"
      " {name} have?",
      "{name} buys {b} {things} each day for {a} days and then finds {c}. How many {things} does"
      " {name} have?",
    ),
    *_templates(
      "multiply, subtract",
      lambda a, b, c: a * b - c,
      "{name} buys {a} boxes of {b} {things} and loses {c} of them. How many {things} are left?",
      "There were {a} bags with {b} {things} in each. {name} took {c} {things}. How many {things}"
      " are left?",
    ),
  ),
}


def numbers(split: str, *, steps: int, most: int) -> list[tuple[int, ...]]:
  """The sets of `steps` + 1 numbers from 2 to `most`, each rising, that problems of a split have.

  ValueError for a split or a number of steps that there is not, or too few numbers for all splits.
  """
  if split not in SPLITS:
    raise ValueError(f"split {split!r} must be one of {tuple(SPLITS)}")
  if steps not in TEMPLATES:
    raise ValueError(f"steps {steps} must be one of {tuple(TEMPLATES)}")
  sets = list(itertools.combinations_with_replacement(range(2, most + 1), steps + 1))
  ends = np.round(np.cumsum([0.0, *SPLITS.values()]) * len(sets)).astype(int)
  if not np.diff(ends).all():
    raise ValueError(f"most {most} leaves a split without numbers: it must be larger")
  # Whatever a run's seed is: the held-out problems of one must not be in the stream of another.
  order = np.random.default_rng([steps, most]).permutation(len(sets))
  at = list(SPLITS).index(split)
  return sorted(sets[i] for i in order[ends[at] : ends[at + 1]])


def problems(split: str, *, n: int, seed: int, steps: int = 1, most: int = 20) -> list[Task]:
  """`n` different problems, the same for the same arguments; with answers.

  Args:
    steps: 1 or 2 operations.
    most: the largest number in a question, from 4. Answers may be larger.

  Raises:
    ValueError: as `numbers`, or so many different problems were not found.
  """
  given = numbers(split, steps=steps, most=most)
  rng = np.random.default_rng([seed, list(SPLITS).index(split), steps, most])
  pick = lambda options: options[rng.integers(len(options))]
  found: dict[str, Task] = {}
  for _ in range(20 * n):
    template, values = pick(TEMPLATES[steps]), rng.permutation(pick(given)).tolist()
    answer = template.answer(*values)
    fields = dict(zip("abc", values, strict=False), name=pick(NAMES), things=pick(THINGS))
    question = template.text.format(**fields)
    if answer > 0 and question not in found:
      id = f"{split}-{seed}-{len(found):05d}"
      found[question] = Task(
        id=id, images=(), question=question, answer=str(answer), kind=template.kind
      )
    if len(found) == n:
      return list(found.values())
  raise ValueError(f"{len(found)} of {n} different problems found: raise most {most}, or ask fewer")
