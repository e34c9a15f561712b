"""The command line: ask, score, tools, doctor, plan, view, masks, export, convert, ranks, requests.

Imports wait until a command needs them, so that `pixelis --help` answers at once. A user's mistake
is one line on stderr and exit code 2.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from pixelis_jax.types import Picture, Pixels, Task, Trajectory, Video


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code: 0; 1 where `requests` refuses something; 2 for a mistake in what was given."""
  known = parser()
  args, rest = known.parse_known_args(argv)
  if not all(map(args.takes, rest)):
    known.error(f"unrecognized arguments: {' '.join(rest)}")
  args.rest = rest
  # Tokenizers are all we take from transformers; without torch it says so at every start.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  try:
    return args.run(args)
  except (ValueError, OSError) as error:  # What the user gave; anything else is ours to see.
    print(f"pixelis {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
  top = argparse.ArgumentParser(
    prog="pixelis", description="A vision-language agent that reasons in pixel space."
  )
  commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(
    name: str, run, about: str, *, takes: Callable[[str], bool] = lambda word: False
  ) -> argparse.ArgumentParser:
    """`takes` says which words that argparse does not know are the command's, in `args.rest`."""
    added = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    added.set_defaults(run=run, takes=takes)
    return added

  p = command(
    "ask", ask, "Ask a question, of what is shown or nothing, and see the agent look and answer."
  )
  p.add_argument("question")
  p.add_argument("--model", required=True, type=Path, metavar="DIR", help="Hugging Face directory")
  p.add_argument("--adapter", type=Path, metavar="DIR", help="PEFT directory of a LoRA adapter")
  p.add_argument("--int8", action="store_true", help="the layers' kernels as int8: half the memory")
  p.add_argument("--image", default=[], type=Path, metavar="PATH", action="append")
  about = "a file, or a folder of frames; may be given again, as --image may"
  p.add_argument("--video", default=[], type=Path, metavar="PATH", action="append", help=about)
  p.add_argument("--fps", default=2.0, type=float, help="read of a video, at most (default: 2)")
  p.add_argument("--max-frames", default=768, type=int, help="of a video (default: 768)")
  p.add_argument("--tools", default="zoom_in", help="comma-separated, or none (default: zoom_in)")
  p.add_argument("--preset", default="qwen", help="wire format of the tools (default: qwen)")
  _add_options(p)
  p.add_argument("--guidelines", default="", metavar="TEXT", help="put behind the question")
  p.add_argument("--temperature", default=0.0, type=float, help="0 is greedy (default: 0)")
  p.add_argument("--seed", default=0, type=int, help="of the sampling (default: 0)")
  p.add_argument("--turns", default=8, type=int, help="at most (default: 8)")
  p.add_argument("--max-tokens", default=512, type=int, help="a turn, at most (default: 512)")
  p.add_argument("--context", default=16384, type=int, help="tokens at most (default: 16384)")
  p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  p.add_argument("--out", type=Path, metavar="DIR", help="add the trajectory and its images here")
  p.add_argument("--json", action="store_true", help="print one JSON object")

  p = command("score", score, "Log-probability of each token of a conversation, float32.")
  p.add_argument("--model", required=True, type=Path, metavar="DIR", help="Hugging Face directory")
  p.add_argument("--messages", required=True, type=Path, metavar="FILE.json")
  p.add_argument("--out", required=True, type=Path, metavar="OUT.json")

  about = "List the tools, or run calls: later ones may refer to what earlier ones returned."
  p = command("tools", tools, about, takes=lambda word: not word.startswith("-"))
  about = "NAME ARGUMENT=JSON ... of a call, + before another; a bare word is a string"
  p.add_argument("call", nargs="*", metavar="CALL", help=about)
  p.add_argument("--image", default=[], type=Path, metavar="PATH", action="append")
  p.add_argument("--video", default=[], type=Path, metavar="PATH", action="append")
  about = "whose frame the coordinates are in (default: the pixels of the image)"
  p.add_argument("--model", type=Path, metavar="DIR", help=about)
  p.add_argument("--preset", default="qwen", help="wire format of the tools (default: qwen)")
  _add_options(p)
  p.add_argument("--out", type=Path, metavar="DIR", help="write images and masks here")

  command("doctor", doctor, "What is installed, which devices, and what to do about problems.")

  about = "Compile a run for devices that are not here, and say if it fits."
  p = command("plan", plan, about, takes=lambda word: word.startswith("--config."))
  p.add_argument("--config", required=True, metavar="FILE[:ARG]", help="of a program")
  p.add_argument("--topology", required=True, metavar="NAME", help="v5e-64, v5p-64, h100-8, ...")
  p.add_argument("--images", default=2, type=int, help="an episode (default: 2)")
  p.add_argument("--patches", default=4096, type=int, help="an image (default: 4096)")
  p.add_argument("--asked", default=256, type=int, help="tokens of text it reads (default: 256)")
  p.add_argument("--written", default=512, type=int, help="tokens it writes (default: 512)")
  p.add_argument("--out", type=Path, metavar="FILE.json")

  p = command("view", view, "Write report.html of a run and print its path.")
  p.add_argument("workdir", type=Path)

  p = command("masks", masks, "Draw a record of a dataset, token by token: what SFT teaches of it.")
  p.add_argument("dataset", type=Path, metavar="DIR", help="that data/build.py built")
  p.add_argument("--record", default=0, type=int, metavar="N", help="from 0 (default: 0)")
  p.add_argument("--out", required=True, type=Path, metavar="FILE.png")
  about = "Hugging Face directory (default: the one the dataset was built with)"
  p.add_argument("--model", type=Path, metavar="DIR", help=about)
  about = "that its prompt offers, comma-separated (default: those that the dataset calls)"
  p.add_argument("--tools", metavar="NAMES", help=about)

  p = command("export", export, "Write a run's model as a Hugging Face directory.")
  p.add_argument("workdir", type=Path, help="of sft, rft or online, running or ended")
  p.add_argument("out", type=Path)
  about = "of a checkpoint (default: the model at the run's end, else the latest checkpoint)"
  which = p.add_mutually_exclusive_group()
  which.add_argument("--step", type=int, metavar="N", help=about)
  about = "the checkpoint that answered most held-out questions, of sft and rft"
  which.add_argument("--best", action="store_true", help=about)
  p.add_argument("--adapter", action="store_true", help="copy its LoRA adapter instead, for PEFT")
  p.add_argument("--force", action="store_true", help="replace the weights that are there")

  p = command(
    "convert", convert, "Write a Hugging Face directory as an Orbax one, or such a one back."
  )
  p.add_argument("source", type=Path, metavar="SRC", help="either form; it stays as it is")
  p.add_argument("out", type=Path, metavar="OUT")
  p.add_argument("--force", action="store_true", help="replace the model that is there")

  p = command("ranks", ranks, "Plan LoRA ranks, layer by layer, from what a fine-tuning changed.")
  p.add_argument("--base", required=True, type=Path, metavar="DIR", help="Hugging Face directory")
  p.add_argument("--tuned", required=True, type=Path, metavar="DIR", help="the same, fine-tuned")
  p.add_argument("--out", required=True, type=Path, metavar="FILE.json")
  about = "of the change's squared singular values to keep (default: 0.90)"
  p.add_argument("--energy", default=0.9, type=float, help=about)
  p.add_argument("--min", default=4, type=int, help="of a rank (default: 4)")
  p.add_argument("--max", default=128, type=int, help="of a rank (default: 128)")
  about = "weight of the mean over a module's layers, 0 to 1 (default: 0.8)"
  p.add_argument("--smooth", default=0.8, type=float, help=about)

  p = command("requests", requests, "Check a request stream (JSON lines or a JSON list) and count.")
  p.add_argument("path", type=Path)
  p.add_argument("--model", type=Path, metavar="DIR", help="tokenizer, for requests of input_ids")
  return top


def _add_options(p: argparse.ArgumentParser) -> None:
  """One for each field of `tools.Options`; without it the field's default holds."""
  p.add_argument("--tracker", metavar="NAME", help="of track_object: csrt, flow or template")
  about = "of segment_object_at: grabcut, or a folder with a SAM-family model's ONNX files"
  p.add_argument("--segmenter", metavar="NAME", help=about)
  p.add_argument("--reader", metavar="NAME", help="of read_text: rapidocr or tesseract")
  about = "that read_text reads where a call names none (default: all known letters)"
  p.add_argument("--language", metavar="NAME", help=about)


def _options(args: argparse.Namespace) -> dict[str, str]:
  given = {name: getattr(args, name) for name in ("tracker", "segmenter", "reader", "language")}
  return {name: value for name, value in given.items() if value is not None}


def plan(args: argparse.Namespace) -> int:
  """Exit code 1 where it does not fit."""
  from kernels import chips

  chips.without_devices()
  from pixelis_jax import plan as planning
  from pixelis_jax import program, workloads

  c = program.read([f"--config={args.config}", *args.rest])
  sizes = {name: getattr(args, name) for name in ("images", "patches", "asked", "written")}
  made = planning.make(c, args.topology, workloads.Episode(**sizes))
  print(planning.table(c, made))
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(planning.record(made), indent=2))
  return 1 if made.problems() else 0


