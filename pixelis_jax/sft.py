"""Supervised fine-tuning on executed demonstrations, loss on the assistant's tokens only.

    python -m pixelis_jax.sft --config=configs/tiny_sft.py --workdir=runs/sft

Resumes from the workdir bit for bit: parameters, optimizer and the data iterator come from one
checkpoint. With `--config.model.lora.rank=16` only adapters are trained, see model/lora.py.
"""

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import FrozenConfigDict
from optax import GradientTransformation, Schedule

from pixelis_jax import (
  batch,
  cluster,
  evaluate,
  learner,
  program,
  runs,
  sampler,
  sharding,
  timing,
)
from pixelis_jax.algo.data_curriculum import DataCurriculum
from pixelis_jax.checkpoint import FOLDER, Checkpoints
from pixelis_jax.data import demos, difficulty
from pixelis_jax.data.built import Dataset
from pixelis_jax.data.kinds.text import recital
from pixelis_jax.data.mixture import Demonstrations, Mixture
from pixelis_jax.data.questions import QuestionFile
from pixelis_jax.data.streams import shuffled, weighted
from pixelis_jax.lessons import Lessons
from pixelis_jax.metrics import Metrics, check_wandb, due, named
from pixelis_jax.model import cost, trainable
from pixelis_jax.model.lora import join
from pixelis_jax.model.policy import Model

RECITED = 6  # Codes in a lesson of saying what was read.


def rows(
  c: Any, policy: sampler.Policy, blind: sampler.Policy, curriculum: DataCurriculum
) -> grain.DatasetIterator:
  """Batches of rows for ever, a function of config and stage; each process has its share of each.

  The first `c.data.parts` rows teach the halves of a demonstration apart: where to look (calls
  alone, in a digit scene to all that it holds), how to read (the picture alone, answered at once; a
  puzzle's answer is in what tools say, so it is shown whole), and to answer from what tools said:
  half of these are codes that READ_TEXT read, half the dataset's demonstrations without pictures.
  Later rows are whole demonstrations, but for `c.data.direct` of them that answer from the
  overview, without tools. While only the tower learns, all rows hold a whole demonstration's
  images. Prompts list all tools, but for `c.data.zoom_only` of the digit scenes', which need no
  other. The tours of puzzles are `c.data.kept` that come again, as one takes as long to make as a
  row to learn; among the first `c.data.scenes` rows are none, as those of digit scenes are shorter.

  With `c.data.file` rows are that file's solutions or that dataset's demonstrations, but for
  `c.data.made` of them, the first `c.data.scenes`, and those by which only the tower learns, that
  are made all the same; only a dataset can have a curriculum.
  """
  built = Dataset.open(c.data.file) if c.data.file and Path(c.data.file).is_dir() else None
  if c.curriculum.enable and built is None:
    raise ValueError(
      f"curriculum.enable needs a dataset (data/build.py) as data.file, not {c.data.file!r}: "
      "scenes and files of questions have no difficulties"
    )
  told = _retold(c, policy, built) if c.data.recite and built is not None else None
  made = _made(c, policy, blind, told) if c.data.made or not c.data.file else None
  read = None
  if built is not None:
    read = _of_dataset(c, policy, built, curriculum)
  elif c.data.file:
    read = _of_questions(c, policy)
  first = max(c.data.scenes, c.see_steps * c.batch)
  share = 1.0 - c.data.made

  def row(index: int, _: int) -> batch.Row:
    turn = int(index * share)  # Of the file: this row, if by the next one it has had one more.
    its = made is None or (index >= first and int((index + 1) * share) > turn)
    return read[turn] if read is not None and its else made(index)

  return _batches(grain.MapDataset.range(1).repeat().map_with_index(row), c)


def _retold(
  c: Any, policy: sampler.Policy, built: Dataset
) -> Callable[[np.random.Generator], batch.Row]:
  """Demonstrations of the dataset that end in a supervised answer, told without their pictures."""
  order = np.flatnonzero(built.weights)

  @functools.lru_cache(maxsize=c.data.kept)
  def told(index: int) -> batch.Row | None:
    demo = built.demo(index, policy.tools)
    return batch.demo_row(demos.retold(demo), policy.chat) if demo.turns[-1].supervised else None

  def drawn(rng: np.random.Generator) -> batch.Row:
    tries = (told(int(index)) for index in rng.choice(order, 64))
    if row := next(filter(None, tries), None):
      return row
    raise ValueError(f"{c.data.file}: 64 records in a row have no supervised answer to recite")

  return drawn


