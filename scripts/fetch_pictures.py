"""Fetches the pictures that data/pictures.py reads from a folder: Debian packages, unpacked.

    python scripts/fetch_pictures.py pictures
    python scripts/fetch_pictures.py pictures --packages dataset-fashion-mnist --mirror URL

apt-get gets them where it is; elsewhere name a Debian mirror, the part before /pool/ of what
`apt-get download --print-uris` prints on a Debian machine. Each is checked against the SHA-256
written here, and only what we use is kept. A package appears in the folder when it is whole, so a
run that was stopped can be repeated and goes on. Licences: docs/DATA.md.
"""

import argparse
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

SOURCE = "SOURCE.txt"  # In an unpacked package: which it is.
_CHUNK = 1 << 20
_TIMEOUT = 60  # Seconds without an answer.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Package:
  """One version of a Debian package: files below `root` whose rest matches `keep` are used."""

  name: str
  version: str
  pool: str  # Path on a mirror.
  sha256: str
  size: int  # Bytes to download,
  unpacked: int  # and to keep.
  root: str
  keep: str

  @property
  def file(self) -> str:
    return self.pool.rsplit("/", 1)[1]

  @property
  def source(self) -> str:
    return f"{self.name} {self.version}\nsha256 {self.sha256}\n"


PACKAGES = (
  Package(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    pool="pool/main/t/tuxpaint-stamps/tuxpaint-stamps-default_2022.06.04-1_all.deb",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    size=160_880_444,
    unpacked=25_000_000,
    root="usr/share/tuxpaint/stamps/",
    keep=r"(?!symbols/)(?!.*\bcartoon/).*\.(png|txt)",
  ),
  Package(
    name="opencv-doc",
    version="4.6.0+dfsg-12",
    pool="pool/main/o/opencv/opencv-doc_4.6.0+dfsg-12_all.deb",
    sha256="4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
    size=95_715_012,
    unpacked=25_000_000,
    root="usr/share/doc/opencv-doc/examples/",
    keep=r"data/[^/]*\.(jpg|png|avi)|text/scenetext[^/]*\.(jpg|png)",
  ),
  Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    pool=(
      "pool/main/d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb"
    ),
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    size=30_900_652,
    unpacked=31_000_000,
    root="usr/share/datasets/fashion-mnist/",
    keep=r"[^/]*\.gz",
  ),
)
USED = tuple(package.name for package in PACKAGES[:2])  # By data/pictures.py.


def fetch(package: Package, folder: Path, mirror: str | None) -> str:
  """Puts the package into the folder, unless it is there; says what was done.

  Raises:
    OSError, ValueError: it cannot be had, is not what it should be, or does not fit.
  """
  target = folder / package.name
  if target.exists():
    marker = target / SOURCE
    if not marker.is_file() or marker.read_text() != package.source:
      raise ValueError(f"{target} is not {package.name} {package.version}: move it away first")
    return f"{target} is there"
  downloads = folder / ".downloads"
  downloads.mkdir(parents=True, exist_ok=True)
  archive = downloads / package.file
  needed = package.unpacked + (0 if archive.exists() else package.size)
  if (free := shutil.disk_usage(folder).free) < needed:
    raise ValueError(f"{folder} has room for {free >> 20} MiB and needs {needed >> 20} MiB")
  if not archive.exists():
    (_from_apt if mirror is None else _from_mirror)(package, archive, mirror)
  _verify(package, archive)
  files = _unpack(package, archive, target)
  archive.unlink()
  if not any(downloads.iterdir()):
    downloads.rmdir()
  return f"{target}: {files} files"


