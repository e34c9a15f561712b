"""Reinforcement fine-tuning: GRPO over whole episodes with tools.

    python -m pixelis_jax.rft --config=configs/tiny_rft.py --workdir=runs/rft

One step: `group` samples of each of `questions` prompts are played, scored, compared within their
group, and the policy takes one clipped-surrogate step on the very tokens it sampled. Resumes from
the workdir bit for bit. With `--config.model.lora.rank=16` only adapters are trained, and the
reference of the KL is the model without them, which costs no second copy of the weights.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import GradientTransformation, Schedule

from pixelis_jax import (
  agent,
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
from pixelis_jax.algo import grpo, rewards
from pixelis_jax.checkpoint import FOLDER, Checkpoints
from pixelis_jax.data.tasks import training_tasks
from pixelis_jax.metrics import Metrics, TrajectoryLog, due
from pixelis_jax.model import cost, lora
from pixelis_jax.model.policy import Model
from pixelis_jax.types import Reward, Trajectory


def main(c: Any, workdir: Path) -> learner.TrainState:
  mesh = sharding.make_mesh(**c.mesh)
  rollouts = sharding.relaid(mesh, **c.rollout_mesh)
  adapters = jax.random.key(c.seed)
  policy = sampler.load_policy(c.model, mesh=mesh, rollouts=rollouts, adapters=adapters)
  model, blocks = policy.model, sharding.own_blocks(mesh) * c.accumulate
  limits, Q, G = agent.Limits(**c.limits), c.grpo.questions, c.grpo.group
  own = cluster.share(Q, "grpo.questions")  # Of each step's questions: this process plays these.
  step, tx, schedule = make_step(c, model)
  trained, base = learner.parts(model, policy.params)
  reference = lora.plain(policy.params)
  bare = dataclasses.replace(model, lora=None)
  reference_logps = learner.make_logps(bare, c.model.dtype, parts=c.accumulate)
  state = learner.init_state(jax.tree.map(jnp.copy, trained), tx, seed=c.seed)
  flops = partial(cost.update, model.config, **learner.passes(model, trained, c.model.freeze))
  tasks = training_tasks(c.data, seed=c.seed, sees=policy.sees)
  held_out = evaluate.HeldOut(c, policy, workdir)

  runs.keep_config(workdir, c)
  checkpoints = Checkpoints(workdir / FOLDER, keep=c.keep, background=True)
  if restored := checkpoints.restore(state):
    state, _ = restored
  metrics = Metrics(workdir, resume=int(state.step))
  trajectories = TrajectoryLog(workdir, resume=int(state.step))
  watch = timing.Stopwatch(mesh, workdir, profile=c.profile)
  run = watch.timed("tools", policy.tools.run)

  with program.Preemption() as preemption:
    for i in watch.steps(range(int(state.step), c.optimizer.steps)):
      key = jax.random.fold_in(state.rng, i)
      dropout = jax.random.fold_in(state.rng, c.optimizer.steps + i)  # No step samples by this key.
      with watch.part("rollout"):
        params = policy.sampler.serve(lora.join(state.params, base))
        first = own.start * G
        sample = {"version": i, "temperature": c.grpo.temperature, "first": first}
        generate = policy.sampler.bind(params, key=key, **sample)
        questions = [tasks[i * Q + q] for q in own]
        asked = [task for task in questions for _ in range(G)]
        played = agent.play(asked, generate=generate, run=run, limits=limits)
        del generate, params  # And with them the caches: the update needs the room.

      with watch.part("reward"):
        groups = [played[at : at + G] for at in range(0, len(played), G)]
        scored = [
          r
          for g in groups
          for r in rewards.score(g, curiosity=c.reward.curiosity, target=g[0].task.answer)
        ]
        totals_QG = rewards.totals(scored, weights=dict(c.reward.weights), group=G)
        advantages_QG = grpo.group_advantages(totals_QG, normalize=c.grpo.normalize)
        kept = np.repeat(grpo.keep_groups(totals_QG), G)
        measured = cluster.averaged({"zero_variance": 1.0 - float(kept.mean())})
      if any(cluster.agree(int(kept.any()))):
        with watch.part("data"):
          chosen = [batch.trajectory_row(t) for t, keep in zip(played, kept, strict=True) if keep]
          packed = batch.pack_grpo(
            chosen,
            advantages_QG.reshape(-1)[kept],
            model.config,
            max_tokens=c.max_row,
            multiple_of=math.lcm(c.rows_multiple, blocks),
            packed=c.packed,
            blocks=blocks,
          )
          work, measured["filled"] = batch.work(packed), batch.filled(packed)
          packed = sharding.put_rows(packed, mesh)
        with watch.part("update"):
          if c.grpo.kl_coef:
            packed = packed.replace(ref_logps=reference_logps(reference, packed.inputs))
          state, update = step(state, packed, base, dropout, jnp.float32(c.grpo.kl_coef))
          measured |= {k: float(v) for k, v in update.items()}
          watch.did(tokens=work.tokens, flops=flops(work))
      else:
        state = state.replace(step=state.step + 1)  # Nothing to compare: no group had two outcomes.

      watch.did(sampled=sum(len(s.completion.tokens) for t in played for s in t.steps))
      if due(i, c.log_every, c.optimizer.steps):
        described = cluster.averaged(summary(scored, played))
        metrics.log(i + 1, {**measured, **described, "lr": float(schedule(i)), **watch.read()})
        trajectories.write(i + 1, "rft", played[0])
      if due(i, c.eval.every, c.optimizer.steps):
        with watch.part("evaluate"):
          params = policy.sampler.serve(lora.join(state.params, base))
          held_out.ask(i + 1, params, state.params, metrics)
      stop = preemption.asked()
      if due(i, c.save_every, c.optimizer.steps) or stop:
        with watch.part("checkpoint"):
          checkpoints.save(i + 1, state, {})
      if stop:
        break
  checkpoints.close()
  held_out.close()
  metrics.close()
  trajectories.close()
  if int(state.step) < c.optimizer.steps:
    program.say(f"stopped by SIGTERM at step {int(state.step)}: the same command goes on")
    return state
  sampler.save_policy(workdir, policy.settings, model, lora.join(state.params, base))
  return state


def make_step(
  c: Any, model: Model
) -> tuple[Callable[..., tuple[learner.TrainState, dict]], GradientTransformation, Schedule]:
  """((state, batch, base, key, kl_coef) -> (state, metrics), its optimizer, the rate by step)."""
  tx, schedule = learner.make_optimizer(c.optimizer, freeze=c.model.freeze)
  loss = learner.grpo_loss(
    model,
    clip_low=c.grpo.clip_low,
    clip_high=c.grpo.clip_high,
    entropy_weight=c.grpo.entropy_weight,
  )
  loss = learner.computed_in(learner.frozen(loss, c.model.freeze), c.model.dtype)
  step = learner.make_step(learner.adapted(model, loss), tx, parts=c.accumulate, mesh=model.mesh)
  return step, tx, schedule


def summary(scored: list[Reward], played: list[Trajectory]) -> dict[str, float]:
  """Means over the step's trajectories: reward parts in their own units, and the use of tools."""
  return {
    "task": float(np.mean([r.task for r in scored])),
    "format": float(np.mean([r.format for r in scored])),
    "curiosity": float(np.mean([r.curiosity for r in scored])),
    "tool_rate": float(np.mean([t.calls > 0 for t in played])),
    "calls": float(np.mean([t.calls for t in played])),
  }


if __name__ == "__main__":
  program.launch(main)
