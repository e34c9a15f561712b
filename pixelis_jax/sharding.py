"""Where arrays live: one mesh (data, fsdp, tensor), one table from logical axes to mesh axes.

The same code serves one CPU, one GPU, a GPU cluster and a TPU pod; GSPMD inserts the collectives.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axis -> mesh axes. `fsdp` splits weights that are gathered when used; `tensor` splits the
# work itself (heads, mlp, vocabulary), Megatron style: https://arxiv.org/abs/1909.08053 sec. 3.
RULES: Rules = {
  "batch": ("data", "fsdp"),
  "layers": None,  # The scanned axis: every device runs every layer.
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",
  "patch": None,  # The values of one patch, 1176: the tower's input, small.
}


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh with `AxisType.Auto` axes; `data=-1` takes every device the other two leave.

  One process may use fewer devices than it has (the first ones). Several processes must use all:
  a process without a device in the mesh would wait for ever.

  Raises:
    ValueError: the sizes do not fit the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
    raise ValueError(
      f"mesh data={data} fsdp={fsdp} tensor={tensor}: sizes must be positive (data may be -1)"
    )
  if data == -1:
    data = max(len(devices) // (fsdp * tensor), 1)
  need = data * fsdp * tensor
  if need > len(devices) or (need < len(devices) and jax.process_count() > 1):
    raise ValueError(
      f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {need} devices; "
      f"{jax.process_count()} process(es) have {len(devices)}"
    )
  return jax.make_mesh(
    (data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:need]
  )


def spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
  """The partition of an array whose dimensions are these logical axes; None is not split."""
  unknown = [name for name in axes if name is not None and name not in rules]
  if unknown:
    raise ValueError(f"logical axes {unknown} have no rule; known are {sorted(rules)}")
  return PartitionSpec(*(None if name is None else rules[name] for name in axes))


def shardings(axes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
  """A tree of `NamedSharding` for `axes`, a tree whose leaves are tuples of logical axis names."""
  return jax.tree.map(
    lambda names: NamedSharding(mesh, spec(names, rules)),
    axes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over `data` and `fsdp`; later dimensions whole. Rows must divide by `rows_multiple`."""
  return NamedSharding(mesh, spec(("batch",)))


def rows_multiple(mesh: Mesh) -> int:
  """The number a batch's rows must be a multiple of."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())