def _made(
  c: Any,
  policy: sampler.Policy,
  blind: sampler.Policy,
  told: Callable[[np.random.Generator], batch.Row] | None,
) -> Callable[[int], batch.Row]:
  """Scenes and puzzles, made as they are read: the row at an index of the run."""
  mixture = lambda *kinds: Mixture(split="train", seed=c.seed, kinds=kinds, size=c.data.n)
  shown = lambda tasks: Demonstrations(tasks=tasks, toolbox=policy.tools, mistakes=c.data.mistakes)
  tasks = mixture(*c.data.kinds)
  looking = shown(tasks)
  toured = len(c.data.toured) / len((*c.data.kinds, *c.data.toured))
  touring = shown(mixture(*c.data.toured)) if toured else None
  kept = functools.lru_cache(maxsize=c.data.kept)
  tour = kept(lambda index: batch.demo_row(touring.tour(index), policy.chat))
  zooming = sampler.with_tools(policy.settings, policy.model, policy.params, ("zoom_in",))

  def row(index: int) -> batch.Row:
    draw, listed, which = np.random.default_rng((c.seed, index)).random(3)
    chat = lambda scene: zooming.chat if scene and listed < c.data.zoom_only else policy.chat
    seeing, part = index < c.see_steps * c.batch, index < c.data.parts
    alone, index = index < c.data.scenes, index % c.data.n
    if part and not seeing:
      if draw < c.data.recite:
        rng = np.random.default_rng((c.seed, index, 1))
        if told and rng.random() < 0.5:
          return told(rng)
        return batch.demo_row(recital(rng, RECITED), policy.chat)
      if draw < c.data.recite + c.data.look:
        if which < toured and not alone:
          return tour(index % (c.data.kept or c.data.n))
        return batch.demo_row(looking.tour(index), chat(tasks.is_scene(index)))
      if tasks.is_scene(index):
        return batch.demo_row(demos.reading(looking[index]), blind.chat)
    elif draw < c.data.direct and not seeing:
      return batch.demo_row(demos.direct(tasks[index]), blind.chat)
    return batch.demo_row(looking[index], chat(tasks.is_scene(index)))

  return row


def _of_dataset(
  c: Any, policy: sampler.Policy, built: Dataset, curriculum: DataCurriculum
) -> grain.MapDataset:
  kept = functools.lru_cache(maxsize=c.data.kept)
  shown = kept(lambda index: batch.demo_row(built.demo(index, policy.tools), policy.chat))
  if not c.curriculum.enable:
    return weighted(built.weights, seed=c.seed).map(shown)
  levels = built.levels()
  # Of all stages: what a later one lacks is said now.
  weights = [difficulty.staged(built.weights, levels, shares) for shares in curriculum.stages]
  return weighted(weights[curriculum.stage], seed=curriculum.seed(c.seed)).map(shown)


def _of_questions(c: Any, policy: sampler.Policy) -> grain.MapDataset:
  file = QuestionFile.open(c.data.file, sees=policy.sees)
  solved = lambda index: batch.demo_row(file.demo(index, policy.tools), policy.chat)
  return shuffled(file, seed=c.seed).map(solved)


def _batches(dataset: grain.MapDataset, c: Any) -> grain.DatasetIterator:
  read = grain.ReadOptions(num_threads=c.data.threads, prefetch_buffer_size=2 * c.batch)
  own = dataset[jax.process_index() :: jax.process_count()]
  size = len(cluster.share(c.batch, "batch"))
  return iter(own.to_iter_dataset(read).batch(size, batch_fn=list))


