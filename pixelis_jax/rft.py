"""Reinforcement fine-tuning: GRPO over whole episodes with tools.

    python -m pixelis_jax.rft --config=configs/tiny_rft.py --workdir=runs/rft

One step: `group` samples of each of `questions` prompts are played, scored, compared within their
group, and the policy takes one clipped-surrogate step on the very tokens it sampled. Resumes from
the workdir bit for bit. With `--config.model.lora.rank=16` only adapters are trained, and the
reference of the KL is the model without them, which costs no second copy of the weights.
With `--config.reward.weights.dynamics=0.05` a forward model learns beside the policy what calls
show (surprise.py), and what it did not expect is paid for.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32
from ml_collections import FrozenConfigDict
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
from pixelis_jax.algo.curriculum import STAGES, RewardCurriculum, Settings
from pixelis_jax.algo.policy_losses import Objective
from pixelis_jax.algo.replay import Replay
from pixelis_jax.checkpoint import FOLDER, Checkpoints
from pixelis_jax.data.streams import training_tasks
from pixelis_jax.metrics import (
  Metrics,
  TrajectoryLog,
  check_wandb,
  due,
  episodes,
  named,
  outcomes,
  spreads,
)
from pixelis_jax.model import cost, lora, trainable
from pixelis_jax.model.policy import Model
from pixelis_jax.rollouts import Rollouts
from pixelis_jax.surprise import Surprise
from pixelis_jax.types import Reward, Status, Trajectory

OVER_TURN = (Status.OUT_OF_STEPS, Status.OUT_OF_TOKENS)
Score = Callable[[Sequence[Trajectory], Sequence[float] | None], list[Reward]]


def main(c: Any, workdir: Path) -> learner.TrainState:
  check_wandb(c.wandb)
  mesh, playing = meshes(c)
  adapters = jax.random.key(c.seed)
  policy = sampler.load_policy(c.model, mesh=mesh, rollouts=playing, adapters=adapters)
  serve = policy.sampler.carrier(mesh, policy.params) if c.staleness else policy.sampler.serve
  model, blocks = policy.model, sharding.own_blocks(mesh) * c.accumulate
  replay = Replay(c.grpo.replay.capacity, alpha=c.grpo.replay.alpha)
  step, tx, schedule = make_step(c, model)
  trained, base = trainable.parts(model, policy.params, c.model.freeze)
  compared, score = make_compared(c, policy), make_score(c, policy)
  surprise = Surprise(c, policy, mesh)
  state = learner.init_state(jax.tree.map(jnp.copy, trained), tx, seed=c.seed)
  flops = partial(cost.update, model.config, **learner.passes(model, trained))
  tasks = training_tasks(c.data, seed=c.seed, sees=policy.sees)
  held_out = evaluate.HeldOut(c, policy, workdir)

  runs.keep_config(workdir, c)
  checkpoints = Checkpoints(workdir / FOLDER, keep=c.keep, background=True)
  curriculum = RewardCurriculum.begin(Settings(**c.reward.curriculum))
  if restored := checkpoints.restore(surprise.beside(state)):
    held, extra = restored
    state = surprise.resumed(held, extra)
    curriculum = RewardCurriculum.from_dict(curriculum.settings, extra["curriculum"])
  metrics = Metrics(workdir, resume=int(state.step), c=c)
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
      with watch.part("wait" if c.staleness else "gen"):
        rollouts.publish(i, serve(lora.join(state.params, base)))
        played = rollouts.take()

      with watch.part("reward"):
        weights = dict(c.reward.weights)
        surprises, learned = surprise(played)
        scored, rows, pushes, measured = compare(
          c, score, curriculum.weights(weights), played, surprises
        )
        described = cluster.averaged(summary(scored, weights, played))
        coherence = described.get("coherence", 0.0)
        curriculum = curriculum.update(task=described["task"], coherence=coherence)
        again, pushed_again = replayed(c, replay, rows, pushes, i)
        measured |= learned | cluster.averaged({"replayed": len(again) / len(played)})
        measured["staleness"] = float(i - rollouts.updates(i))
        measured["stage"] = float(STAGES.index(curriculum.stage))
      if any(cluster.agree(len(rows) + len(again))):
        with watch.part("data"):
          packed = batch.pack_grpo(
            [*rows, *again],
            np.concatenate([pushes, pushed_again]),
            model.config,
            max_tokens=c.max_row,
            multiple_of=math.lcm(c.rows_multiple, blocks),
            packed=c.packed,
            blocks=blocks,
          )
          work, measured["filled"] = batch.work(packed), batch.filled(packed)
          packed = sharding.put_rows(packed, mesh)
        with watch.part("update_actor"):
          packed, corrected = compared(packed, lora.join(state.params, base))
          state, update = step(state, packed, base, dropout, jnp.float32(c.grpo.kl_coef))
          update |= {"lr": schedule(i), "kl_coef": c.grpo.kl_coef}
          measured |= {k: float(v) for k, v in {**corrected, **named(update, "actor")}.items()}
          watch.did(tokens=work.tokens, flops=flops(work))
      else:
        state = state.replace(step=state.step + 1)  # Nothing tells one sample from another.

      if due(i, c.log_every, c.optimizer.steps):
        metrics.log(i + 1, {**measured, **described, **watch.read()})
        trajectories.write(i + 1, "rft", played[0])
      if due(i, c.eval.every, c.optimizer.steps):
        with watch.part("testing"):
          params = serve(lora.join(state.params, base))
          rollouts.call(held_out.ask, i + 1, params, state.params, metrics)
      stop = preemption.asked()
      if due(i, c.save_every, c.optimizer.steps) or stop:
        with watch.part("save_checkpoint"):
          extra = {"curriculum": curriculum.to_dict(), **surprise.extra()}
          checkpoints.save(i + 1, surprise.beside(state), extra)
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

  With `grpo.filter_groups.enable` (DAPO's dynamic sampling, https://arxiv.org/abs/2503.14476)
  groups whose task rewards are all equal are left out, and others asked in their place, until there
  are as many as usual or after `max_num_gen_batches` rounds; where none differed, the last round's.

  Nothing is left of it on the devices: the update needs the room.
  """
  Q, G, filtering = c.grpo.questions, c.grpo.group, c.grpo.filter_groups
  own = cluster.share(Q, "grpo.questions")
  rounds = filtering.max_num_gen_batches if filtering.enable else 1
  if rounds < 1:
    raise ValueError(f"grpo.filter_groups.max_num_gen_batches {rounds} must be at least 1")
  key = jax.random.fold_in(jax.random.key(c.seed), step)
  limits, kept = agent.Limits(**c.limits), []
  with watch.beside() if c.staleness else contextlib.nullcontext(watch) as clock:
    for n in range(rounds):
      questions = [tasks[(step * rounds + n) * Q + q] for q in own]
      generate = policy.sampler.bind(
        params,
        key=key,
        version=updates,
        temperature=c.grpo.temperature,
        first=(n * Q + own.start) * G,
      )
      with clock.part("gen"):
        run = clock.timed("tools", policy.tools.run)
        asked = [task for task in questions for _ in range(G)]
        played = agent.play(asked, generate=generate, run=run, limits=limits)
      clock.did(sampled=sum(len(s.completion.tokens) for t in played for s in t.steps))
      groups = [played[at : at + G] for at in range(0, len(played), G)]
      kept += [g for g in groups if not filtering.enable or differ(c, g)]
      if not any(cluster.agree(len(own) - len(kept[: len(own)]))):
        break
  return [trajectory for group in kept[: len(own)] or groups for trajectory in group]


