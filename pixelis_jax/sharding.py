"""Where arrays live: one mesh (data, fsdp, tensor), one table from logical axes to mesh axes.

The same code serves one CPU, one GPU, a GPU cluster and a TPU pod; GSPMD inserts the collectives.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

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
  """A mesh with `AxisType.Auto` axes; a size of -1 takes every device that the others leave.

  One process may use fewer devices than it has (the first ones). Several processes must use all:
  a process without a device in the mesh would wait for ever.

  Raises:
    ValueError: the sizes do not fit the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  data, fsdp, tensor = _filled((data, fsdp, tensor), len(devices))
  need = data * fsdp * tensor
  if need > len(devices) or (need < len(devices) and jax.process_count() > 1):
    raise ValueError(
      f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {need} devices; "
      f"{jax.process_count()} process(es) have {len(devices)}"
    )
  shape, axis_types = (data, fsdp, tensor), (AxisType.Auto,) * 3
  hosts = [device.process_index for device in devices[:need]]
  if len(set(hosts)) == 1:
    return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices[:need])
  # Host by host: what is split within a row stays in one process, and each row is one process's.
  _check_hosts(tensor, hosts)
  ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
  return Mesh(np.array(ordered).reshape(shape), MESH_AXES, axis_types=axis_types)


def _check_hosts(tensor: int, hosts: Sequence[int]) -> None:
  """The process of each device: ValueError where a row would belong to several."""
  mine = hosts.count(hosts[0])
  if mine < len(hosts) and mine % tensor:
    raise ValueError(f"mesh tensor={tensor} must divide the {mine} devices of a process")


