"""Reinforcement fine-tuning: GRPO over whole episodes with tools.

    python -m pixelis_jax.rft --config=configs/tiny_rft.py --workdir=runs/rft

One step: `group` samples of each of `questions` prompts are played, scored, compared within their
group, and the policy takes one clipped-surrogate step on the very tokens it sampled. Resumes from
the workdir bit for bit. With `--config.model.lora.rank=16` only adapters are trained, and the
reference of the KL is the model without them, which costs no second copy of the weights.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
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
from pixelis_jax.algo import advantages, rewards
from pixelis_jax.algo.correction import RolloutCorrection
from pixelis_jax.algo.policy_losses import Objective
from pixelis_jax.checkpoint import FOLDER, Checkpoints
from pixelis_jax.data.streams import training_tasks
from pixelis_jax.metrics import Metrics, TrajectoryLog, due
from pixelis_jax.model import cost, lora
from pixelis_jax.model.policy import Model
from pixelis_jax.rollouts import Rollouts
from pixelis_jax.types import Reward, Trajectory


def main(c: Any, workdir: Path) -> learner.TrainState:
  mesh, playing = meshes(c)
  adapters = jax.random.key(c.seed)
  policy = sampler.load_policy(c.model, mesh=mesh, rollouts=playing, adapters=adapters)
  serve = policy.sampler.carrier(mesh) if c.staleness else policy.sampler.serve
  model, blocks = policy.model, sharding.own_blocks(mesh) * c.accumulate
  G = c.grpo.group
  step, tx, schedule = make_step(c, model)
  trained, base = learner.parts(model, policy.params)
  compared = make_compared(c, policy)
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
  watch = timing.Stopwatch(mesh, workdir, profile=c.profile, playing=playing)
  steps = range(int(state.step), c.optimizer.steps)
  rollouts = Rollouts(
    partial(play, c, policy, tasks, watch),
    steps,
    staleness=c.staleness,
    save_every=c.save_every,
    mesh=playing,
  )

  with program.Preemption() as preemption, rollouts:
    for i in watch.steps(steps):
      dropout = jax.random.fold_in(state.rng, c.optimizer.steps + i)  # No step samples by this key.
      with watch.part("wait" if c.staleness else "rollout"):
        rollouts.publish(i, serve(lora.join(state.params, base)))
        played = rollouts.take()

      with watch.part("reward"):
        groups = [played[at : at + G] for at in range(0, len(played), G)]
        scored = [
          r
          for g in groups
          for r in rewards.score(g, curiosity=c.reward.curiosity, target=g[0].task.answer)
        ]
        totals_QG = rewards.totals(scored, weights=dict(c.reward.weights), group=G)
        lengths_QG = batch.sampled_tokens(groups)
        advantages_QG = advantages.advantages(
          totals_QG, lengths_QG, adv_estimator=c.grpo.adv_estimator
        )
        kept = np.repeat((advantages_QG != 0).any(axis=1), G)  # The others teach nothing.
        differ = advantages.keep_groups(totals_QG)
        measured = cluster.averaged({"zero_variance": 1.0 - float(differ.mean())})
        measured["staleness"] = float(i - rollouts.updates(i))
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
          packed, corrected = compared(packed, lora.join(state.params, base))
          state, update = step(state, packed, base, dropout, jnp.float32(c.grpo.kl_coef))
          measured |= {k: float(v) for k, v in {**corrected, **update}.items()}
          watch.did(tokens=work.tokens, flops=flops(work))
      else:
        state = state.replace(step=state.step + 1)  # Nothing to compare: no group had two outcomes.

      if due(i, c.log_every, c.optimizer.steps):
        described = cluster.averaged(summary(scored, played))
        metrics.log(i + 1, {**measured, **described, "lr": float(schedule(i)), **watch.read()})
        trajectories.write(i + 1, "rft", played[0])
      if due(i, c.eval.every, c.optimizer.steps):
        with watch.part("evaluate"):
          params = serve(lora.join(state.params, base))
          rollouts.call(held_out.ask, i + 1, params, state.params, metrics)
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


def meshes(c: Any, devices: Sequence[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
  """(where is learned, where rollouts are played): the same devices, or with `c.staleness` others.

  Raises ValueError where the sizes do not fit the devices, by default all.
  """
  n = c.staleness
  if n < 0:
    raise ValueError(
      f"staleness {n} must be 0, or a number of updates that rollouts may lag behind"
    )
  if n and jax.process_count() > 1:
    raise ValueError(f"staleness {n} needs one process, not {jax.process_count()}: set it to 0")
  if n and not c.rollout_mesh.data:
    raise ValueError(
      f"staleness {n}: rollouts need devices of their own, set rollout_mesh.data (-1: those that "
      "mesh leaves)"
    )
  devices = jax.devices() if devices is None else list(devices)
  mesh = sharding.make_mesh(**c.mesh, devices=devices)
  if n:
    return mesh, sharding.make_mesh(**c.rollout_mesh, devices=devices[mesh.size :])
  return mesh, sharding.relaid(mesh, **c.rollout_mesh)


def play(
  c: Any,
  policy: sampler.Policy,
  tasks: grain.MapDataset,
  watch: timing.Stopwatch,
  step: int,
  updates: int,
  params: learner.Params,
) -> list[Trajectory]:
  """This process's questions of a step, `group` episodes of each, by weights after some updates.

  Nothing is left of it on the devices: the update needs the room.
  """
  Q, G = c.grpo.questions, c.grpo.group
  own = cluster.share(Q, "grpo.questions")
  asked = [task for task in [tasks[step * Q + q] for q in own] for _ in range(G)]
  generate = policy.sampler.bind(
    params,
    key=jax.random.fold_in(jax.random.key(c.seed), step),
    version=updates,
    temperature=c.grpo.temperature,
    first=own.start * G,
  )
  limits = agent.Limits(**c.limits)
  with watch.beside() if c.staleness else contextlib.nullcontext(watch) as clock:
    with clock.part("rollout"):
      run = clock.timed("tools", policy.tools.run)
      played = agent.play(asked, generate=generate, run=run, limits=limits)
    clock.did(sampled=sum(len(s.completion.tokens) for t in played for s in t.steps))
  return played


def make_step(
  c: Any, model: Model
) -> tuple[Callable[..., tuple[learner.TrainState, dict]], GradientTransformation, Schedule]:
  """((state, batch, base, key, kl_coef) -> (state, metrics), its optimizer, the rate by step)."""
  tx, schedule = learner.make_optimizer(c.optimizer, freeze=c.model.freeze)
  loss = learner.grpo_loss(model, Objective(**c.grpo.loss))
  loss = learner.computed_in(learner.frozen(loss, c.model.freeze), c.model.dtype)
  step = learner.make_step(learner.adapted(model, loss), tx, parts=c.accumulate, mesh=model.mesh)
  return step, tx, schedule


def make_compared(
  c: Any, policy: sampler.Policy
) -> Callable[[batch.GrpoBatch, learner.Params], tuple[batch.GrpoBatch, learner.Metrics]]:
  """(batch, the weights an update starts from) -> (it with all that its loss compares, metrics).

  The reference of the KL is the policy as it was loaded, without adapters.
  """
  correction = RolloutCorrection(**c.grpo.rollout_correction)
  make_logps = partial(learner.make_logps, dtype=c.model.dtype, parts=c.accumulate)
  reference, correct = lora.plain(policy.params), learner.make_correction(correction)
  reference_logps = make_logps(dataclasses.replace(policy.model, lora=None))
  logps = make_logps(policy.model) if correction.on else None

  def compared(
    packed: batch.GrpoBatch, params: learner.Params
  ) -> tuple[batch.GrpoBatch, learner.Metrics]:
    if c.grpo.kl_coef:
      packed = packed.replace(ref_logps=reference_logps(reference, packed.inputs))
    if not correction.on:
      return packed, {}
    return correct(packed, logps(params, packed.inputs))

  return compared


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