def make_score(c: Any, policy: sampler.Policy) -> Score:
  """(samples of one question, their `Surprise` if it is rewarded) -> their rewards.

  For coherence a turn's embedding is the mean of its sampled tokens', by the policy as loaded.
  """
  embedding = policy.params["text"]["embedding"]
  table = cluster.fetched(embedding) if c.reward.weights.coherence else None

  def score(group: Sequence[Trajectory], surprises: Sequence[float] | None) -> list[Reward]:
    mean = lambda step: table[step.completion.tokens].mean(axis=0, dtype=np.float32)
    turns = None if table is None else [np.stack([mean(s) for s in t.steps]) for t in group]
    how = {"frame": policy.tools.frame, "embeddings": turns, "surprises": surprises}
    return rewards.score(group, c.reward, target=group[0].task.answer, **how)

  return score


def differ(c: Any, group: Sequence[Trajectory]) -> bool:
  """Whether some of a question's samples are more right than others."""
  right = lambda t: rewards.agreement(t, t.task.answer, verifier=c.reward.verifier)
  return len({right(trajectory) for trajectory in group}) > 1


def compare(
  c: Any,
  score: Score,
  weights: Mapping[str, float],
  played: Sequence[Trajectory],
  surprises: Sequence[float] | None = None,
) -> tuple[list[Reward], list[batch.Row], Float32[np.ndarray, " N"], dict[str, float]]:
  """(all rewards, the rows that teach something, their advantages, what was measured).

  With `grpo.over_turn_masking` an episode that the limits cut off counts for its group's mean, and
  teaches nothing itself: it may have been on its way (Mini-o3, https://arxiv.org/abs/2509.07969).
  """
  G = c.grpo.group
  groups = [played[at : at + G] for at in range(0, len(played), G)]
  of = lambda n: None if surprises is None else surprises[n * G : (n + 1) * G]
  scored = [reward for n, group in enumerate(groups) for reward in score(group, of(n))]
  totals_QG = rewards.totals(scored, weights=weights, group=G)
  lengths_QG = batch.sampled_tokens(groups)
  advantages_QG = advantages.advantages(totals_QG, lengths_QG, adv_estimator=c.grpo.adv_estimator)
  taught = np.repeat((advantages_QG != 0).any(axis=1), G)
  if c.grpo.over_turn_masking:
    taught &= np.array([t.status not in OVER_TURN for t in played])
  rows = [batch.trajectory_row(t) for t, kept in zip(played, taught, strict=True) if kept]
  alike = 1.0 - float(advantages.keep_groups(totals_QG).mean())
  by_episode = {**outcomes(totals_QG, advantages_QG, lengths_QG), **episodes(played)}
  measured = cluster.averaged({"zero_variance": alike}) | spreads(by_episode)
  return scored, rows, advantages_QG.reshape(-1)[taught], measured


