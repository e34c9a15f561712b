"""Builds a dataset of demonstrations from a manifest, in parallel and resumably, and checks it.

    python -m pixelis_jax.data.build --manifest=docs/manifests/digit_scenes.json
    python -m pixelis_jax.data.build --validate --out=runs/data/digit_scenes --against OTHER

The first writes runs/data/NAME, as data/built.py says, and prints what data/validate.py finds.
However many processes make it, the bytes are the same. A build that was killed, at any point, goes
on with the same command: a part is there whole or not at all.
"""

import argparse
import collections
import contextlib
import fcntl
import functools
import json
import operator
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from pixelis_jax.data import built, examples, manifest, shards, validate
from pixelis_jax.data.built import LINES, MANIFEST, REPORT
from pixelis_jax.data.manifest import Manifest
from pixelis_jax.tools.workers import Settings, Workers

PARTS = "parts"  # A folder: what is known of each finished part, until all are.
_TFDS = ("features.json", "dataset_info.json")
_ASIDE = ".tmp"
T, R = TypeVar("T"), TypeVar("R")

_OPTIONS = "group_size:1"  # Each record is read alone.
# Of one part: not a limit on tools, which are called as they are, but on what has gone wrong.
_LIMITS = {"seconds": 7200.0, "gigabytes": 16.0, "cached": 0.0}
_PACKAGES = ("array_record", "jax", "numpy", "opencv-contrib-python-headless", "pillow", "scipy")


def build(m: Manifest, out: Path, *, workers: Workers | None, command: str) -> None:
  """Makes the dataset in `out`, or what of it is not there yet.

  Args:
    workers: make parts, several at a time, and are closed where one fails; None: this process does.
    command: what manifest.json says of how it was built.

  Raises:
    ValueError: `out` holds something else, or a dataset of another manifest, or is being written.
    OSError: what is to be written cannot be. What is there stays consistent.
    Mistake: see `shards.make`, or a worker ended.
  """
  with _claimed(out, m) as about:
    if "files" not in about:
      plan = shards.plan(m)
      names = _names(m, len(plan))
      _make(out, plan, names, workers)
      _finish(out, m, names, command)
    shutil.rmtree(out / PARTS, ignore_errors=True)


def _names(m: Manifest, count: int) -> list[str]:
  """Of the files of records, as TFDS names them."""
  return [f"{m.name}-{m.split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]


@contextlib.contextmanager
def _claimed(out: Path, m: Manifest) -> Iterator[dict]:
  """manifest.json of a folder that is ours alone for as long."""
  if out.exists() and not out.is_dir():
    raise ValueError(f"{out} is a file: name a folder")
  out.mkdir(parents=True, exist_ok=True)
  folder = os.open(out, os.O_RDONLY)
  try:
    try:
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"another process is building {out}") from None
    yield _ours(out, m)
  finally:
    os.close(folder)


def _ours(out: Path, m: Manifest) -> dict:
  there = [path.name for path in out.iterdir() if path.suffix != _ASIDE]
  if not there:
    _write(out / MANIFEST, _json({"manifest": m.fields}))
  elif MANIFEST not in there:
    raise ValueError(f"{out} is not empty, and holds no dataset: name another --out")
  about = built.read_about(out)
  before = about["manifest"]
  differ = [k for k in {**before, **m.fields} if before.get(k) != m.fields.get(k)]
  if differ:
    was = {k: before.get(k) for k in differ}
    raise ValueError(f"{out} was built with other values of {differ}: {was}; name another --out")
  return about


def _make(out: Path, plan: Sequence, names: Sequence[str], workers: Workers | None) -> None:
  for half in out.rglob(f"*{_ASIDE}"):
    half.unlink()
  (out / PARTS).mkdir(exist_ok=True)
  todo = [i for i, name in enumerate(names) if not _whole(out, i, name)]
  total = sum(map(len, plan))
  done = total - sum(len(plan[i]) for i in todo)
  compute = operator.call if workers is None else workers.compute
  make = lambda i: _keep(out, i, names[i], compute(shards.make, plan[i]))
  with tqdm(total=total, initial=done, unit="record", smoothing=0.1) as bar:
    for _, count in _parallel(make, todo, workers):
      bar.update(count)


