"""What a run writes down: metrics, TensorBoard, every trajectory with its images; 95% intervals."""

import difflib
import fnmatch
import io
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import tensorboardX
from jaxtyping import Float32, Int
from PIL import Image

from pixelis_jax.cluster import everyone, first
from pixelis_jax.types import Box, Picture, Pixels, Step, Trajectory, Video, Vote, content_key

METRICS_FILE = "metrics.jsonl"
TRAJECTORIES_FILE = "trajectories.jsonl"
IMAGES_DIR = "images"
WANDB_ID = "wandb.id"  # Of the run at W&B that a workdir's numbers belong to.
WANDB_STEP = "training/global_step"  # verl's name; jsonl and TensorBoard have a step of their own.
WANDB_MODES = ("off", "offline", "online")
FRAMES = 8  # Of a video, evenly chosen, in the log.

# What a program may log, each name explained once. With a slash are verl's, and ours of the same
# families; without one TTRL's and ours. A prefix is a part of the name: what a number was measured
# on stands where a name has `*`, which is known when it is logged (a kind of question, a number of
# samples). In an episode the prompt comes first, and all behind it is the response. Sources:
# https://github.com/volcengine/verl/blob/main/verl/trainer/ppo/metric_utils.py, beside it
# core_algos.py and rollout_corr_helper.py, verl/workers/utils/losses.py and
# verl/trainer/sft_trainer.py;
# https://github.com/PRIME-RL/TTRL/blob/main/verl/verl/utils/reward_score/ttrl/ttt_metrics.py.
METRICS: dict[str, str] = {
  # An update by rewards.
  "actor/loss": "What was differentiated: pg_loss, kl_coef times kl_loss, less rewarded entropy.",
  "actor/pg_loss": "The policy's loss alone, by `loss_mode`, made one number by `loss_agg_mode`.",
  "actor/kl_loss": "KL from the reference as the loss has it, by `kl_loss_type`, rows weighed.",
  "actor/look_loss": "Squared error of features at plain looks, over the clearer ones' squares.",
  "actor/kl_coef": "Weight of kl_loss in the loss; online the adaptive controller moves it.",
  "actor/kl": "k3 estimate of that KL, nats a token of rows that push; online after the update.",
  "actor/entropy": "Mean entropy of the trained tokens' distributions, nats, whatever the mode.",
  "actor/pg_clipfrac": "Share of trained tokens that a bound cut, dual clip's too, or kl_cov held.",
  "actor/ppo_kl": "k1 estimate of the KL from the policy before to the new one, nats a token.",
  "actor/ratio_mean": "Mean probability ratio of the trained tokens, which those two make.",
  "actor/grad_norm": "Global L2 norm of the gradient before clipping.",
  "actor/lr": "Learning rate of this update.",
  "actor/skipped": "1 where loss or gradient was not finite and the parameters stayed, else 0.",
  # SFT.
  "train/loss": "The loss that was differentiated: nll and what the config adds to it.",
  "train/nll": "Negative log-likelihood of the supervised tokens, nats a token.",
  "train/entropy": "Mean entropy of the supervised tokens' distributions, nats.",
  "train/likely_tokens": "Share of supervised tokens given more than half the probability.",
  "train/aim_error": "Mean square miss of the auxiliary aim, in tenths of an image's side.",
  "train/aim_phase_error": "Mean square miss of its place in a patch: cosine and sine, times 3.",
  "train/sight_loss": "Auxiliary loss of what features show, nats, and where, squared tenths.",
  "train/sight_error": "Mean square miss of where in its cell a feature sees an object, in tenths.",
  "train/grad_norm": "Global L2 norm of the gradient before clipping.",
  "train/lr": "Learning rate of this update.",
  "train/skipped": "1 where loss or gradient was not finite and the parameters stayed, else 0.",
  # Rollouts. Those of numbers by episode, mean, max and min, are in `SPREADS`.
  "response_length/clip_ratio": "Share of episodes that a limit of tokens ended, 0 to 1.",
  "rapr": "Share of episodes with at least one tool call: Pixel-Reasoner's RaPR, 0 to 1.",
  "task": "Mean task reward: 1 where the answer is right, by the rule of `reward.verifier`.",
  "format": "Mean format reward: what well-formed turns earn, before its weight.",
  "coherence": "Mean coherence reward: how far neighbouring steps follow from each other, -1 to 1.",
  "tool_cost": "Mean tool calls, as a cost before its weight.",
  "misuse": "Mean faults of tool calls: too many, before what they need, outside the image.",
  "tool_bonus": "Share of rollouts that are right and looked.",
  "call_target": "Mean miss of the number of calls an episode should have: 0, down to -1.",
  "overlong": "Mean penalty of the last tokens that an episode may have: 0, down to -1.",
  "curiosity": "Mean curiosity reward: what Pixel-Reasoner pays for looking at pixels.",
  "dynamics": "Mean forward-dynamics reward: errors about what calls showed, in `dynamics_scale`.",
  "dynamics_error": "Mean squared error of the state a call led to, unit vectors, before learning.",
  "dynamics_change": "The same error of a model by which calls change nothing.",
  "dynamics_scale": "Root mean square of such errors since the run began; 0 while it is unknown.",
  "zero_variance": "Share of groups dropped because all their rewards were equal, 0 to 1.",
  "replayed": "Samples of earlier steps in an update, or experiences, as a share of the new ones.",
  "staleness": "Updates since the policy that played the rollouts; 0 where it is the newest.",
  "stage": "Stage of the curriculum, from 0; of that of rewards: the goal, coherence, all.",
  "rollout_corr/k3_kl": "k3 estimate of the KL from sampler to an update's first policy, nats.",
  "rollout_corr/rollout_is_mean": "Mean truncated importance weight of the sampled tokens.",
  "rollout_corr/rollout_rs_seq_masked_fraction": "Share of sequences rejected, 0 to 1.",
  "training/rollout_probs_diff_mean": "Mean difference of a sampled token's probability in k3_kl.",
  # Held-out questions, greedy: one answer each. `*` is their kind, or "all".
  "val-core/*/acc/mean@1": "Share of questions answered right in meaning, 0 to 1.",
  "val-aux/*/tool_call_counts/mean@1": "Tool calls a question, failed ones included.",
  "val-aux/*/hit_rate/mean@1": "Of episodes that looked, the share that saw the evidence's centre.",
  # Where a step's time goes. A part within a part counts for itself alone.
  "timing_s/step": "Wall-clock seconds a step since the last such line; the others are of these.",
  "timing_s/data": "Seconds a step in which a batch was waited for, packed and sent to devices.",
  "timing_s/gen": "Seconds a step in which the policy read and sampled.",
  "timing_s/tools": "Seconds a step in which tools ran.",
  "timing_s/reward": "Seconds a step in which rollouts were scored and compared.",
  "timing_s/update_actor": "Seconds a step in which the update was computed, of SFT too.",
  "timing_s/testing": "Seconds a step in which held-out questions were answered.",
  "timing_s/save_checkpoint": "Seconds a step in which the run waited for its checkpoint.",
  "timing_s/wait": "Seconds a step in which an update waited for rollouts of other devices.",
  "timing_s/answer": "Seconds from the arrival of these requests to their answers.",
  "timing_s/learn": "Seconds the learning path took for this update, off the answering path.",
  "perf/time_per_step": "The same number as `timing_s/step`, in seconds.",
  "perf/total_num_tokens": "Tokens of an update's batch in this process, padding left out.",
  "perf/throughput": "Tokens of the updates' batches, padding left out, a second and a device.",
  "perf/throughput_gen": "Sampled tokens, a second of `timing_s/gen` and a device.",
  "perf/mfu/actor": "The updates' model FLOPs as a share of the devices' bfloat16 peak, 0 to 1.",
  "perf/max_memory_allocated_gb": "GiB a device of this process has had in use; not told of CPUs.",
  "filled": "Share of the token slots of the update's batch that hold a token, 0 to 1.",
  # The online loop.
  "majority_ratio": "Weight share of the voted answer, mean over requests; TTRL's weigh alike.",
  "majority_voting_reward": "Share of learned-from samples whose answer is the vote's, 0 to 1.",
  "vote_confidence": "How far the votes are believed, calibrated where the config says so, mean.",
  "vote_margin": "Winner's share less the runner-up's, mean over the requests, 0 to 1.",
  "gate_rate": "Share of requests whose vote passed the gate and may be learned from, 0 to 1.",
  "judged_again": "Earlier requests whose votes pass the gate by what is known now.",
  "memory_size": "Experiences the memory holds now.",
  "updates_applied": "Updates applied and published since the stream began.",
  "updates_refused": "Updates computed and thrown away by the KL guard or the canary since then.",
  "canary": "Score of the proposed parameters on the canary requests, 0 to 1.",
  "policy_version": "Version of the parameters that answer.",
  # By the stream's labels, which nothing reads before the stream is over.
  "label_accuracy": "Share of requests whose voted answer is right, 0 to 1.",
  "reward_accuracy": "Share of samples that the vote calls what the label calls them, 0 to 1.",
  "ground_truth_ratio": "Share of samples whose answer is right, 0 to 1.",
  "pass@*": "Share of requests of which at least one of so many samples is right, 0 to 1.",
}
# Numbers of which each episode has one, and advantages, of which each sampled token has one.
SPREADS: dict[str, str] = {
  "critic/score": "weighted sum of an episode's rewards",
  "critic/rewards": "score less a KL in the reward; here equal, as the KL is in the loss",
  "critic/advantages": "advantage, by sampled token",
  "prompt_length": "tokens of the prompt, images included",
  "response_length": "tokens behind the prompt, sampled and shown by tools",
  "num_turns": "turns of the chat: the prompt, the assistant's, and tools' between these",
  "tool_call_counts": "tool calls, failed ones included",
}
METRICS |= {
  f"{name}/{part}": f"{word} {text}."
  for name, text in SPREADS.items()
  for part, word in (("mean", "Mean"), ("max", "Largest"), ("min", "Smallest"))
}