def replayed(
  c: Any,
  replay: Replay[batch.Row],
  rows: Sequence[batch.Row],
  pushes: Float32[np.ndarray, " N"],
  step: int,
) -> tuple[list[batch.Row], Float32[np.ndarray, " M"]]:
  """Rows of earlier steps in the place of new ones that teach nothing, and their advantages.

  Nothing is remembered beyond a checkpoint, so that a resumed run is the same run.
  """
  if step % c.save_every == 0:
    replay.clear()
  missing = len(cluster.share(c.grpo.questions, "grpo.questions")) * c.grpo.group - len(rows)
  drawn = replay.draw(missing, np.random.default_rng((c.seed, step)))
  replay.add(rows, pushes)
  return [row for row, _ in drawn], np.array([push for _, push in drawn], np.float32)


def make_step(
  c: Any, model: Model
) -> tuple[Callable[..., tuple[learner.TrainState, dict]], GradientTransformation, Schedule]:
  """((state, batch, base, key, kl_coef) -> (state, metrics), its optimizer, the rate by step).

  Runs of a process with equal settings share the program.
  """
  optimizer, objective = FrozenConfigDict(c.optimizer), Objective(**c.grpo.loss)
  return _step(model, optimizer, objective, c.model.dtype, c.accumulate)


@functools.cache
def _step(
  model: Model,
  optimizer: FrozenConfigDict,
  objective: Objective,
  dtype: str,
  parts: int,
) -> tuple[Callable[..., tuple[learner.TrainState, dict]], GradientTransformation, Schedule]:
  loss = learner.grpo_loss(model, objective)
  return learner.make_training(model, loss, optimizer, dtype=dtype, parts=parts)


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


def summary(
  scored: Sequence[Reward], weights: Mapping[str, float], played: Sequence[Trajectory]
) -> dict[str, float]:
  """Means over the step's trajectories: reward parts in their own units, who looked, what was cut.

  Parts other than the task's that weigh nothing are left out.
  """
  shown = [part for part, weight in weights.items() if weight or part == "task"]
  parts = {part: float(np.mean([getattr(r, part) for r in scored])) for part in shown}
  cut = [t.status is Status.OUT_OF_TOKENS for t in played]
  return {
    **parts,
    "rapr": float(np.mean([t.calls > 0 for t in played])),
    "response_length/clip_ratio": float(np.mean(cut)),
  }


if __name__ == "__main__":
  program.launch(main)