def ask(args: argparse.Namespace) -> int:
  """One episode; what the caller gave is checked before the weights are read."""
  import jax

  from pixelis_jax import agent, sampler
  from pixelis_jax.chat.family import images_of
  from pixelis_jax.chat.images import read_image
  from pixelis_jax.data.video import Budget, read_video
  from pixelis_jax.metrics import TrajectoryLog
  from pixelis_jax.types import content_key

  _check_ask(args)
  _directory(args.model)
  processor = images_of(args.model)
  if processor is None and (args.image or args.video):
    raise ValueError(f"{args.model} holds a text-only model: it cannot be shown --image or --video")
  images = [read_image(path) for path in args.image]
  sizes = [
    _shown(path, image, processor.shown_size)
    for path, image in zip(args.image, images, strict=True)
  ]
  budget = Budget(fps=args.fps, max_frames=args.max_frames)
  videos = tuple(read_video(path, budget) for path in args.video)
  clips = _clips(args.model, args.video, videos)
  frames = (content_key(frame.tobytes()) for video in videos for frame in video.frames)
  key = content_key(args.question, *(image.tobytes() for image in images), *frames)
  task = Task(
    id=f"ask-{key[:12]}",
    images=tuple(images),
    question=args.question,
    answer=None,
    videos=videos,
  )
  policy = sampler.load_policy(
    SimpleNamespace(
      path=args.model,
      loader="",
      random_seed=-1,
      adapter="" if args.adapter is None else str(args.adapter),
      int8=args.int8,
      dtype=args.dtype,
      tools=tuple(name for name in args.tools.split(",") if name not in ("", "none")),
      preset=args.preset,
      guidelines=args.guidelines,
      max_tokens=args.max_tokens,
      max_rows=1,
      rows_multiple=1,
      tool_options=_options(args),
      workers={},
    )
  )
  generate = policy.sampler.bind(
    policy.params, key=jax.random.key(args.seed), version=0, temperature=args.temperature
  )
  limits = agent.Limits(turns=args.turns, tokens=args.context)
  (played,) = agent.play([task], generate=generate, run=policy.tools.run, limits=limits)
  if args.out is not None:
    with TrajectoryLog(args.out) as log:
      log.write(0, "ask", played)
  told = episode(played, args.image, sizes, clips)
  print(json.dumps(told, ensure_ascii=False) if args.json else transcript(told))
  return 0


