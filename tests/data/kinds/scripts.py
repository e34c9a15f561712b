"""Puzzles to be looked at, and their solvers before tools that say what a test wants."""

import numpy as np

from pixelis_jax.data.kinds import KINDS
from pixelis_jax.data.kinds.puzzle import materials
from pixelis_jax.tools.frames import whole_frame
from pixelis_jax.tools.sight import Sight
from pixelis_jax.tools.views import IDENTITY
from pixelis_jax.types import ToolResult


def composed(kind, seed, split="dev"):
  return KINDS[kind].compose(np.random.default_rng(seed), materials(split), f"{kind}-{seed}")


def answered(kind, puzzle, texts):
  """Calls as (name, arguments), and the answer when the tools say these texts, one after the other.

  A whole image is shown in 80 x 60. ZOOM_IN and SELECT_FRAMES show a picture of their own.
  """
  results = []
  sight = Sight(
    task=puzzle.task, results=results, shown_size=lambda height, width: (60, 80), view=IDENTITY
  )
  solver = KINDS[kind].solve(puzzle, np.random.default_rng(0), sight)
  calls, texts = [], iter(texts)
  try:
    call = next(solver)
    while True:
      calls.append((call.name, dict(call.arguments)))
      shown = ()
      if call.name == "zoom_in":
        shown = (sight.crop(0, puzzle.looks[0].box),)
      elif call.name == "select_frames":
        shown = (whole_frame(sight, 0, 0),)
      results.append(ToolResult(text="" if shown else next(texts), images=shown))
      call = solver.send(results[-1])
  except StopIteration as e:
    assert next(texts, None) is None
    return calls, e.value