def entry(name: str) -> str | None:
  """The key of METRICS that explains a name; None where there is none."""
  if name in METRICS:
    return name
  return next((key for key in METRICS if "*" in key and fnmatch.fnmatchcase(name, key)), None)


def named(measured: Mapping[str, Any], by: str) -> dict[str, Any]:
  """What an update measured under the names that it is logged by: "actor" of RL, "train" of SFT."""
  return {f"{by}/{name}": value for name, value in measured.items()}


def spreads(values: Mapping[str, Sequence[int] | np.ndarray]) -> dict[str, float]:
  """Mean, max and min of each name of `SPREADS`, over what all processes have; each has some."""
  own = {
    name: (float(np.sum(x, dtype=np.float64)), len(x), float(np.max(x)), float(np.min(x)))
    for name, x in values.items()
  }
  parts, found = everyone(own), {}
  for name in values:
    sums, counts, largest, smallest = zip(*(part[name] for part in parts), strict=True)
    found[f"{name}/mean"] = sum(sums) / sum(counts)
    found[f"{name}/max"], found[f"{name}/min"] = max(largest), min(smallest)
  return found


def episodes(played: Sequence[Trajectory]) -> dict[str, list[int]]:
  """What `SPREADS` says of each episode itself.

  A chat has two turns for each of the assistant's, as verl counts them: what it is asked or shown,
  and what it says.
  """
  shown = [[len(step.completion.context.tokens) for step in t.steps] for t in played]
  sampled = [sum(len(step.completion.tokens) for step in t.steps) for t in played]
  return {
    "prompt_length": [first for first, *_ in shown],
    "response_length": [n + sum(later) for n, (_, *later) in zip(sampled, shown, strict=True)],
    "num_turns": [2 * len(t.steps) for t in played],
    "tool_call_counts": [t.calls for t in played],
  }