def _parallel(
  function: Callable[[T], R], jobs: Sequence[T], workers: Workers | None
) -> Iterator[tuple[T, R]]:
  """Each job and its result as it comes; so many threads as there are workers wait for them."""
  pool = ThreadPoolExecutor(1 if workers is None else workers.settings.processes)
  waiting = {pool.submit(function, job): job for job in jobs}
  try:
    for future in as_completed([*waiting]):
      yield waiting.pop(future), future.result()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    if waiting and workers is not None:  # One failed, or Ctrl-C: nobody waits for the others.
      workers.close()
    pool.shutdown()


def _whole(out: Path, number: int, name: str) -> bool:
  """Whether a part is there, as it was made."""
  about, file = _part(out, number), out / name
  return about.is_file() and file.is_file() and _read(about)["sha256"] == built.sha256(file)


def _part(out: Path, number: int) -> Path:
  return out / PARTS / f"{number:05d}.json"


def _keep(out: Path, number: int, name: str, shard: shards.Shard) -> int:
  """Writes a part, and last what is known of it: then it is there. Returns its records' number."""
  for path, data in shard.files.items():
    _write(out / path, data)
  _write_records(out / name, shard.records)
  about = {
    "sha256": built.sha256(out / name),
    "bytes": (out / name).stat().st_size,
    "by": _versions(),
    "tried": shard.tried,
    "reasons": shard.reasons,
    "lines": shard.lines,
  }
  _write(_part(out, number), _json(about))
  return len(shard.records)


def _write_records(path: Path, records: Sequence[bytes]) -> None:
  aside = path.with_name(path.name + _ASIDE)
  try:
    writer = ArrayRecordWriter(str(aside), _OPTIONS)
    for record in records:
      writer.write(record)
    writer.close()
  except RuntimeError as e:  # What array_record says of a full disk, among others.
    aside.unlink(missing_ok=True)
    raise OSError(f"{path} cannot be written: {e}") from e
  aside.replace(path)


def _write(path: Path, data: bytes) -> None:
  """A file is there whole or not at all; one that is there already is left as it is."""
  if path.is_file() and path.read_bytes() == data:
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(f"{path.name}.{threading.get_ident()}{_ASIDE}")
  try:
    aside.write_bytes(data)
    aside.replace(path)
  except OSError:
    aside.unlink(missing_ok=True)
    raise


def _finish(out: Path, m: Manifest, names: Sequence[str], command: str) -> None:
  """From what is known of the parts to a dataset; manifest.json is last, and makes it one."""
  parts = [_read(_part(out, i)) for i in range(len(names))]
  lines = [line for part in parts for line in part["lines"]]
  _write(out / LINES, "".join(f"{line}\n" for line in lines).encode())
  _describe(out, m, [len(part["lines"]) for part in parts], sum(part["bytes"] for part in parts))
  files = {
    name: {"records": len(part["lines"]), "bytes": part["bytes"], "sha256": part["sha256"]}
    for name, part in zip(names, parts, strict=True)
  }
  for name in (LINES, *_TFDS):
    files[name] = {"bytes": (out / name).stat().st_size, "sha256": built.sha256(out / name)}
  told = [json.loads(line) for line in lines]
  made_by = [part["by"] for part in parts]
  about = {
    "manifest": m.fields,
    "records": len(lines),
    "kinds": _counts(line["kind"] for line in told),
    "sorts": _counts(line["sort"] for line in told),
    "yield": _yield(parts),
    "files": files,
    "command": command,
    "by": [by for i, by in enumerate(made_by) if by not in made_by[:i]],
  }
  _write(out / MANIFEST, _json(about))


def _describe(out: Path, m: Manifest, lengths: list[int], size: int) -> None:
  """What TFDS needs beside the records."""
  template = tfds.core.ShardedFileTemplate(
    dataset_name=m.name, data_dir=out, split=m.split, filetype_suffix="array_record"
  )
  split = tfds.core.SplitInfo(
    name=m.split, shard_lengths=lengths, num_bytes=size, filename_template=template
  )
  tfds.folder_dataset.write_metadata(
    data_dir=out,
    features=examples.features(),
    split_infos=[split],
    description="Demonstrations of looking before answering; see manifest.json.",
    check_data=False,  # That needs TensorFlow.
  )