def _from_apt(package: Package, archive: Path, mirror: None) -> None:
  """Into a folder of its own: apt-get leaves unfinished files behind under their last name."""
  if shutil.which("apt-get") is None:
    raise ValueError("there is no apt-get here: name a Debian mirror with --mirror")
  part = archive.with_suffix(".apt")
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir()
  command = ["apt-get", "download", f"{package.name}={package.version}"]
  done = subprocess.run(command, cwd=part, capture_output=True, text=True)
  found = list(part.glob("*.deb"))
  if done.returncode or not found:
    raise ValueError(
      f"{' '.join(command)} failed: {done.stderr.strip() or 'no reason given'}\n"
      "Run apt-get update, or name a Debian mirror that has it with --mirror"
    )
  found[0].replace(archive)
  part.rmdir()


def _from_mirror(package: Package, archive: Path, mirror: str) -> None:
  """Goes on after the bytes that an earlier run got."""
  part = archive.with_suffix(".part")
  start = part.stat().st_size if part.exists() else 0
  url = f"{mirror.rstrip('/')}/{urllib.parse.quote(package.pool, safe='/+')}"
  asked = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
  try:
    with urllib.request.urlopen(asked, timeout=_TIMEOUT) as answer:
      goes_on = start and answer.status == 206
      with part.open("ab" if goes_on else "wb") as out:
        shutil.copyfileobj(answer, out, _CHUNK)
  except urllib.error.HTTPError as e:
    if e.code == 416:  # There is nothing after what we have, which must then be something else.
      part.unlink()
    raise ValueError(f"{url} answers {e.code} {e.reason}: name a mirror that has it") from e
  except urllib.error.URLError as e:
    raise ValueError(f"{url} cannot be reached: {e.reason}") from e
  if (got := part.stat().st_size) < package.size:
    raise ValueError(f"{url} broke off after {got} of {package.size} bytes: run this again")
  part.replace(archive)


def _verify(package: Package, archive: Path) -> None:
  """Deletes the archive where it is another."""
  with archive.open("rb") as f:
    found = hashlib.file_digest(f, "sha256").hexdigest()
  if found != package.sha256:
    archive.unlink()
    raise ValueError(f"{package.file} has SHA-256 {found} and should have {package.sha256}")


def _unpack(package: Package, archive: Path, target: Path) -> int:
  """Files kept, the package's own word on its licence among them."""
  part = target.with_name(f".{package.name}.part")
  shutil.rmtree(part, ignore_errors=True)
  licence = f"usr/share/doc/{package.name}/copyright"
  files = 0
  for name, content in _files(archive):
    rest = name.removeprefix(package.root)
    if name == licence:
      rest = "copyright"
    elif rest == name or not re.fullmatch(package.keep, rest):
      continue
    (part / rest).parent.mkdir(parents=True, exist_ok=True)
    (part / rest).write_bytes(content)
    files += 1
  if files < 2:
    raise ValueError(f"{package.file} has no files below {package.root}")
  (part / SOURCE).write_text(package.source)
  os.replace(part, target)
  return files


def _files(archive: Path) -> Iterator[tuple[str, bytes]]:
  """Names, from the root and without it, and contents of a package's regular files.

  A .deb is an ar archive: 8 bytes, then members with a header of 60, at even places.
  """
  with archive.open("rb") as f:
    f.seek(8)
    while header := f.read(60):
      name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
      if name.startswith("data.tar"):
        with tarfile.open(fileobj=f, mode="r|*") as tar:
          for member in tar:
            if member.isfile():
              yield member.name.removeprefix("./"), tar.extractfile(member).read()
        return
      f.seek(size + size % 2, os.SEEK_CUR)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  names = [package.name for package in PACKAGES]
  parser.add_argument("folder", type=Path)
  parser.add_argument("--packages", nargs="+", choices=names, default=USED)
  parser.add_argument("--mirror", help="URL of a Debian mirror, in place of apt-get")
  args = parser.parse_args(argv)
  for package in PACKAGES:
    if package.name in args.packages:
      print(f"{package.name} {package.version}, {package.size >> 20} MiB", flush=True)
      try:
        print(fetch(package, args.folder, args.mirror), flush=True)
      except (OSError, ValueError) as e:
        raise SystemExit(f"{package.name}: {e}") from e


if __name__ == "__main__":
  main()