def outcomes(
  rewards: Float32[np.ndarray, "Q G"],
  advantages: Float32[np.ndarray, "Q G"],
  lengths: Int[np.ndarray, "Q G"],
) -> dict[str, np.ndarray]:
  """What `SPREADS` says of what episodes earned; `lengths` are sampled tokens, as verl weighs."""
  by_token = np.repeat(advantages.ravel(), lengths.ravel())
  totals = rewards.ravel()
  return {"critic/score": totals, "critic/rewards": totals, "critic/advantages": by_token}


def due(i: int, every: int, steps: int) -> bool:
  """True after each `every`-th of `steps` steps and after the last; `i` counts from 0."""
  return (i + 1) % every == 0 or i + 1 == steps


def check_wandb(c: Any) -> None:
  """Refuses a config's `wandb` (fields mode, project) that cannot be, before anything is computed.

  Raises ValueError for a mode that there is not, ImportError where one needs the package and it is
  not installed.
  """
  if c.mode not in WANDB_MODES:
    raise ValueError(f"wandb.mode {c.mode!r} must be one of {WANDB_MODES}")
  if c.mode == "off" or not first():
    return
  if c.mode == "offline":
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # wandb would send reports of its own crashes.
  try:
    from wandb import init  # noqa: F401 - a folder of that name, as runs leave it, imports too.
  except ImportError as e:
    raise ImportError(
      f"wandb.mode {c.mode!r} needs the extra wandb: pip install 'pixelis-jax[wandb]'"
    ) from e