def _check_ask(args: argparse.Namespace) -> None:
  if not args.question.strip():
    raise ValueError("the question is empty")
  if args.temperature < 0:
    raise ValueError(f"--temperature {args.temperature} must be 0 or more")
  for name in ("turns", "max_tokens", "context"):
    if getattr(args, name) < 1:
      option = name.replace("_", "-")
      raise ValueError(f"--{option} {getattr(args, name)} must be 1 or more")


def _directory(path: Path) -> None:
  if not path.is_dir():
    raise FileNotFoundError(f"there is no directory {path}")


def _shown(path: Path, image: Pixels, shown_size: Callable[[int, int], tuple[int, int]]):
  try:
    return shown_size(*image.shape[:2])
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _clips(model: Path, paths: Sequence[Path], videos: Sequence[Video]) -> list[dict]:
  """What was read of each video and what the model is shown of it; sizes are of a frame."""
  from pixelis_jax.chat.videos import VideoProcessor

  processor = VideoProcessor.from_directory(model) if videos else None
  clips = []
  for path, video in zip(paths, videos, strict=True):
    chosen = processor.chosen(video)
    size = _shown(path, video.frames[0], partial(processor.shown_size, len(chosen)))
    clip = {"path": str(path), "frames": len(video.times), "seconds": float(video.times[-1])}
    seen = {"shown_frames": len(chosen), "shown": list(size)}
    clips.append({**clip, "size": list(video.frames.shape[1:3]), **seen})
  return clips