def _filled(sizes: tuple[int, int, int], devices: int) -> tuple[int, ...]:
  """The sizes, with what the others leave in place of -1."""
  given = [size for size in sizes if size != -1]
  if len(given) < 2 or min(given) < 1:
    named = " ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    raise ValueError(f"mesh {named}: sizes must be positive (one may be -1)")
  rest = max(devices // math.prod(given), 1)
  return tuple(rest if size == -1 else size for size in sizes)


def relaid(mesh: Mesh, data: int, fsdp: int, tensor: int) -> Mesh:
  """The devices of a mesh, in their order, under other axis sizes; `data` 0 leaves it as it is.

  Between the two arrays move on the devices. Raises ValueError for sizes that do not fit.
  """
  if data == 0:
    return mesh
  shape = _filled((data, fsdp, tensor), mesh.size)
  if math.prod(shape) != mesh.size:
    raise ValueError(f"mesh {shape} must have the {mesh.size} devices of {dict(mesh.shape)}")
  _check_hosts(tensor, [device.process_index for device in mesh.devices.flat])
  return Mesh(mesh.devices.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@functools.cache
def caster(
  dtypes: tuple[Any, ...], places: tuple[Any, ...]
) -> Callable[[Sequence[Array]], list[Array]]:
  """Arrays -> the same in these dtypes and places, on the devices that they lie on."""
  cast = lambda arrays: [x.astype(dtype) for x, dtype in zip(arrays, dtypes, strict=True)]
  return jax.jit(cast, out_shardings=list(places))


class Carrier:
  """Copies weights to other devices, each part straight from a device that holds it.

  What is cut in other parts there is cut so here first, by the devices that it comes from: neither
  the host nor a program of those it goes to, which may be busy, has to do with it. (`device_put`
  alone takes what is cut in another way through the host.)
  """

  def __init__(self, places: Any, mesh: Mesh, change: Callable[[Any], Any] = lambda tree: tree):
    """Args:
    places: A tree of `NamedSharding` on one mesh: where the weights go.
    mesh: The devices that they come from.
    change: What is done with them first, jitted.

    Raises ValueError as `bridge` does.
    """
    cut = bridge(mesh, jax.tree.leaves(places)[0].mesh)
    here = cut and jax.tree.map(lambda place: NamedSharding(cut, place.spec), places)
    self.cut = jax.jit(change, out_shardings=here)
    self._places = places

  def __call__(self, tree: Any) -> Any:
    return jax.device_put(self.cut(tree), self._places)


def bridge(mesh: Mesh, there: Mesh) -> Mesh | None:
  """The devices of a mesh under sizes by which weights lie on them in the parts that another has.

  None for one device, of which any part can be taken. ValueError where they cannot hold such parts,
  each as many.
  """
  if mesh.size == 1:
    return None
  fsdp, tensor = there.shape["fsdp"], there.shape["tensor"]
  if mesh.size % (fsdp * tensor):
    raise ValueError(
      f"mesh {dict(there.shape)} is to get weights in {fsdp * tensor} parts: the {mesh.size} "
      f"devices of {dict(mesh.shape)} that they come from must be 1 or a multiple of that"
    )
  return relaid(mesh, -1, fsdp, tensor)


def spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
  """The partition of an array whose dimensions are these logical axes; None is not split."""
  unknown = [name for name in axes if name is not None and name not in rules]
  if unknown:
    raise ValueError(f"logical axes {unknown} have no rule; known are {sorted(rules)}")
  return PartitionSpec(*(None if name is None else rules[name] for name in axes))


def parts(axis: str, mesh: Mesh | None) -> int:
  """In how many parts a logical axis is split; 1 without a mesh."""
  if mesh is None:
    return 1
  named = RULES[axis] or ()
  return math.prod(mesh.shape[name] for name in ((named,) if isinstance(named, str) else named))


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
  """A tree of `NamedSharding` for weights of these shapes.

  A dimension that does not divide into its parts stays whole: the gated MLPs of Qwen2.5-VL's tower
  are 3,420 wide, which no tensor axis of 8 splits. What is not split is not named: so programs
  return weights, and one that gets its own results back is not compiled for another partition.

  Args:
    axes: a tree whose leaves are tuples of logical axis names.
    shapes: the same with arrays, or what has their `shape`, as leaves.
  """

  def place(names: tuple[str | None, ...], array: Any) -> NamedSharding:
    split = list(spec(names))
    for at, (name, size) in enumerate(zip(names, array.shape, strict=True)):
      count = 1 if name is None else parts(name, mesh)
      if count == 1 or size % count:
        split[at] = None
    while split and split[-1] is None:
      split.pop()
    return NamedSharding(mesh, PartitionSpec(*split))

  return jax.tree.map(place, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))


def whole(axes: Sequence[str | None], array: Any, mesh: Mesh) -> NamedSharding:
  """`shardings` of one weight where it is used: not split over `fsdp`."""
  used = [None if name is not None and RULES[name] == "fsdp" else name for name in axes]
  return shardings(tuple(used), array, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over `data` and `fsdp`; later dimensions whole. Rows must divide by `row_blocks`."""
  return NamedSharding(mesh, spec(("batch",)))


def put_rows(tree: Any, mesh: Mesh | None) -> Any:
  """A batch's host arrays on the devices that its rows belong to; as they are without a mesh.

  Each process gives its own rows, those of `own_blocks`; all give as many.
  """
  if mesh is None:
    return tree
  place = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(tree, place)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, np.asarray(x)), tree)


def own_rows(x: Array) -> Shaped[np.ndarray, "rows ..."]:
  """This process's rows of an array that lies as `put_rows` puts it."""
  if x.is_fully_addressable:
    return np.asarray(x)
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def own_blocks(mesh: Mesh | None) -> int:
  """How many of the blocks of `row_blocks` are this process's."""
  return row_blocks(mesh) // jax.process_count()


def row_blocks(mesh: Mesh | None) -> int:
  """The number of equal blocks a batch's rows lie in, each on devices of its own; 1 without a mesh.

  What a row refers to, the features of its images say, lies in its own block.
  """
  return parts("batch", mesh)


def constrain(x: Array, axes: Sequence[str | None], mesh: Mesh | None) -> Array:
  """x, held in a jitted function to the partition of these logical axes; x where nothing is split.

  Without it the partitioner may follow a weight's layout, and split the width of activations over
  the devices that should each have rows of their own.
  """
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes)))


def local(
  function: Callable[..., Array],
  inputs: Sequence[Sequence[str | None]],
  output: Sequence[str | None],
  mesh: Mesh | None,
  *,
  rows_only: bool = False,
) -> Callable[..., Any]:
  """The function, run by each device on its own parts of inputs with these logical axes.

  For what needs nobody else's part, and what the partitioner cannot look into: kernels, and loops
  whose length depends on the data. `output` is of the result, or of each of several.

  Args:
    rows_only: Only "batch" is split here, and may be named; along `tensor` the partitioner goes on.
      A gradient of what all rows share is then summed over them once, behind the function.
  """
  if mesh is None or (row_blocks(mesh) if rows_only else mesh.size) == 1:
    return function
  inside = tuple(spec(axes) for axes in inputs)
  manual = {name for name in RULES["batch"] or ()} if rows_only else set(MESH_AXES)
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=inside,
    out_specs=spec(output),
    axis_names=manual,
    check_vma=False,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())
