"""What sets the families of models apart: who sees, how a video is told, where coordinates lie."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pixelis_jax.chat.images import ImageProcessor, read_object

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
  """`name` is config.json's model_type. A family that does not see is text-only.

  `timed`: each step of a video has its time in words before it and its own placeholders.
  `coordinates` is the (height, width) of the frame that boxes and points are given in, whatever the
  image's size; None: the size shown, in pixels.
  """

  name: str
  sees: bool = True
  timed: bool = False
  coordinates: Size | None = None

  @property
  def unit(self) -> str:
    """Of the coordinates, as tools tell it."""
    if self.coordinates is None:
      return "pixels of the image as shown"
    return "thousandths of the image's width and height"

  def frame(self, images: ImageProcessor | None, height: int, width: int) -> Size:
    """(height, width) of the coordinate frame of an image this size, in pixels or relative units.

    Raises:
      ValueError: the image cannot be shown, or nothing can to a text-only model.
    """
    if images is None:
      raise ValueError(f"{self.name} is text-only: it is shown no image of {height} x {width}")
    shown = images.shown_size(height, width)
    return shown if self.coordinates is None else self.coordinates


FAMILIES = {
  family.name: family
  for family in (
    Family(name="qwen2_5_vl"),
    Family(name="qwen3_vl", timed=True, coordinates=(1000, 1000)),
    Family(name="qwen3", sees=False),
    Family(name="llama", sees=False),  # Those whose chat is ChatML, as Qwen's: SmolLM2.
  )
}


def family_of(path: str | Path) -> Family:
  """The family of a Hugging Face directory; Qwen2.5-VL where there is no config.json.

  Raises:
    ValueError: a model_type that is not in `FAMILIES`.
  """
  file = Path(path) / "config.json"
  if not file.is_file():
    return FAMILIES["qwen2_5_vl"]
  name = read_object(file).get("model_type")
  if name not in FAMILIES:
    raise ValueError(f"{file}: model_type {name!r} must be one of {sorted(FAMILIES)}")
  return FAMILIES[name]


def images_of(path: str | Path) -> ImageProcessor | None:
  """The directory's image processor; None for a text-only model. Raises as its constructor does."""
  return ImageProcessor.from_directory(path) if family_of(path).sees else None


def frame_of(path: str | Path) -> Callable[[int, int], Size]:
  """`Family.frame` of the directory: (height, width) of an image to its coordinate frame's."""
  return partial(family_of(path).frame, images_of(path))