class Metrics:
  """Appends to metrics.jsonl and TensorBoard in `workdir`. Safe to call from several threads."""

  def __init__(self, workdir: str | os.PathLike, *, resume: int | None = None, c: Any = None):
    """Creates `workdir`. What was logged after step `resume` is dropped; None keeps all.

    With a program's config W&B is told too, as its `wandb` says (`check_wandb`); what is logged
    again after a resume W&B has twice. Of several processes the first writes, the others only check
    names.
    """
    self.workdir = Path(workdir)
    self._lock = threading.Lock()
    self._lines = self._board = self._wandb = None
    if first():
      self._lines = _Lines(self.workdir / METRICS_FILE, resume)
      self._board = tensorboardX.SummaryWriter(
        str(self.workdir / "tensorboard"), purge_step=None if resume is None else resume + 1
      )
      if c is not None and c.wandb.mode != "off":
        self._wandb = _wandb_run(self.workdir, c)

  def __enter__(self) -> "Metrics":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def log(self, step: int, values: Mapping[str, object]) -> None:
    """Writes scalars (Python, numpy or JAX) of one step; NaN and infinities as null in the file.

    Raises ValueError for a name that METRICS does not explain, naming the nearest.
    """
    for name in values:
      _check_name(name)
    if self._lines is None or self._board is None:
      return
    numbers = {name: float(v) for name, v in values.items()}  # type: ignore[arg-type]
    line = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
    with self._lock:
      self._lines.append({"step": int(step), "time": round(time.time(), 3)} | line)
      for name, number in numbers.items():
        self._board.add_scalar(name, number, int(step))
      if self._wandb is not None:
        self._wandb.log({WANDB_STEP: int(step)} | numbers)

  def close(self) -> None:
    """Flushes TensorBoard and W&B; metrics.jsonl is complete after every `log`."""
    if self._lines is not None and self._board is not None:
      self._lines.close()
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


class TrajectoryLog:
  """Appends to trajectories.jsonl, and saves each different image once as images/<content>.png.

  Of a video 8 frames are saved, evenly chosen, and those of which tools showed something.
  """

  def __init__(self, workdir: str | os.PathLike, *, resume: int | None = None):
    """Creates `workdir`. What was written after step `resume` is dropped; None keeps all.

    Of several processes the first writes.
    """
    self.workdir = Path(workdir)
    self._lock = threading.Lock()
    self._lines = None
    if first():
      self._lines = _Lines(self.workdir / TRAJECTORIES_FILE, resume)
      (self.workdir / IMAGES_DIR).mkdir(exist_ok=True)

  def __enter__(self) -> "TrajectoryLog":
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def write(
    self,
    step: int,
    tag: str,
    trajectory: Trajectory,
    vote: Vote | None = None,
    extra: Mapping[str, object] | None = None,
    *,
    truth: str | None = None,
  ) -> None:
    """One line. The truth is there only where the caller passes it: `task.answer` isn't read."""
    if self._lines is None:
      return
    task = trajectory.task
    line = {
      "id": task.id,
      "step": int(step),
      "tag": tag,
      "kind": task.kind,
      "question": task.question,
      "answer": trajectory.answer,
      "truth": truth,
      "status": trajectory.status.value,
      "images": [self._save(p) for p in task.images],
      "videos": [self._video(v, _looked_at(trajectory, i)) for i, v in enumerate(task.videos)],
      "turns": [self._turn(s) for s in trajectory.steps],
      "vote": None if vote is None else _vote_line(vote),
      "extra": dict(extra or {}),
    }
    with self._lock:
      self._lines.append(line)

  def close(self) -> None:
    if self._lines is not None:
      self._lines.close()

  def _turn(self, step: Step) -> dict:
    call, result = step.call, step.result
    return {
      "text": step.completion.text,
      "call": None if call is None else {"name": call.name, "arguments": dict(call.arguments)},
      "error": None if result is None else result.error,
      "result_text": None if result is None else result.text,
      "images": [self._picture(p) for p in result.images] if result else [],
    }

  def _video(self, video: Video, looked_at: set[int]) -> dict:
    count = len(video.frames)
    even = np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int).tolist()
    return {
      "count": count,
      "frames": [
        {"path": self._save(video.frames[i]), "frame": i, "time": float(video.times[i])}
        for i in sorted({*even, *looked_at})
      ],
    }

  def _picture(self, picture: Picture) -> dict:
    place = {"box": _box_line(picture.box), "source": picture.source}
    if picture.frame is not None:
      place["frame"] = picture.frame
    return {"path": self._save(picture.pixels), **place}

  def _save(self, pixels: Pixels) -> str:
    """Path relative to the workdir. Written aside and renamed: a file there is whole."""
    key = content_key(repr(pixels.shape), np.ascontiguousarray(pixels).tobytes())
    name = f"{IMAGES_DIR}/{key}.png"
    path = self.workdir / name
    if not path.exists():
      png = io.BytesIO()
      Image.fromarray(pixels).save(png, "png", compress_level=1)
      aside = path.with_suffix(f".{threading.get_ident()}.tmp")
      aside.write_bytes(png.getvalue())
      aside.replace(path)
    return name