def episode(
  played: Trajectory,
  paths: Sequence[Path],
  sizes: Sequence[tuple[int, int]],
  clips: Sequence[Mapping[str, object]] = (),
) -> dict[str, object]:
  """A trajectory for json: boxes [x0, y0, x1, y1] in pixels of the file; images, videos from 1."""
  turns = []
  for step in played.steps:
    call, result = step.call, step.result
    pictures = () if result is None else result.images
    boxes = [
      {**_place(p, played.task), "box": [p.box.x0, p.box.y0, p.box.x1, p.box.y1]} for p in pictures
    ]
    turns.append(
      {
        "text": step.completion.text,
        "call": None if call is None else {"name": call.name, "arguments": dict(call.arguments)},
        "error": None if result is None else result.error,
        "result": None if result is None else result.text,
        "pictures": boxes,
      }
    )
  images = [
    {"path": str(path), "size": list(image.shape[:2]), "shown": list(size)}
    for path, image, size in zip(paths, played.task.images, sizes, strict=True)
  ]
  return {
    "question": played.task.question,
    "images": images,
    "videos": list(clips),
    "turns": turns,
    "status": played.status.value,
    "answer": played.answer,
  }


def _place(picture: Picture, task: Task) -> dict[str, object]:
  number = picture.source + 1
  if picture.frame is None:
    return {"image": number}
  return {"video": number, "seconds": float(task.videos[picture.source].times[picture.frame])}


def transcript(told: dict) -> str:
  """An `episode` to read."""
  lines = []
  for number, image in enumerate(told["images"], start=1):
    (height, width), (rows, columns) = image["size"], image["shown"]
    lines.append(f"image {number}: {image['path']}, {width} x {height} shown at {columns} x {rows}")
  for number, video in enumerate(told["videos"], start=1):
    (height, width), (rows, columns) = video["size"], video["shown"]
    lines.append(
      f"video {number}: {video['path']}, {video['frames']} frames read up to"
      f" {video['seconds']:.1f} seconds, {width} x {height},"
      f" {video['shown_frames']} shown at {columns} x {rows}"
    )
  for number, turn in enumerate(told["turns"], start=1):
    lines += ["", f"turn {number}", *(f"  {line}" for line in turn["text"].splitlines())]
    if turn["call"] is not None:
      arguments = json.dumps(turn["call"]["arguments"], ensure_ascii=False)
      lines.append(f"  -> {turn['call']['name']} {arguments}")
    for picture in turn["pictures"]:
      box = ", ".join(f"{edge:g}" for edge in picture["box"])
      where = f"image {picture['image']}" if "image" in picture else f"video {picture['video']}"
      at = f" at {picture['seconds']:.1f} seconds" if "seconds" in picture else ""
      lines.append(f"  <- pixels [{box}] of {where}{at}")
    shown = turn["result"] if turn["error"] is None else f"error: {turn['error']}"
    if shown:
      lines.append(f"  <- {shown.strip()}")
  answer = "none" if told["answer"] is None else told["answer"]
  return "\n".join([*lines, "", f"answer: {answer} ({told['status'].replace('_', ' ')})"])


