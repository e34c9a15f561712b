"""transformers' own processors with videos. Call these functions in a process of their own.

They import torchvision, which has no wheel for every torch: a CUDA wheel beside a CPU torch breaks
every import of transformers' models. So where there is none, the few functions that they need are
put in its place here. They are the same calls of torch: `resize` of a byte tensor by bicubic is
`interpolate` with antialiasing there too (transforms/v2/functional/_geometry.py of torchvision).
"""

import enum
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Size = tuple[int, int]


def prepare() -> None:
  """To be called once, before transformers is imported."""
  if importlib.util.find_spec("torchvision") is None:
    _stand_in()


def sampled(
  family: str, settings: dict, counts: Sequence[int], fps: float
) -> dict[int, list[int] | str]:
  """Of each number of frames the indices shown, or the error that transformers ends with."""
  from transformers.video_utils import VideoMetadata

  processor, found = _video_class(family)(**settings), {}
  for count in counts:
    metadata = VideoMetadata(total_num_frames=count, fps=fps)
    try:
      indices = processor.sample_frames(
        metadata=metadata, fps=processor.fps, num_frames=processor.num_frames
      )
      found[count] = [int(i) for i in indices]
    except (ValueError, ZeroDivisionError) as error:
      found[count] = type(error).__name__
  return found


def sizes(family: str, settings: dict, shapes: Sequence[tuple[int, int, int]]) -> list[Size]:
  """(height, width) each (frames, height, width) is resized to; no pixel is touched."""
  import torch
  from transformers.video_processing_utils import BaseVideoProcessor

  processor = _video_class(family)(**settings)
  true_resize = BaseVideoProcessor.resize
  BaseVideoProcessor.resize = lambda self, image, size, resample: size
  try:
    found = [
      processor.resize(
        torch.empty((1, frames, 3, height, width), device="meta"),
        size=processor.size,
        resample=None,
        factor=processor.patch_size * processor.merge_size,
        temporal_factor=processor.temporal_patch_size,
        cap_pixels_per_frame=processor.cap_pixels_per_frame,
      )
      for frames, height, width in shapes
    ]
  finally:
    BaseVideoProcessor.resize = true_resize
  return [(size.height, size.width) for size in found]


def video(
  folder: Path, family: str, frames: np.ndarray, fps: float
) -> tuple[np.ndarray, tuple[int, ...]]:
  """Patches and (t, h, w) of a video by the processor that the folder's files describe."""
  processor = _video_class(family).from_pretrained(folder)
  made = processor(
    videos=[frames],
    video_metadata=[_metadata(frames, fps)],
    return_tensors="pt",
    input_data_format="channels_last",
  )
  return made["pixel_values_videos"].numpy(), tuple(made["video_grid_thw"][0].tolist())


def conversation(
  folder: Path,
  family: str,
  turns: list[dict],
  images: Sequence[np.ndarray] = (),
  videos: Sequence[tuple[np.ndarray, float]] = (),
  **options,
) -> tuple[list[int], list[float]]:
  """Token ids of a conversation, and the seconds a grid step of each video where the model asks.

  `videos` are frames and their rate; `options` go to the chat template.
  """
  from transformers import AutoTokenizer
  from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
  from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

  processor = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[family](
    image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder),
    tokenizer=AutoTokenizer.from_pretrained(folder),
    video_processor=_video_class(family).from_pretrained(folder),
  )
  text = processor.tokenizer.apply_chat_template(turns, tokenize=False, **options)
  made = processor(
    text=[text],
    images=list(images) or None,
    videos=[frames for frames, _ in videos] or None,
    video_metadata=[_metadata(*video) for video in videos] or None,
    input_data_format="channels_last",
    return_tensors="pt",
  )
  seconds = made.get("second_per_grid_ts", [])
  return made["input_ids"][0].tolist(), [float(s) for s in seconds]


def _metadata(frames: np.ndarray, fps: float) -> dict:
  count = len(frames)
  return {"total_num_frames": count, "fps": fps, "frames_indices": list(range(count))}


def _video_class(family: str):
  if family == "qwen2_5_vl":
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor
  from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

  return Qwen3VLVideoProcessor


class InterpolationMode(enum.Enum):
  NEAREST_EXACT, BOX, BILINEAR, HAMMING, BICUBIC, LANCZOS = range(6)


def _resize(frames, size, interpolation, antialias):
  from torch.nn.functional import interpolate

  assert interpolation is InterpolationMode.BICUBIC and antialias
  flat = frames.reshape(-1, *frames.shape[-3:])
  sized = interpolate(flat, size=tuple(size), mode="bicubic", align_corners=False, antialias=True)
  return sized.reshape(*frames.shape[:-2], *size)


def _normalize(frames, mean, std, inplace=False):
  return frames.sub(mean.view(-1, 1, 1)).div(std.view(-1, 1, 1))


def _stand_in() -> None:
  names = ("", ".io", ".transforms", ".transforms.functional")
  for name in (*names, ".transforms.v2", ".transforms.v2.functional"):
    module = types.ModuleType(f"torchvision{name}")
    module.__spec__ = importlib.util.spec_from_loader(module.__name__, loader=None)
    sys.modules[module.__name__] = module
    parent, _, child = module.__name__.rpartition(".")
    if parent:
      setattr(sys.modules[parent], child, module)
  at = sys.modules
  at["torchvision"].__version__, at["torchvision"].__file__ = "0.28.0", "stand-in"
  at["torchvision.transforms"].InterpolationMode = InterpolationMode
  at["torchvision.transforms.functional"].pil_to_tensor = None  # Imported, not called here.
  functional = at["torchvision.transforms.v2.functional"]
  functional.InterpolationMode = InterpolationMode
  functional.resize, functional.normalize = _resize, _normalize
  functional.grayscale_to_rgb = lambda frames: frames
