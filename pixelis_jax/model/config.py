"""The shape of a model, read from the `config.json` of a Hugging Face directory.

Families are data: one decoder and one tower serve all of them, and what differs is a field here.
"""

import dataclasses
import math
import types
from collections.abc import Collection, Mapping

# What transformers' classes assume where a config file leaves a field out: a file saved by
# transformers 4 lists only what differs from these (configuration_*.py of each family, 5.24).
_VISION_DEFAULTS = types.MappingProxyType(
  {
    "qwen2_5_vl": {
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
    },
    "qwen3_vl": {
      "depth": 27,
      "hidden_size": 1152,
      "hidden_act": "gelu_pytorch_tanh",
      "intermediate_size": 4304,
      "num_heads": 16,
      "in_channels": 3,
      "patch_size": 16,
      "spatial_merge_size": 2,
      "temporal_patch_size": 2,
      "out_hidden_size": 3584,
      "num_position_embeddings": 2304,
      "deepstack_visual_indexes": (8, 16, 24),
      "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    },
  }
)
_QWEN3 = {
  "vocab_size": 151936,
  "hidden_size": 4096,
  "intermediate_size": 22016,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "head_dim": 128,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "use_sliding_window": False,
  "attention_dropout": 0.0,
  "attention_bias": False,
}
_TEXT_DEFAULTS = types.MappingProxyType(
  {
    "qwen2_5_vl": {
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
    },
    "qwen3_vl": {**_QWEN3, "rope_theta": 5e5},
    "qwen3": {**_QWEN3, "rope_theta": 1e4},
    "llama": {
      "vocab_size": 32000,
      "hidden_size": 4096,
      "intermediate_size": 11008,
      "num_hidden_layers": 32,
      "num_attention_heads": 32,
      "num_key_value_heads": None,  # As many as query heads.
      "head_dim": None,  # hidden_size / num_attention_heads.
      "hidden_act": "silu",
      "rms_norm_eps": 1e-6,
      "rope_theta": 1e4,
      "attention_dropout": 0.0,
      "attention_bias": False,
      "mlp_bias": False,
      "pretraining_tp": 1,
      "rope_interleaved": False,
    },
  }
)
_MROPE_DEFAULTS = types.MappingProxyType({"qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)})
_TOKEN_DEFAULTS = types.MappingProxyType(
  {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
  }
)
# What _text and from_hf read besides.
_TEXT_EXTRAS = frozenset(
  "head_dim layer_types rope_parameters rope_scaling tie_word_embeddings".split()
)
# Switches of which one position is computed here; a family's file has some of them.
_COMPUTED = types.MappingProxyType(
  {
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
  }
)
FAMILIES = tuple(_TEXT_DEFAULTS)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
# Fields of a config file that do not change what the model computes. Any other that nobody reads
# is refused: ignoring one is how a port becomes silently wrong.
_WITHOUT_EFFECT = frozenset(
  """
  _attn_implementation _commit_hash _name_or_path add_cross_attention architectures auto_map
  bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task id2label in_chans
  initializer_range is_decoder is_encoder_decoder is_llama_config label2id max_position_embeddings
  max_window_layers model_type output_attentions output_hidden_states pad_token_id problem_type
  return_dict sliding_window spatial_patch_size text_config torch_dtype transformers.js_config
  transformers_version use_cache vision_config vision_token_id
  """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """The vision tower. `window` is in pixels of the shown image, as in the checkpoint.

  Qwen2.5-VL: RMS norms, gated MLPs, window attention but in `full_blocks`, no patch bias.
  Qwen3-VL (`window` None): layer norms, plain MLPs, every block full, a learned table of
  `position_side`^2 positions, and features of the blocks `deepstack` for the decoder's first
  layers.
  """

  depth: int
  width: int
  heads: int
  mlp_width: int
  out_width: int
  patch: int
  temporal_patch: int
  channels: int
  merge: int
  activation: str
  rope_theta: float
  window: int | None = None
  full_blocks: tuple[int, ...] = ()
  tokens_per_second: int | None = None
  position_side: int = 0
  deepstack: tuple[int, ...] = ()

  def __post_init__(self):
    _divides("vision hidden_size", self.width, "num_heads", self.heads)
    _divides("vision head width", self.head_width, "4 (two rotary axes, two halves)", 4)
    _known("vision hidden_act", self.activation, ACTIVATIONS)
    if self.window is not None and self.window < self.patch * self.merge:
      raise ValueError(f"window_size {self.window} must be at least {self.patch * self.merge}")
    _blocks("fullatt_block_indexes", self.full_blocks, self.depth)
    _blocks("deepstack_visual_indexes", self.deepstack, self.depth)

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
  def window_side(self) -> int | None:
    """Side of an attention window, in merged units; None where there are no windows."""
    return None if self.window is None else self.window // self.merge // self.patch

  @property
  def feature_width(self) -> int:
    """Numbers of one feature: what enters the decoder, then what is added after layers 0, 1, ..."""
    return self.out_width * (1 + len(self.deepstack))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """The decoder. `mrope_section` splits the head_width / 2 rotary pairs among (t, h, w).

  Chunked (Qwen2.5-VL) the sections follow one another; `interleaved` (Qwen3-VL) they take turns.
  A text-only model turns all pairs with the one position it has: (head_width / 2, 0, 0).
  """

  layers: int
  width: int
  heads: int
  kv_heads: int
  head_width: int
  mlp_width: int
  vocab_size: int
  activation: str
  norm_eps: float
  rope_theta: float
  mrope_section: tuple[int, int, int]
  interleaved: bool
  qkv_bias: bool
  qk_norm: bool
  tied: bool

  def __post_init__(self):
    _divides("num_attention_heads", self.heads, "num_key_value_heads", self.kv_heads)
    _known("hidden_act", self.activation, ACTIVATIONS)
    if 2 * sum(self.mrope_section) != self.head_width:
      raise ValueError(
        f"mrope_section {self.mrope_section} must sum to half the head width {self.head_width}"
      )

  @property
  def rotary_axes(self) -> tuple[int, ...]:
    """Which of (t, h, w) turns each of the head_width / 2 rotary pairs."""
    if not self.interleaved:
      return tuple(axis for axis, count in enumerate(self.mrope_section) for _ in range(count))
    axes = [0] * (self.head_width // 2)
    for axis in (1, 2):  # Rows turn pairs 1, 4, 7, ..., columns 2, 5, 8, ..., time the others.
      for pair in range(axis, min(3 * self.mrope_section[axis], len(axes)), 3):
        axes[pair] = axis
    return tuple(axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A policy: decoder, tower (None: text only) and the token ids that the model itself must know.

  `family` is the `model_type` of the checkpoint. A text-only model has no visual tokens (None).
  """

  family: str
  vision: VisionConfig | None
  text: TextConfig
  image_token: int | None
  video_token: int | None
  vision_start_token: int | None
  vision_end_token: int | None

  def __post_init__(self):
    if self.vision is None:
      return
    if self.vision.out_width != self.text.width:
      raise ValueError(
        f"out_hidden_size {self.vision.out_width} must equal hidden_size {self.text.width}"
      )
    if len(self.vision.deepstack) > self.text.layers:
      raise ValueError(
        f"deepstack_visual_indexes {self.vision.deepstack} must not outnumber the decoder's"
        f" {self.text.layers} layers"
      )

  @property
  def feature_width(self) -> int:
    """Numbers of one image feature; the decoder's width where there are no images."""
    return self.text.width if self.vision is None else self.vision.feature_width

  @classmethod
  def from_hf(cls, raw: Mapping) -> "ModelConfig":
    """From the parsed `config.json` of transformers 4 (flat, `rope_scaling`) or 5 (nested).

    Raises ValueError naming the field for a value that this implementation does not compute, and
    for a field that it does not know.
    """
    family = raw.get("model_type")
    _known("model_type", family, FAMILIES)
    text = raw.get("text_config") or raw
    for part in (raw, text):
      _only(part, {*_TEXT_DEFAULTS[family], *_TOKEN_DEFAULTS, *_TEXT_EXTRAS}, "config")
    # transformers 4 wrote the flag into text_config, 5 reads either place (any true one counts).
    tied = any(bool(part.get("tie_word_embeddings")) for part in (raw, text))
    seeing = family in _VISION_DEFAULTS
    tokens = {**_TOKEN_DEFAULTS, **_present(raw, _TOKEN_DEFAULTS)} if seeing else {}
    return cls(
      family=family,
      vision=_vision(raw.get("vision_config") or {}, family) if seeing else None,
      text=_text(text, tied, family),
      image_token=tokens.get("image_token_id"),
      video_token=tokens.get("video_token_id"),
      vision_start_token=tokens.get("vision_start_token_id"),
      vision_end_token=tokens.get("vision_end_token_id"),
    )


def _vision(raw: Mapping, family: str) -> VisionConfig:
  defaults = _VISION_DEFAULTS[family]
  _only(raw, defaults, "vision config")
  v = {**defaults, **_present(raw, defaults)}
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
    activation=v["hidden_act"],
    rope_theta=float(rope["rope_theta"]),
    window=v.get("window_size"),
    full_blocks=tuple(v.get("fullatt_block_indexes", ())),
    tokens_per_second=v.get("tokens_per_second"),
    position_side=_side(v.get("num_position_embeddings", 0)),
    deepstack=tuple(v.get("deepstack_visual_indexes", ())),
  )


def _text(raw: Mapping, tied: bool, family: str) -> TextConfig:
  defaults = _TEXT_DEFAULTS[family]
  t = {**defaults, **_present(raw, defaults)}
  rope = {"rope_theta": t["rope_theta"], **(_rope(raw))}
  _known("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope"))
  for field, only in _COMPUTED.items():
    _known(field, t.get(field, only), (only,))
  for kind in raw.get("layer_types") or ():
    _known("layer_types", kind, ("full_attention",))
  width, heads = t["hidden_size"], t["num_attention_heads"]
  if (head_width := t.get("head_dim")) is None:
    _divides("hidden_size", width, "num_attention_heads", heads)
    head_width = width // heads
  if "head_dim" not in defaults:
    _known("head_dim", raw.get("head_dim", head_width), (None, head_width))
  interleaved = family == "qwen3_vl"
  _known("mrope_interleaved", rope.get("mrope_interleaved", interleaved), (interleaved,))
  return TextConfig(
    layers=t["num_hidden_layers"],
    width=width,
    heads=heads,
    kv_heads=t["num_key_value_heads"] or heads,
    head_width=head_width,
    mlp_width=t["intermediate_size"],
    vocab_size=t["vocab_size"],
    activation=t["hidden_act"],
    norm_eps=float(t["rms_norm_eps"]),
    rope_theta=float(rope["rope_theta"]),
    mrope_section=_section(rope, family, head_width),
    interleaved=interleaved,
    qkv_bias=family == "qwen2_5_vl",
    qk_norm=family not in ("qwen2_5_vl", "llama"),
    tied=tied,
  )


def _section(rope: Mapping, family: str, head_width: int) -> tuple[int, int, int]:
  if family in _MROPE_DEFAULTS:
    return tuple(rope.get("mrope_section", _MROPE_DEFAULTS[family]))
  if "mrope_section" in rope:
    raise ValueError(f"config field mrope_section is not supported for model_type {family!r}")
  return (head_width // 2, 0, 0)


def _rope(raw: Mapping) -> Mapping:
  """The rotary table under either spelling; both together must not disagree."""
  old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
  if old and new and old != new:
    raise ValueError(f"rope_scaling {old} and rope_parameters {new} disagree: keep one of them")
  rope = new or old or {}
  known = {"type", "rope_type", "rope_theta", "mrope_section", "mrope_interleaved"}
  if rope.get("rope_type", rope.get("type", "default")) in ("default", "mrope"):
    _only(rope, known, "rope_parameters")
  return rope


def _only(raw: Mapping, read: Collection[str], where: str) -> None:
  if unknown := sorted(k for k in raw if k not in read and k not in _WITHOUT_EFFECT):
    raise ValueError(f"{where} has fields that this implementation does not know: {unknown}")


def _present(raw: Mapping, fields: Collection[str]) -> dict:
  return {name: raw[name] for name in fields if raw.get(name) is not None}


def _one(size, name: str) -> int:
  sizes = {size} if isinstance(size, int) else set(size)
  if len(sizes) != 1:
    raise ValueError(f"{name} {size} must be one number (square patches)")
  return sizes.pop()


def _side(positions: int) -> int:
  side = math.isqrt(positions)
  if side**2 != positions:
    raise ValueError(f"num_position_embeddings {positions} must be a square")
  return side


def _blocks(field: str, blocks: tuple[int, ...], depth: int) -> None:
  if bad := [i for i in blocks if not 0 <= i < depth]:
    raise ValueError(f"{field} {bad} must be in [0, {depth})")
  if sorted(set(blocks)) != list(blocks):
    raise ValueError(f"{field} {list(blocks)} must rise")


def _known(field: str, value, supported: tuple) -> None:
  if value not in supported:
    raise ValueError(f"config field {field} = {value!r} is not supported, only {supported}")


def _divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
  if value % divisor:
    raise ValueError(f"{name} {value} must be divisible by {divisor_name} {divisor}")
