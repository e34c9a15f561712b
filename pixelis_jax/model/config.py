"""The shape of a Qwen2.5-VL model, read from a Hugging Face `config.json`."""

import dataclasses
import types
from collections.abc import Mapping

# What transformers' classes assume where a config file leaves a field out: a file saved by
# transformers 4 lists only what differs from these (configuration_qwen2_5_vl.py, 5.23).
_VISION_DEFAULTS = types.MappingProxyType(
  {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
  }
)
_TEXT_DEFAULTS = types.MappingProxyType(
  {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
  }
)
_TOKEN_DEFAULTS = types.MappingProxyType(
  {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
  }
)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """The vision tower. `window` is in pixels of the shown image, as in the checkpoint."""

  depth: int
  width: int
  heads: int
  mlp_width: int
  out_width: int
  patch: int
  temporal_patch: int
  channels: int
  merge: int
  window: int
  full_blocks: tuple[int, ...]
  activation: str
  tokens_per_second: int
  rope_theta: float

  def __post_init__(self):
    _divides("vision hidden_size", self.width, "num_heads", self.heads)
    _divides("vision head width", self.head_width, "4 (two rotary axes, two halves)", 4)
    _known("vision hidden_act", self.activation, ACTIVATIONS)
    if self.window < self.patch * self.merge:
      raise ValueError(f"window_size {self.window} must be at least {self.patch * self.merge}")
    bad = [i for i in self.full_blocks if not 0 <= i < self.depth]
    if bad:
      raise ValueError(f"fullatt_block_indexes {bad} must be in [0, {self.depth})")

  @property
  def head_width(self) -> int:
    return self.width // self.heads

  @property
  def patch_values(self) -> int:
    """K: numbers in one flattened patch, ordered (channel, time, row, column)."""
    return self.channels * self.temporal_patch * self.patch**2

  @property
  def merge_unit(self) -> int:
    """m: patches that become one token of the language model."""
    return self.merge**2

  @property
  def window_side(self) -> int:
    """Side of an attention window, in merged units."""
    return self.window // self.merge // self.patch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """The decoder. `mrope_section` splits the head_width / 2 frequencies among (t, h, w)."""

  layers: int
  width: int
  heads: int
  kv_heads: int
  mlp_width: int
  vocab_size: int
  activation: str
  norm_eps: float
  rope_theta: float
  mrope_section: tuple[int, int, int]
  tied: bool

  def __post_init__(self):
    _divides("hidden_size", self.width, "num_attention_heads", self.heads)
    _divides("num_attention_heads", self.heads, "num_key_value_heads", self.kv_heads)
    _known("hidden_act", self.activation, ACTIVATIONS)
    if 2 * sum(self.mrope_section) != self.head_width:
      raise ValueError(
        f"mrope_section {self.mrope_section} must sum to half the head width {self.head_width}"
      )

  @property
  def head_width(self) -> int:
    return self.width // self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A Qwen2.5-VL policy: tower, decoder and the token ids that the model itself must know."""

  vision: VisionConfig
  text: TextConfig
  image_token: int
  video_token: int
  vision_start_token: int
  vision_end_token: int

  def __post_init__(self):
    if self.vision.out_width != self.text.width:
      raise ValueError(
        f"out_hidden_size {self.vision.out_width} must equal hidden_size {self.text.width}"
      )

  @classmethod
  def from_hf(cls, raw: Mapping) -> "ModelConfig":
    """From the parsed `config.json` of transformers 4 (flat, `rope_scaling`) or 5 (nested).

    Raises ValueError naming the field for a value that this implementation does not compute.
    """
    _known("model_type", raw.get("model_type"), ("qwen2_5_vl",))
    tokens = {**_TOKEN_DEFAULTS, **_present(raw, _TOKEN_DEFAULTS)}
    text = raw.get("text_config") or raw
    # transformers 4 wrote the flag into text_config, 5 reads either place (any true one counts).
    tied = bool(tokens["tie_word_embeddings"] or text.get("tie_word_embeddings", False))
    return cls(
      vision=_vision(raw.get("vision_config") or {}),
      text=_text(text, tied),
      image_token=tokens["image_token_id"],
      video_token=tokens["video_token_id"],
      vision_start_token=tokens["vision_start_token_id"],
      vision_end_token=tokens["vision_end_token_id"],
    )


def _vision(raw: Mapping) -> VisionConfig:
  v = {**_VISION_DEFAULTS, **_present(raw, _VISION_DEFAULTS)}
  rope = v["rope_parameters"]
  _known("vision rope_type", rope.get("rope_type", "axial"), ("axial",))
  return VisionConfig(
    depth=v["depth"],
    width=v["hidden_size"],
    heads=v["num_heads"],
    mlp_width=v["intermediate_size"],
    out_width=v["out_hidden_size"],
    patch=_one(v["patch_size"], "patch_size"),
    temporal_patch=_one(v["temporal_patch_size"], "temporal_patch_size"),
    channels=v["in_channels"],
    merge=v["spatial_merge_size"],
    window=v["window_size"],
    full_blocks=tuple(v["fullatt_block_indexes"]),
    activation=v["hidden_act"],
    tokens_per_second=v["tokens_per_second"],
    rope_theta=float(rope["rope_theta"]),
  )


def _text(raw: Mapping, tied: bool) -> TextConfig:
  t = {**_TEXT_DEFAULTS, **_present(raw, _TEXT_DEFAULTS)}
  rope = {"rope_theta": t["rope_theta"], **(_rope(raw))}
  _known("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope"))
  _known("use_sliding_window", t["use_sliding_window"], (False,))
  _known("attention_dropout", t["attention_dropout"], (0, 0.0))
  for kind in raw.get("layer_types") or ():
    _known("layer_types", kind, ("full_attention",))
  head_width = raw.get("head_dim")
  if head_width is not None:
    _known("head_dim", head_width, (t["hidden_size"] // t["num_attention_heads"],))
  return TextConfig(
    layers=t["num_hidden_layers"],
    width=t["hidden_size"],
    heads=t["num_attention_heads"],
    kv_heads=t["num_key_value_heads"],
    mlp_width=t["intermediate_size"],
    vocab_size=t["vocab_size"],
    activation=t["hidden_act"],
    norm_eps=float(t["rms_norm_eps"]),
    rope_theta=float(rope["rope_theta"]),
    mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
    tied=tied,
  )


def _rope(raw: Mapping) -> Mapping:
  """The rotary table under either spelling; both together must not disagree."""
  old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
  if old and new and old != new:
    raise ValueError(f"rope_scaling {old} and rope_parameters {new} disagree: keep one of them")
  return new or old or {}


def _present(raw: Mapping, fields: Mapping) -> dict:
  return {name: raw[name] for name in fields if raw.get(name) is not None}


def _one(size, name: str) -> int:
  sizes = {size} if isinstance(size, int) else set(size)
  if len(sizes) != 1:
    raise ValueError(f"{name} {size} must be one number (square patches)")
  return sizes.pop()


def _known(field: str, value, supported: tuple) -> None:
  if value not in supported:
    raise ValueError(f"config field {field} = {value!r} is not supported, only {supported}")


def _divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
  if value % divisor:
    raise ValueError(f"{name} {value} must be divisible by {divisor_name} {divisor}")