def score(args: argparse.Namespace) -> int:
  """Writes {"tokens": ids, "logps": log-probability of tokens[i + 1] given tokens[: i + 1]}."""
  import jax
  import numpy as np

  from pixelis_jax import batch, learner, packing
  from pixelis_jax.chat.images import read_image
  from pixelis_jax.chat.template import Chat
  from pixelis_jax.weights import load

  _directory(args.model)
  folder = args.messages.parent
  messages = _read_json(args.messages)
  chat = Chat.from_directory(args.model, tools=())
  try:
    segment = chat.messages(messages, lambda name: read_image(folder / name))
  except ValueError as error:
    raise ValueError(f"{args.messages}: {error}") from error
  count = len(segment.tokens)
  model, params = load(args.model)
  if segment.tokens.max() >= model.config.text.vocab_size:
    raise ValueError(
      f"{args.model}: token {segment.tokens.max()} of the tokenizer is beyond the model's "
      f"{model.config.text.vocab_size}"
    )
  row = batch.Row(
    tokens=segment.tokens,
    images=segment.images,
    loss_mask=np.ones(count, bool),
    logps=np.zeros(count, np.float32),
  )
  packed = batch.pack_inputs(
    [row], model.config, max_tokens=-(-count // packing.LENGTHS) * packing.LENGTHS
  )
  with jax.default_matmul_precision("highest"):  # Accelerators would round float32 factors.
    logps = learner.make_logps(model)(params, packed)
  logps = np.asarray(logps)[0, 1:count]
  if not np.isfinite(logps).all():
    raise ValueError(f"{args.model}: its log-probabilities are not finite; are its weights?")
  _write(args.out, {"tokens": segment.tokens.tolist(), "logps": logps.tolist()})
  print(f"{args.out}: {count} tokens, mean log-probability {logps.mean():.4f}")
  return 0


def _read_json(path: Path) -> object:
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {path}")
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def _write(path: Path, content: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(f"{path.name}.partial")
  aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
  aside.replace(path)


def tools(args: argparse.Namespace) -> int:
  """Prints what each call returns; the first mistake in one ends it."""
  from pixelis_jax.serve import tools as by_hand
  from pixelis_jax.tools import Options

  words = [*args.call, *args.rest]  # argparse leaves those behind an option between them.
  if not words:
    print(by_hand.table(args.preset))
    return 0
  if args.model is not None:
    _directory(args.model)
  calls, given = by_hand.parse(words), {"model": args.model, "preset": args.preset}
  shown = {"images": args.image, "videos": args.video, "options": Options(**_options(args))}
  for line in by_hand.run(calls, out=args.out, **shown, **given):
    print(line, flush=True)
  return 0


def doctor(args: argparse.Namespace) -> int:
  """Always 0: a problem here need not be one for what the caller wants to do."""
  from pixelis_jax.serve.doctor import examine

  facts, problems = examine()
  width = max(map(len, facts))
  for name, fact in facts.items():
    print(f"{name:<{width}}  {fact}")
  print(f"\n{len(problems)} problem{'' if len(problems) == 1 else 's'}")
  for problem in problems:
    print(f"- {problem}")
  return 0


def view(args: argparse.Namespace) -> int:
  from pixelis_jax.serve.report import write_report

  _directory(args.workdir)
  print(write_report(args.workdir))
  return 0


def masks(args: argparse.Namespace) -> int:
  """Prints the line that is above the picture."""
  from PIL import Image

  from pixelis_jax.serve import tokens

  if args.model is not None:
    _directory(args.model)
  names = None if args.tools is None else tuple(filter(None, args.tools.split(",")))
  row, chat, about = tokens.masks(args.dataset, args.record, model=args.model, tools=names)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(tokens.draw(tokens.layout(row, chat), about)).save(args.out)
  print(f"{args.out}: {about}")
  return 0


def export(args: argparse.Namespace) -> int:
  """Copies a run's model or adapter: what it left when it ended, or one of its checkpoints."""
  from pixelis_jax import runs

  _directory(args.workdir)
  if (args.workdir / "model").is_dir() and args.step is None and not args.best:
    return _export(args, args.workdir)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as aside:
    step = runs.save_checkpoint(args.workdir, Path(aside), step=args.step, best=args.best)
    print(f"{args.workdir}: the checkpoint of step {step}")
    return _export(args, Path(aside))


def _export(args: argparse.Namespace, run: Path) -> int:
  """Copies run/model or run/adapter file by file, weights last; each is replaced whole."""
  from pixelis_jax.model.load import INDEX

  out, name = args.out, "adapter" if args.adapter else "model"
  source = run / name
  if not source.is_dir():
    raise FileNotFoundError(
      f"{args.workdir} trained no adapter: there is no directory {name} in it"
    )
  if out.resolve() == source.resolve():
    raise ValueError(f"{out} is the run's own {name}: name another directory")
  _check_export(args, run)  # What is damaged replaces nothing.
  out.mkdir(parents=True, exist_ok=True)
  old = sorted({*out.glob("*.safetensors"), *out.glob(INDEX)})
  if old and not args.force:
    raise ValueError(f"{old[0]} is there already: --force replaces the weights in {out}")
  files = sorted(source.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name))
  for file in files:
    aside = out / f"{file.name}.partial"
    shutil.copyfile(file, aside)
    aside.replace(out / file.name)
  for file in {*old} - {out / file.name for file in files}:  # An old index would be read first.
    file.unlink()
  size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
  print(f"{out}: {', '.join(file.name for file in files)} ({size} bytes)")
  return 0


def _check_export(args: argparse.Namespace, run: Path) -> None:
  """That the run's model or adapter is whole, and an adapter does not go beside a model's weights.

  transformers would lay it over those, merged or not.
  """
  from pixelis_jax.model.load import load, load_config
  from pixelis_jax.model.peft import load_adapter
  from pixelis_jax.model.policy import Model

  model = run / "model"
  if not args.adapter:
    load(model)
    return
  load_adapter(run / "adapter", Model(load_config(model)), {})
  if (args.out / "config.json").exists():
    raise ValueError(f"{args.out} holds a model: name another directory for the adapter")


def convert(args: argparse.Namespace) -> int:
  """Every weight keeps its dtype and its bits; what else SRC holds goes along."""
  import jax

  from pixelis_jax import weights

  _directory(args.source)
  leaves = jax.tree.leaves(weights.convert(args.source, args.out, force=args.force))
  form = "Orbax" if weights.is_orbax(args.out) else "Hugging Face"
  dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
  print(f"{args.out}: {form}, {sum(leaf.size for leaf in leaves)} parameters, {dtypes}")
  return 0


def ranks(args: argparse.Namespace) -> int:
  """Writes `model.ranks.plan` of the two directories, and prints its table."""
  from pixelis_jax.model.ranks import Settings, plan, table

  settings = Settings(energy=args.energy, min=args.min, max=args.max, smooth=args.smooth)
  _directory(args.base)
  _directory(args.tuned)
  if args.out.is_dir():  # Said before the hours that a large model takes.
    raise ValueError(f"{args.out} is a directory: --out names a file")
  planned = plan(args.base, args.tuned, settings)
  _write(args.out, planned)
  print(f"{table(planned)}\n{args.out}")
  return 0


def requests(args: argparse.Namespace) -> int:
  """Reads every request, images included, as the online loop would."""
  from pixelis_jax.chat.template import Chat
  from pixelis_jax.data.requests import read_requests

  counts: Counter = Counter()
  chat = None if args.model is None else Chat.from_directory(args.model, tools=())
  known = {} if chat is None else {"sees": chat.family.sees, "decode": chat.decode}
  for _ in read_requests(args.path, report=print, counts=counts, **known):
    pass
  refused = {name: counts[name] for name in ("malformed", "duplicate")}
  print(
    f"{args.path}: {counts['read']} good, {refused['malformed']} malformed, "
    f"{refused['duplicate']} with a request_id that was given before"
  )
  return 1 if any(refused.values()) or not counts["read"] else 0


if __name__ == "__main__":
  sys.exit(main())