def main(c: Any, workdir: Path) -> learner.TrainState:
  check_wandb(c.wandb)
  if not 0 <= c.data.made < 1:
    raise ValueError(f"data.made {c.data.made} must lie in [0, 1): what it leaves is the file's")
  if c.data.file and (c.see_steps or c.data.scenes) and not c.data.made:
    raise ValueError(
      f"see_steps is {c.see_steps} and data.scenes {c.data.scenes}: no file says what its images "
      "show, and its rows are no scenes; with data.file both must be 0, or data.made above 0"
    )
  mesh = sharding.make_mesh(**c.mesh)
  key = jax.random.fold_in(jax.random.key(c.seed), 1)
  rollouts = sharding.relaid(mesh, **c.rollout_mesh)
  policy = sampler.load_policy(c.model, mesh=mesh, rollouts=rollouts, adapters=key)
  blind = sampler.with_tools(policy.settings, policy.model, policy.params, ())
  model, blocks = policy.model, sharding.own_blocks(mesh) * c.accumulate
  step, tx, schedule = make_step(c, model)
  see, *_ = make_step(c, model, seeing=True)
  params = learner.with_heads(model, policy.params, jax.random.key(c.seed), labels=demos.LABELS)
  trained, base = trainable.parts(model, params["policy"], c.model.freeze)
  state = learner.init_state({**params, "policy": trained}, tx, seed=c.seed)
  flops = partial(cost.update, model.config, **learner.passes(model, trained))
  seeing = partial(flops, text=0)  # The decoder is not run.
  lessons = Lessons(c.curriculum, partial(rows, c, policy, blind), tx, workdir)
  held_out = evaluate.HeldOut(c, policy, workdir)

  runs.keep_config(workdir, c)
  checkpoints = Checkpoints(workdir / FOLDER, keep=c.keep, background=True)
  if restored := checkpoints.restore(state):
    state, extra = restored
    lessons.restore(extra)
  metrics = Metrics(workdir, resume=int(state.step), c=c)
  watch = timing.Stopwatch(mesh, workdir, profile=c.profile)

  with program.Preemption() as preemption:
    for i in watch.steps(range(int(state.step), c.optimizer.steps)):
      with watch.part("data"):
        packed = batch.pack_sft(
          next(lessons.rows),
          model.config,
          max_tokens=c.max_row,
          multiple_of=blocks,
          packed=c.packed,
          blocks=blocks,
          labels=demos.LABELS,
        )
        work, filled = batch.work(packed), batch.filled(packed)
        packed = sharding.put_rows(packed, mesh)
      # The step is dispatched, not waited for: the next batch is made while the devices compute.
      with watch.part("update_actor"):
        taught, took = (see, seeing) if i < c.see_steps else (step, flops)
        key = jax.random.fold_in(state.rng, i)
        state, measured = taught(state, packed, {"policy": base}, key)
        watch.did(tokens=work.tokens, flops=took(work))
      if due(i, c.log_every, c.optimizer.steps):
        # The devices are waited for first, as a part of the update.
        timed = watch.read(measured) | {"filled": filled}
        learned = named({**measured, "lr": float(schedule(i))}, "train")
        metrics.log(i + 1, {**learned, **timed, **lessons.measured()})
      if due(i, c.eval.every, c.optimizer.steps):
        with watch.part("testing"):
          trained = state.params["policy"]
          params = policy.sampler.serve(join(trained, base))
          result = held_out.ask(i + 1, params, trained, metrics)
        with watch.part("save_checkpoint"):
          state = lessons.heard(i + 1, result.accuracy, state)
      stop = preemption.asked()
      if due(i, c.save_every, c.optimizer.steps) or stop:
        with watch.part("save_checkpoint"):
          checkpoints.save(i + 1, state, lessons.position())
      if stop:
        break
  checkpoints.close()
  held_out.close()
  lessons.close()
  metrics.close()
  if int(state.step) < c.optimizer.steps:
    program.say(f"stopped by SIGTERM at step {int(state.step)}: the same command goes on")
    return state
  sampler.save_policy(workdir, policy.settings, model, join(state.params["policy"], base))
  return state


def make_step(
  c: Any, model: Model, *, seeing: bool = False
) -> tuple[Callable[..., tuple[learner.TrainState, dict]], GradientTransformation, Schedule]:
  """((state, batch, {"policy": base}, key) -> (state, metrics), its optimizer, the rate by step).

  Of `learner.sft_loss`, or `seeing` of `learner.see_loss`. Runs of a process with equal settings
  share the program.
  """
  names = () if seeing else ("entropy_weight", "aim_weight", "sight_weight")
  weights = tuple((name, c[name]) for name in names)
  return _step(model, FrozenConfigDict(c.optimizer), weights, c.model.dtype, c.accumulate)


@functools.cache
def _step(
  model: Model,
  optimizer: FrozenConfigDict,
  weights: tuple[tuple[str, float], ...],
  dtype: str,
  parts: int,
) -> tuple[Callable[..., tuple[learner.TrainState, dict]], GradientTransformation, Schedule]:
  loss = learner.sft_loss(model, **dict(weights)) if weights else learner.see_loss(model)
  return learner.make_training(model, loss, optimizer, dtype=dtype, parts=parts)


if __name__ == "__main__":
  program.launch(main)