def read_lines(path: str | os.PathLike) -> list[dict]:
  """The complete lines of a .jsonl file; a torn last one is left out.

  Raises FileNotFoundError, and ValueError naming the line that is not JSON.
  """
  path = Path(path)
  lines = []
  for number, raw in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
    try:
      lines.append(json.loads(raw))
    except ValueError as e:
      raise ValueError(f"{path} line {number} is not JSON: {e}") from e
  return lines


def interval(successes: int, n: int) -> tuple[float, float]:
  """Wilson score interval at 95% for a share: Wilson, JASA 22 (1927). (0, 1) when n is 0."""
  if not 0 <= successes <= n:
    raise ValueError(f"successes {successes} must be between 0 and n = {n}")
  if n == 0:
    return 0.0, 1.0
  z2 = 1.959963984540054**2
  share = successes / n
  center = (share + z2 / (2 * n)) / (1 + z2 / n)
  half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
  # At 0 and n successes an end is exactly 0 or 1; floating point would miss it by an ulp.
  return (0.0 if successes == 0 else center - half), (1.0 if successes == n else center + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
  """95% interval of the mean from Student's t with n - 1 degrees of freedom; needs two values."""
  n = len(values)
  if n < 2:
    raise ValueError(f"an interval of the mean needs at least 2 values, got {n}")
  sample = np.asarray(values, np.float64)
  half = float(scipy.special.stdtrit(n - 1, 0.975) * sample.std(ddof=1) / math.sqrt(n))
  mean = float(sample.mean())
  return mean - half, mean + half


class _Lines:
  """A .jsonl file opened for appending, once a torn last line and lines to redo are cut off."""

  def __init__(self, path: Path, resume: int | None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
      kept = path.read_bytes()
      kept = kept[: kept.rfind(b"\n") + 1]
      if resume is not None:
        lines = kept.splitlines(keepends=True)
        kept = b"".join(x for x in lines if json.loads(x)["step"] <= resume)
      aside = path.with_suffix(".tmp")
      aside.write_bytes(kept)
      aside.replace(path)
    self._file = open(path, "a", buffering=1, encoding="utf-8")

  def append(self, line: Mapping[str, object]) -> None:
    self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

  def close(self) -> None:
    self._file.close()


def _wandb_run(workdir: Path, c: Any) -> Any:
  """A run of its own for each folder of metrics; the same one when the folder is written on."""
  check_wandb(c.wandb)
  import wandb

  kept = workdir / WANDB_ID
  if not kept.exists():
    kept.write_text(secrets.token_hex(8))
  run = wandb.init(
    project=c.wandb.project,
    name="/".join(workdir.resolve().parts[-2:]),
    dir=str(workdir),
    id=kept.read_text(),
    resume="allow" if c.wandb.mode == "online" else None,  # Offline it is `wandb sync` that joins.
    mode=c.wandb.mode,
    config=json.loads(c.to_json()),
    reinit="create_new",
  )
  # W&B's own step only rises: what is logged after a resume would be dropped.
  run.define_metric("*", step_metric=WANDB_STEP)
  return run


def _check_name(name: str) -> None:
  if entry(name) is None:
    nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
    raise ValueError(f"metric {name!r} is not explained in METRICS, did you mean {nearest!r}?")


def _looked_at(trajectory: Trajectory, video: int) -> set[int]:
  """The frames of a video of which tools showed something."""
  frames = (p.frame for p in trajectory.pictures if p.source == video)
  return {frame for frame in frames if frame is not None}


def _box_line(box: Box) -> list[float]:
  return [float(box.x0), float(box.y0), float(box.x1), float(box.y1)]


def _vote_line(vote: Vote) -> dict:
  return {
    "answer": vote.answer,
    "confidence": float(vote.confidence),
    "share": float(vote.share),
    "margin": float(vote.margin),
    "uncalibrated": None if vote.uncalibrated is None else float(vote.uncalibrated),
    "counts": {answer: float(share) for answer, share in vote.counts.items()},
  }