def _counts(names: Iterable[str]) -> dict[str, dict]:
  counts = collections.Counter(names)
  total = sum(counts.values())
  return {name: {"records": n, "share": n / total} for name, n in sorted(counts.items())}


def _yield(parts: Sequence[Mapping]) -> dict[str, dict]:
  """Of each kind that was made here: how many items were tried, and why some were of no use."""
  tried: dict[str, int] = collections.Counter()
  reasons: dict[str, dict[str, int]] = collections.defaultdict(collections.Counter)
  for part in parts:
    tried.update(part["tried"])
    for kind, counts in part["reasons"].items():
      reasons[kind].update(counts)
  return {
    kind: {
      "tried": n,
      "made": (made := n - sum(reasons[kind].values())),
      "share": made / n,
      "reasons": dict(reasons[kind]),
    }
    for kind, n in sorted(tried.items())
  }


@functools.cache
def _versions() -> dict:
  """Of what the bytes depend on."""
  describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
  folder = Path(__file__).parent
  commit = subprocess.run(describe, capture_output=True, text=True, check=False, cwd=folder)
  packages = {name: version(name) for name in _PACKAGES}
  return {
    "commit": commit.stdout.strip() or "unknown",
    "versions": {"python": platform.python_version(), **packages},
  }


def _read(path: Path) -> dict:
  return json.loads(path.read_text(encoding="utf-8"))


def _json(value: object) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def check(out: Path, against: Sequence[Path], *, workers: Workers | None) -> dict:
  """Writes report.json of a finished dataset, and returns it. Raises as `validate.report` does."""
  names = built.records_of(built.Dataset.open(out).about)
  compute = operator.call if workers is None else workers.compute
  examine = lambda name: compute(validate.examine, out / name)
  bar = tqdm(_parallel(examine, names, workers), total=len(names), unit="file", desc="checking")
  found = dict(bar)
  report = validate.report(out, [one for name in names for one in found[name]], against)
  _write(out / REPORT, _json(report))
  return report


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code: 0; 1 where the report has problems; 2 for what cannot be done; 130 after Ctrl-C."""
  p = argparse.ArgumentParser(
    prog="python -m pixelis_jax.data.build", description=__doc__.splitlines()[0], allow_abbrev=False
  )
  p.add_argument("--manifest", type=Path, metavar="FILE", help="what to build (data/manifest.py)")
  p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/data/NAME")
  p.add_argument("--processes", type=int, default=0, metavar="N", help="default: one a CPU")
  p.add_argument("--validate", action="store_true", help="only check what is in --out")
  p.add_argument(
    "--against",
    type=Path,
    nargs="+",
    default=[],
    metavar="DIR",
    help="no image may be in these too",
  )
  args = p.parse_args(argv)
  if args.processes < 0:
    p.error(f"--processes {args.processes} must be 1 or more, or 0 for one a CPU")
  if args.manifest is None and not (args.validate and args.out):
    p.error("--manifest is needed, or --validate and --out")
  try:
    return _run(args, " ".join(["python -m pixelis_jax.data.build", *(argv or sys.argv[1:])]))
  except (ValueError, OSError) as e:  # Mistake is a ValueError.
    print(f"{p.prog}: {' '.join(str(e).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped: finished parts are kept, the same command goes on", file=sys.stderr)
    return 130


def _run(args: argparse.Namespace, command: str) -> int:
  m = None if args.manifest is None else manifest.read(args.manifest)
  out = Path("runs/data") / m.name if args.out is None else args.out
  processes = args.processes or os.cpu_count() or 1
  with contextlib.closing(Workers(Settings(processes=processes, **_LIMITS))) as workers:
    if not args.validate:
      build(m, out, workers=workers, command=command)
    report = check(out, args.against, workers=workers)
  print(validate.table(report))
  return 1 if report["problems"] else 0


if __name__ == "__main__":
  sys.exit(main())
