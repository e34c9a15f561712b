"""`pixelis ask --video`: the clip is read, shown and looked into as an image is."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelis_jax import cli, sampler
from pixelis_jax.data.video import save_frames
from pixelis_jax.metrics import read_lines
from pixelis_jax.types import Box, Picture, Segment, ToolResult, Video
from tests import fakes

ASSETS = Path(__file__).parents[1] / "assets" / "tiny-vl"
LOOK = '<tool_call>\n{"name": "zoom_in", "arguments": {"bbox_2d": [20, 40, 40, 80]}}\n</tool_call>'


@pytest.fixture
def clip(tmp_path) -> Video:
  """Three seconds at four frames a second, in the folder walk."""
  frames = np.stack([fakes.image(80, 120, seed=i) for i in range(12)])
  video = Video(frames=frames, times=np.arange(12, dtype=np.float32) / 4)
  save_frames(tmp_path / "walk", video)
  return video


@pytest.fixture
def shown(monkeypatch) -> list:
  """A policy that looks, then answers 7; gathers the prompts' segments that it is given."""
  prompts = []

  def bind(self, params, *, key, version, temperature):
    def generate(requests):
      replies = []
      for task, turns in requests:
        context = self.chat.prompt(task) if not turns else Segment(tokens=np.zeros(0, np.int32))
        prompts.append(context)
        replies.append(fakes.completion("\\boxed{7}" if turns else LOOK, context=context))
      return replies

    return generate

  monkeypatch.setattr(sampler.Sampler, "bind", bind)
  return prompts


def test_ask_shows_videos_and_tells_where_tools_looked(clip, shown, tmp_path, capsys, monkeypatch):
  picture = Picture(
    pixels=clip.frames[6, 10:20, 30:50], source=0, box=Box(30.0, 10.0, 50.0, 20.0), frame=6
  )
  found = ToolResult(text="here", images=(picture,))
  monkeypatch.setattr("pixelis_jax.tools.Toolbox.run", lambda self, *call: found)
  walk, out = tmp_path / "walk", tmp_path / "out"
  Image.fromarray(fakes.image(40, 40)).save(tmp_path / "a.png")
  argv = ["ask", "--model", str(ASSETS), "--image", str(tmp_path / "a.png"), "--video", str(walk)]
  argv += ["--fps", "100", "--out", str(out), "what moves?"]
  assert cli.main([*argv, "--json"]) == 0
  told = json.loads(capsys.readouterr().out)
  (video,) = told["videos"]
  assert (video["path"], video["frames"], video["seconds"]) == (str(walk), 12, 2.75)
  assert video["size"] == [80, 120] and len(told["images"]) == 1
  # The image, then the clip: two frames a step, of which this model is shown one.
  image, frames = shown[0].images
  assert image.interval is None and frames.grid[0] * 2 == video["shown_frames"] == 2
  assert frames.size == tuple(video["shown"])
  assert told["turns"][0]["pictures"] == [{"video": 1, "seconds": 1.5, "box": [30, 10, 50, 20]}]
  (line,) = read_lines(out / "trajectories.jsonl")
  assert [f["frame"] for f in line["videos"][0]["frames"]] == [0, 2, 3, 5, 6, 8, 9, 11]
  assert cli.main(argv) == 0
  printed = capsys.readouterr().out
  assert "walk, 12 frames read up to 2.8 seconds, 120 x 80, 2 shown at" in printed
  assert "<- pixels [30, 10, 50, 20] of video 1 at 1.5 seconds" in printed


@pytest.mark.parametrize(
  "options, frames",
  [((), 6), (("--fps", "1"), 4), (("--max-frames", "2"), 2), (("--fps", "4"), 12)],
)
def test_ask_reads_no_more_than_it_is_told(clip, shown, tmp_path, capsys, options, frames):
  # 3 seconds at 2 a second; 4 is the least without another bound.
  argv = ["ask", "--model", str(ASSETS), "--video", str(tmp_path / "walk"), "--json", "hm?"]
  assert cli.main([*argv, *options]) == 0
  (video,) = json.loads(capsys.readouterr().out)["videos"]
  assert video["frames"] == frames


@pytest.mark.parametrize(
  "options, said",
  [
    (("--video", "{folder}/no.mp4"), "there is no video .*no.mp4"),
    (("--video", "{folder}/text.mp4"), "video .*text.mp4 cannot be read"),
    (("--video", "{folder}"), "holds no frames"),
    (("--video", "{folder}/thin"), "thin: image of 1 x 300 pixels"),
    (("--video", "{folder}/walk", "--fps", "0"), "fps 0.0 must be a positive number"),
    (("--video", "{folder}/walk", "--max-frames", "0"), "max_frames 0 .* must be 1 or more"),
  ],
)
def test_ask_says_what_is_wrong_with_a_video(clip, shown, tmp_path, capsys, options, said):
  (tmp_path / "text.mp4").write_text("no video")
  frames = np.stack([fakes.image(1, 300)] * 2)
  thin = Video(frames=frames, times=np.arange(2, dtype=np.float32))
  save_frames(tmp_path / "thin", thin)
  options = [option.format(folder=tmp_path) for option in options]
  assert cli.main(["ask", "--model", str(ASSETS), *options, "what?"]) == 2
  err = capsys.readouterr().err
  with pytest.raises(ValueError, match=said):
    raise ValueError(err)
  assert err.count("\n") == 1 and not shown


def test_a_text_only_model_is_not_asked_about_videos(clip, tmp_path, capsys):
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
  argv = ["ask", "--model", str(tmp_path / "model"), "--video", str(tmp_path / "walk"), "what?"]
  assert cli.main(argv) == 2
  assert "text-only model: it cannot be shown --image or --video" in capsys.readouterr().err
