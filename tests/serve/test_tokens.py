"""serve/tokens.py: every token of a record is there, in the colour of what SFT does with it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pixelis_jax import cli
from pixelis_jax.serve.tokens import CONTEXT, SHOWN, SUPERVISED, WIDTH, draw, layout, masks
from tests.data.datasets import MODEL, built


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """One record: a look at something else, the right look, the answer."""
  folder = tmp_path_factory.mktemp("corrected")
  return built(folder, n=1, kinds={"framed": 1}, sorts={"corrected": 1}).folder


def test_the_right_turns_are_marked_and_the_wrong_one_is_not(folder):
  row, chat, about = masks(folder, 0)
  cells = layout(row, chat)
  marked = "".join(cell.text for cell in cells if cell.color == SUPERVISED).replace("⏎", "\n")
  call, answer, rest = marked.split("<|im_end|>")  # A turn's end is taught, too.
  assert call.startswith("<tool_call>\n{") and call.endswith("</tool_call>") and rest == ""
  assert answer.startswith(r"\boxed{")
  # The tool in the prompt, the wrong look, the right one; were the mistake taught, both looks would
  # be marked.
  calls = [cell.color for cell in cells if "zoom_in" in cell.text]
  assert calls == [CONTEXT, CONTEXT, SUPERVISED]
  assert about == f"record 0, corrected, weight 1: {int(row.loss_mask.sum())} of " + (
    f"{len(row.tokens)} tokens are in the loss"
  )


def test_every_token_is_drawn_in_its_colour(folder):
  row, chat, about = masks(folder, 0)
  cells = layout(row, chat)
  page = draw(cells, about)
  assert page.shape[1] == WIDTH
  at = 0
  for cell in cells:
    mask = row.loss_mask[at : at + cell.count]
    wanted = SHOWN if cell.count > 1 else SUPERVISED if mask.all() else CONTEXT
    assert mask.all() or not mask.any()
    x0, y0, x1, y1 = (int(edge) for edge in (cell.box.x0, cell.box.y0, cell.box.x1, cell.box.y1))
    corners = page[[y0, y0, y1 - 1, y1 - 1], [x0, x1 - 1, x0, x1 - 1]]
    assert (corners == np.array([wanted])).all()
    assert (page[y0:y1, x1] == 255).all()  # Tokens are apart.
    at += cell.count
  assert at == len(row.tokens)
  # Of each image, the scene and two looks, a cell: a placeholder for 4 patches.
  shown = [cell for cell in cells if cell.color == SHOWN]
  assert [cell.count for cell in shown] == [len(image.patches) // 4 for image in row.images]
  assert shown[0].text == f"<|image_pad|> × {shown[0].count}"


def test_long_lines_go_on_below(folder):
  row, chat, _ = masks(folder, 0)
  narrow, wide = layout(row, chat, width=500), layout(row, chat)
  assert [cell.text for cell in narrow] == [cell.text for cell in wide]
  assert narrow[-1].box.y1 > wide[-1].box.y1
  boxes = [cell.box for cell in narrow]
  for box, after in zip(boxes, boxes[1:], strict=False):
    assert after.y0 > box.y1 or (after.y0 == box.y0 and after.x0 > box.x1)
  # No line begins before the margin, and only a token that is alone may be wider than the page.
  assert all(box.x1 <= 500 - 16 or box.x0 == 16 for box in boxes)


def test_pixelis_masks_writes_the_picture(folder, tmp_path, capsys):
  out = tmp_path / "made" / "masks.png"
  argv = ["masks", str(folder), "--model", MODEL, "--tools", "zoom_in,read_text", "--out", str(out)]
  assert cli.main(argv) == 0
  said = capsys.readouterr().out
  assert said.startswith(f"{out}: record 0, corrected, weight 1: ")
  with Image.open(out) as image:
    assert image.width == WIDTH
  # The prompt lists one more tool than that of the dataset's own.
  row, _, about = masks(folder, 0)
  assert int(said.split(" of ")[-1].split()[0]) > len(row.tokens)


@pytest.mark.parametrize(
  "options, message",
  [
    (("--record", "1"), "record 1 must be 0 to 0"),
    (("--record", "-1"), "record -1 must be 0 to 0"),
    (("--tools", "read_text"), "calls ['zoom_in'], model.tools has ['read_text']"),
    (("--model", "nowhere"), "there is no directory nowhere"),
  ],
)
def test_what_cannot_be_drawn_is_said(folder, tmp_path, capsys, options, message):
  argv = ["masks", str(folder), "--out", str(tmp_path / "masks.png"), *options]
  assert cli.main(argv) == 2
  assert message in capsys.readouterr().err and not (tmp_path / "masks.png").exists()


def test_a_dataset_of_parts_needs_a_model(folder, tmp_path):
  copy = shutil.copytree(folder, tmp_path / "copy")
  about = json.loads((copy / "manifest.json").read_text())
  del about["manifest"]["model"]
  (copy / "manifest.json").write_text(json.dumps(about))
  with pytest.raises(ValueError, match="copy is made of parts: name the model"):
    masks(copy, 0)
  assert masks(copy, 0, model=MODEL)[2] == masks(folder, 0)[2]
