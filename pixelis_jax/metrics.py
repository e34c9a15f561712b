"""What a run writes down: metrics, TensorBoard, every trajectory with its images; 95% intervals."""

import difflib
import io
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.special
import tensorboardX
from PIL import Image

from pixelis_jax.cluster import first
from pixelis_jax.types import Box, Picture, Pixels, Step, Trajectory, Video, Vote, content_key

METRICS_FILE = "metrics.jsonl"
TRAJECTORIES_FILE = "trajectories.jsonl"
IMAGES_DIR = "images"
FRAMES = 8  # Of a video, evenly chosen, in the log.

# Every metric a program may log. A name may carry a prefix that says on what it was measured:
# "shifted/accuracy" is `accuracy` on the shifted domain.
METRICS: dict[str, str] = {
  "loss": "The loss that was differentiated, averaged over the trained tokens of the batch.",
  "nll": "Negative log-likelihood of the supervised tokens, nats a token.",
  "token_accuracy": "Share of supervised tokens that are the policy's first choice, 0 to 1.",
  "likely_tokens": "Share of supervised tokens the policy gives more than half the probability.",
  "aim_error": "Mean square miss of the auxiliary aim, in tenths of an image's side.",
  "aim_phase_error": "Mean square miss of its place in a patch: cosine and sine, times 3.",
  "sight_loss": "Auxiliary loss of what image features show, nats, and where, squared tenths.",
  "sight_error": "Mean square miss of where in its cell a feature sees an object, in tenths.",
  "skipped": "1 where the loss or gradient was not finite and the parameters stayed, else 0.",
  "grad_norm": "Global L2 norm of the gradient before clipping.",
  "lr": "Learning rate of this update.",
  "tokens": "Tokens the loss was taken over in this update.",
  "seconds": "Wall-clock seconds a step since the last such line; the parts below are of these.",
  "seconds_data": "Seconds a step in which a batch was waited for, packed and sent to the devices.",
  "seconds_rollout": "Seconds a step in which the policy read and sampled.",
  "seconds_tools": "Seconds a step in which tools ran.",
  "seconds_reward": "Seconds a step in which rollouts were scored and compared.",
  "seconds_update": "Seconds a step in which the update was computed.",
  "seconds_evaluate": "Seconds a step in which held-out questions were answered.",
  "seconds_checkpoint": "Seconds a step in which the run waited for its checkpoint.",
  "seconds_wait": "Seconds a step in which an update waited for rollouts of other devices.",
  "tokens_per_second": "Tokens of the updates' batches, padding left out, a second and a device.",
  "sampled_per_second": "Sampled tokens, a second of `seconds_rollout` and a device.",
  "mfu": "The updates' model FLOPs as a share of the devices' bfloat16 peak, 0 to 1.",
  "filled": "Share of the token slots of the update's batch that hold a token, 0 to 1.",
  "reward": "Mean weighted total reward of the rollouts.",
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
  "tool_rate": "Share of rollouts with at least one tool call (Pixel-Reasoner's RaPR), 0 to 1.",
  "calls": "Tool calls a rollout, failed ones included.",
  "errors": "Failed tool calls a rollout.",
  "answered": "Share of rollouts that ended with an answer, 0 to 1.",
  "turns": "Assistant turns a rollout.",
  "kl": "Estimated KL of the policy from its reference in nats a token (k3, never negative).",
  "kl_coef": "Weight of the KL term in the loss; the adaptive controller moves it.",
  "clip_fraction": "Share of trained tokens whose probability ratio was clipped, 0 to 1.",
  "ratio_mean": "Mean probability ratio of the trained tokens, new policy to the sampling one.",
  "approx_kl": "k3 estimate of the KL from the sampling policy to the new one, nats a token.",
  "entropy": "Mean entropy of the sampled tokens' distributions, nats.",
  "stage": "Stage of the curriculum, from 0; of that of rewards: the goal, coherence, all.",
  "replayed": "Samples of earlier steps in an update, as a share of the new ones.",
  "rollout_kl": "k3 estimate of the KL from sampler to update's first policy, nats a token.",
  "rollout_probs_diff": "Mean difference of a sampled token's probability between these two.",
  "rollout_is_mean": "Mean truncated importance weight of the sampled tokens.",
  "rollout_rejected": "Share of sequences left out because the sampler was too far off, 0 to 1.",
  "staleness": "Updates since the policy that played the rollouts; 0 where it is the newest.",
  "zero_variance": "Share of groups dropped because all their rewards were equal, 0 to 1.",
  "vote_confidence": "How far the votes are believed, calibrated where the config says so, mean.",
  "vote_share": "Weight share of the winning answer, mean over the requests, 0 to 1.",
  "vote_margin": "Winner's share less the runner-up's, mean over the requests, 0 to 1.",
  "gate_rate": "Share of requests whose vote passed the gate and may be learned from, 0 to 1.",
  "agreement": "Share of the learned-from samples whose answer is the vote's, 0 to 1.",
  "memory_size": "Experiences the memory holds now.",
  "updates_applied": "Updates applied and published since the stream began.",
  "updates_refused": "Updates computed and thrown away by the KL guard or the canary since then.",
  "answer_seconds": "Seconds from the arrival of these requests to their answers.",
  "learn_seconds": "Seconds the learning path took for this update, off the answering path.",
  "canary": "Score of the proposed parameters on the canary requests, 0 to 1.",
  "policy_version": "Version of the parameters that answer.",
  "hit_rate": "Of the episodes that looked, the share with a crop showing the evidence's centre.",
  "accuracy": "Share of held-out questions answered right in meaning, 0 to 1.",
  "tool_calls": "Tool calls a question during evaluation.",
  "tool_errors": "Failed tool calls a question during evaluation.",
}


def due(i: int, every: int, steps: int) -> bool:
  """True after each `every`-th of `steps` steps and after the last; `i` counts from 0."""
  return (i + 1) % every == 0 or i + 1 == steps


class Metrics:
  """Appends to metrics.jsonl and TensorBoard in `workdir`. Safe to call from several threads."""

  def __init__(self, workdir: str | os.PathLike, *, resume: int | None = None):
    """Creates `workdir`. What was logged after step `resume` is dropped; None keeps all.

    Of several processes the first writes, the others only check names.
    """
    self.workdir = Path(workdir)
    self._lock = threading.Lock()
    self._lines = self._board = None
    if first():
      self._lines = _Lines(self.workdir / METRICS_FILE, resume)
      self._board = tensorboardX.SummaryWriter(
        str(self.workdir / "tensorboard"), purge_step=None if resume is None else resume + 1
      )

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

  def close(self) -> None:
    """Flushes TensorBoard; metrics.jsonl is complete after every `log`."""
    if self._lines is not None and self._board is not None:
      self._lines.close()
      self._board.close()


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


def _check_name(name: str) -> None:
  bare = name.rsplit("/", 1)[-1]
  if bare not in METRICS:
    nearest = difflib.get_close_matches(bare, METRICS, n=1, cutoff=0.0)[0]
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
