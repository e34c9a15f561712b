"""Packages are made here; a server on this machine stands for the mirror."""

import hashlib
import http.server
import io
import re
import tarfile
import threading
import types

import pytest

from pixelis_jax.data import pictures
from scripts import fetch_pictures
from scripts.fetch_pictures import Package

FILES = {
  "./usr/share/things/koala.png": b"koala",
  "./usr/share/things/deep/owl.png": b"owl",
  "./usr/share/things/notes.ogg": b"sound",
  "./usr/share/doc/things/copyright": b"GPL-2",
  "./usr/share/other/cat.png": b"cat",
}


def deb() -> bytes:
  """An ar archive as dpkg writes it; the first member's size is odd, so it is padded."""
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w:xz") as tar:
    for name, content in FILES.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  archive = b"!<arch>\n"
  members = {"debian-binary": b"2.0", "control.tar.xz": b"xx", "data.tar.xz": data.getvalue()}
  for name, content in members.items():
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
    archive += head.encode() + content + b"\n" * (len(content) % 2)
  return archive


DEB = deb()
PACKAGE = Package(
  name="things",
  version="1.0-1",
  pool="pool/main/t/things/things_1.0-1_all.deb",
  sha256=hashlib.sha256(DEB).hexdigest(),
  size=len(DEB),
  unpacked=100,
  root="usr/share/things/",
  keep=r".*\.png",
)


class Mirror(http.server.BaseHTTPRequestHandler):
  """Knows the package alone; `asked` collects the ranges."""

  def do_GET(self):
    asked = self.headers.get("Range")
    self.server.asked.append(asked)
    if self.path != f"/debian/{PACKAGE.pool}":
      self.send_error(404)
      return
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    self.send_response(206 if asked else 200)
    self.send_header("Content-Length", str(len(self.server.content) - start))
    self.end_headers()
    self.wfile.write(self.server.content[start : self.server.breaks_off])

  def log_message(self, *_):
    pass


@pytest.fixture
def mirror():
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
    server.asked, server.content, server.breaks_off = [], DEB, None
    server.url = f"http://127.0.0.1:{server.server_address[1]}/debian/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def contents(folder):
  return {
    p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
  }


def test_what_is_used_is_kept_with_the_licence(tmp_path, mirror):
  assert fetch_pictures.fetch(PACKAGE, tmp_path, mirror.url).endswith("things: 3 files")
  # Neither the sound, nor what lies outside the root, nor the archive.
  assert contents(tmp_path) == {
    "things/koala.png": b"koala",
    "things/deep/owl.png": b"owl",
    "things/copyright": b"GPL-2",
    "things/SOURCE.txt": PACKAGE.source.encode(),
  }
  assert [p.name for p in tmp_path.iterdir()] == ["things"]
  assert fetch_pictures.fetch(PACKAGE, tmp_path, mirror.url).endswith("is there")
  assert mirror.asked == [None]


def test_a_download_goes_on_where_it_stopped(tmp_path, mirror):
  mirror.breaks_off = 100
  with pytest.raises(ValueError, match=f"broke off after 100 of {len(DEB)} bytes: run this again"):
    fetch_pictures.fetch(PACKAGE, tmp_path, mirror.url)
  mirror.breaks_off = None
  fetch_pictures.fetch(PACKAGE, tmp_path, mirror.url)
  assert mirror.asked == [None, "bytes=100-"]
  assert (tmp_path / "things" / "koala.png").read_bytes() == b"koala"


def test_an_unpacking_that_was_stopped_is_no_package(tmp_path, mirror):
  left = tmp_path / ".things.part" / "older.png"
  left.parent.mkdir()
  left.write_bytes(b"ol")
  fetch_pictures.fetch(PACKAGE, tmp_path, mirror.url)
  assert "things/older.png" not in contents(tmp_path) and not left.exists()


def test_a_wrong_checksum_leaves_nothing(tmp_path, mirror):
  mirror.content = DEB[:-1] + bytes([DEB[-1] ^ 1])
  with pytest.raises(ValueError, match=f"has SHA-256 .* and should have {PACKAGE.sha256}"):
    fetch_pictures.fetch(PACKAGE, tmp_path, mirror.url)
  assert not contents(tmp_path)


def test_a_mirror_without_it(tmp_path, mirror):
  with pytest.raises(ValueError, match="answers 404 .*name a mirror that has it"):
    fetch_pictures.fetch(PACKAGE, tmp_path, mirror.url + "elsewhere")


def test_no_network(tmp_path):
  # Port 9 discards: nothing listens there.
  with pytest.raises(ValueError, match="things_1.0-1_all.deb cannot be reached: .*refused"):
    fetch_pictures.fetch(PACKAGE, tmp_path, "http://127.0.0.1:9")


def test_no_room(tmp_path, monkeypatch):
  usage = lambda folder: types.SimpleNamespace(free=0)
  monkeypatch.setattr(fetch_pictures.shutil, "disk_usage", usage)
  with pytest.raises(ValueError, match="has room for 0 MiB and needs"):
    fetch_pictures.fetch(PACKAGE, tmp_path, None)


def test_another_folder_of_that_name_is_left_alone(tmp_path):
  mine = tmp_path / "things" / "mine.png"
  mine.parent.mkdir()
  mine.write_bytes(b"mine")
  with pytest.raises(ValueError, match="is not things 1.0-1: move it away first"):
    fetch_pictures.fetch(PACKAGE, tmp_path, None)
  assert mine.read_bytes() == b"mine"


def apt_get(folder, script):
  """A program of that name, found before all others."""
  program = folder / "apt-get"
  program.write_text(f"#!/bin/sh\n{script}\n")
  program.chmod(0o755)


def test_apt_is_asked_for_this_version(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
  (tmp_path / "made.deb").write_bytes(DEB)
  apt_get(tmp_path, f'test "$*" = "download things=1.0-1" && cp {tmp_path}/made.deb things.deb')
  fetch_pictures.fetch(PACKAGE, tmp_path / "out", None)
  assert (tmp_path / "out" / "things" / "koala.png").read_bytes() == b"koala"


def test_what_apt_says_is_passed_on(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
  apt_get(tmp_path, "echo Version 1.0-1 was not found >&2; exit 100")
  with pytest.raises(ValueError, match="Version 1.0-1 was not found\nRun apt-get update, or name"):
    fetch_pictures.fetch(PACKAGE, tmp_path / "out", None)


def test_the_program_ends_with_the_reason(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(
    SystemExit, match="opencv-doc: there is no apt-get here: name a Debian mirror"
  ):
    fetch_pictures.main([str(tmp_path / "out"), "--packages", "opencv-doc"])


def test_what_pictures_reads_is_kept():
  assert fetch_pictures.USED == (pictures.STAMPS, pictures.OPENCV)
  opencv = fetch_pictures.PACKAGES[1]
  read = [name for names in pictures.FETCHED.values() for name in names]
  assert all(re.fullmatch(opencv.keep, name) for name in read)
