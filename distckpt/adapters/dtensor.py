"""DTensor: everything that FSDP2 (`fully_shard`), tensor parallelism and HSDP make. No collectives, no full tensor.

Geometry is torch.chunk per mesh dimension in *execution order* (tensor parallelism first under FSDP2 + TP), not in
placement order: torch's own public offset function is wrong in some uneven cases. So whatever is computed here is
checked against the local tensor's shape, and refused where it differs.

The layout is said in ranks of the root mesh: a parameter that FSDP shards over `mesh["dp"]` lies alike on every rank
of the tensor-parallel dimension that its own mesh leaves out.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt import state
from distckpt.errors import Unsupported
from distckpt.format.box import Box
from distckpt.format.partition import Grid, Pieces, Split, chunk_of
from distckpt.state import GlobalTensor, Layout, Listed, check_material, dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.device_mesh import DeviceMesh

Order = list[list[int]]
"""For each tensor dimension the mesh dimensions that cut it, in execution order."""


def describe(tensor: DTensor, fqn: str) -> GlobalTensor:
    """Describe a DTensor as a global tensor, its shards views of the local memory.

    Unsupported, with the fqn, for a Partial placement, a subclass as local tensor, or a layout whose computed shard
    is not the local tensor's.
    """
    local = local_of(tensor)
    if type(local) is not torch.Tensor or local.layout is not torch.strided:
        raise Unsupported(
            f"{fqn}: a DTensor over {type(local).__qualname__} cannot be saved: its parts have no common geometry"
        )
    check_material(local, fqn)
    shape, dtype = tuple(tensor.shape), dtype_name(local, fqn)
    found = _geometry(tensor, local)
    if found is None and any(isinstance(p, Partial) for p in tensor.placements):
        raise Unsupported(
            f"{fqn}: placements {tensor.placements} hold a pending sum; redistribute to Shard or Replicate"
        )
    if found is None:
        raise Unsupported(
            f"{fqn}: cannot tell which part of shape {shape} with placements {tensor.placements} on mesh "
            f"{tuple(tensor.device_mesh.shape)} the local tensor of shape {tuple(local.shape)} is"
        )
    layout, boxes = found
    return GlobalTensor(shape, dtype, layout, tuple([state.Shard(box, _view(local, inside)) for box, inside in boxes]))


def like(template: DTensor, shape: Sequence[int], dtype: torch.dtype) -> DTensor:
    """Return an uninitialised DTensor: laid out like `template` where the shape is its own, else replicated."""
    if tuple(shape) == tuple(template.shape):
        return torch.empty_like(template, dtype=dtype)  # type: ignore[return-value]
    local = torch.empty(tuple(shape), dtype=dtype, device=local_of(template).device)
    return DTensor.from_local(local, template.device_mesh, [Replicate()] * template.device_mesh.ndim, run_check=False)


def with_local(template: DTensor, local: torch.Tensor) -> DTensor:
    """Return a DTensor over this local tensor, laid out like `template`."""
    return DTensor.from_local(
        local,
        template.device_mesh,
        template.placements,
        run_check=False,
        shape=template.shape,
        stride=template.stride(),
    )


def reshard(module: Any) -> None:
    """Have a module of FSDP2 hold only its shards, as it does between steps anyway."""
    if isinstance(module, FSDPModule):
        module.reshard()


def local_of(tensor: DTensor) -> torch.Tensor:
    """Return this rank's memory of a DTensor: `to_local()` without a trip through autograd."""
    local: torch.Tensor = private(tensor, "_local_tensor")
    return local.detach()


def private(owner: Any, name: str) -> Any:
    """Private attribute of torch's, guarded: they were checked at torch 2.13."""
    try:
        return getattr(owner, name)
    except AttributeError as e:
        raise Unsupported(
            f"torch {torch.__version__}: {type(owner).__name__} has no {name}; this adapter knows torch 2.13"
        ) from e


Runs = list[list[tuple[int, int]]]
"""For each tensor dimension the [(start, size), ...] that a rank holds of it."""

Geometry = tuple[Layout | Listed, list[tuple[Box, Box]]]
"""A layout, and what this rank holds: boxes of the global tensor, and the same boxes of the local one."""

_known: WeakKeyDictionary[DeviceMesh, dict[Any, Geometry | None]] = WeakKeyDictionary()
"""What was worked out for each mesh: the tensors of a model are many, their geometries few."""


def _geometry(tensor: DTensor, local: torch.Tensor) -> Geometry | None:
    """Geometry of a DTensor, None where there is none, or no way to compute it gives the local tensor's shape."""
    mesh, spec = tensor.device_mesh, private(tensor, "_spec")
    at = mesh.get_coordinate()
    key = (spec.placements, private(spec, "shard_order"), tensor.shape, local.shape, None if at is None else (*at,))
    known = _known.get(mesh)
    if known is None:
        known = _known[mesh] = {}
    if key not in known:
        known[key] = _work_out(tensor, mesh, local)
    return known[key]


def _work_out(tensor: DTensor, mesh: DeviceMesh, local: torch.Tensor) -> Geometry | None:
    if any(isinstance(p, Partial) for p in tensor.placements):
        return None
    for layout, runs in _candidates(tensor, mesh):
        if runs is None:
            return layout, []  # this rank is not in the mesh: it holds nothing
        if [sum(size for _, size in of_dim) for of_dim in runs] == list(local.shape):
            return layout, list(_held(runs))
    return None


def _candidates(tensor: DTensor, mesh: DeviceMesh) -> Iterator[tuple[Layout | Listed, Runs | None]]:
    """Yield (layout, what this rank holds) by execution order, then by placements left to right.

    None: the rank is not in the mesh.
    """
    coordinate = mesh.get_coordinate()
    order = _execution_order(tensor, mesh)
    if order is not None:
        mine: Runs | None = None
        if coordinate is not None:
            mine = [[_in_order(n, dims, mesh, coordinate)] for n, dims in zip(tensor.shape, order, strict=True)]
        yield _layout(tensor, mesh, order), mine
    if order is None or any(isinstance(p, _StridedShard) for p in tensor.placements):
        yield _listed(tensor, mesh), None if coordinate is None else _left_to_right(tensor, coordinate)


def _execution_order(tensor: DTensor, mesh: DeviceMesh) -> Order | None:
    spec = private(tensor, "_spec")
    order = private(spec, "shard_order")
    if order is None:
        order = private(spec, "_maybe_convert_StridedShard_to_shard_order")(spec.placements, mesh)
    if order is None:
        return None
    by_dim = {entry.tensor_dim: list(entry.mesh_dims) for entry in order}
    return [by_dim.get(d, []) for d in range(tensor.ndim)]


def _in_order(size: int, mesh_dims: list[int], mesh: DeviceMesh, coordinate: Sequence[int]) -> tuple[int, int]:
    start = 0
    for d in mesh_dims:
        start, size = chunk_of(start, size, int(mesh.shape[d]), coordinate[d])
    return start, size


def _layout(tensor: DTensor, mesh: DeviceMesh, order: Order) -> Layout | Listed:
    steps = _affine(mesh.mesh)
    if steps is None:
        return _listed(tensor, mesh)
    first, own = steps
    replicated = [own[d] for d, p in enumerate(tensor.placements) if isinstance(p, Replicate)]
    root = _affine(private(mesh, "_get_root_mesh")().mesh)
    left_out = _left_out(root[1], own) if root else None
    if root and left_out is not None:
        first = root[0]
        replicated += left_out
    grid = Grid(tuple(tensor.shape), tuple(tuple(own[d] for d in dims) for dims in order), first)
    return Layout(grid, tuple(s for s in replicated if s.count > 1))


def _affine(ranks: torch.Tensor) -> tuple[int, list[Split]] | None:
    """(first rank, rank stride of each dimension) of a mesh, None where its ranks are in no such order."""
    first = int(ranks.flatten()[0])
    splits = []
    expected = torch.full_like(ranks, first)
    for d, count in enumerate(ranks.shape):
        line = ranks[(0,) * d + (slice(None),) + (0,) * (ranks.ndim - d - 1)]
        stride = int(line[1] - line[0]) if count > 1 else 0
        if stride < 0:
            return None
        splits.append(Split(count, stride))
        steps = torch.arange(count, dtype=ranks.dtype) * stride
        expected = expected + steps.view([-1 if i == d else 1 for i in range(ranks.ndim)])
    return (first, splits) if torch.equal(expected, ranks) else None


def _left_out(root: list[Split], own: list[Split]) -> list[Split] | None:
    """Dimensions of the root mesh that a mesh cut from it leaves out; a flattened one uses up several."""
    rest = sorted((s for s in root if s.count > 1), key=lambda s: s.stride)
    for split in own:
        count, stride = split.count, split.stride
        while count > 1:
            used = next((s for s in rest if s.stride == stride and count % s.count == 0), None)
            if used is None:
                return None
            rest.remove(used)
            count, stride = count // used.count, stride * used.count
    return rest


def _listed(tensor: DTensor, mesh: DeviceMesh) -> Listed:
    """Every region of every rank of the mesh, each region once: for meshes and placements in no regular order."""
    order = _execution_order(tensor, mesh)
    pieces = []
    for coordinate in itertools.product(*(range(n) for n in mesh.shape)):
        if any(c for c, p in zip(coordinate, tensor.placements, strict=True) if isinstance(p, Replicate)):
            continue
        rank = int(mesh.mesh[coordinate])
        if order is not None and not any(isinstance(p, _StridedShard) for p in tensor.placements):
            per_dim = [[_in_order(n, d, mesh, coordinate)] for n, d in zip(tensor.shape, order, strict=True)]
        else:
            per_dim = _left_to_right(tensor, coordinate)
        pieces += [(rank, box) for box in _boxes(per_dim) if box.numel]
    return Listed(Pieces(tuple(tensor.shape), tuple(pieces)))


def _left_to_right(tensor: DTensor, coordinate: Sequence[int]) -> Runs:
    """Runs [(start, size), ...] of each dimension, when mesh dimensions cut index lists in the placements' order."""
    indices: list[Sequence[int]] = [range(n) for n in tensor.shape]
    for d, placement in enumerate(tensor.placements):
        count, index = int(tensor.device_mesh.shape[d]), coordinate[d]
        if isinstance(placement, _StridedShard):
            held, blocks = indices[placement.dim], int(placement.split_factor)
            cut: list[int] = []
            for b in range(blocks):
                start, size = chunk_of(0, len(held), blocks, b)
                low, n = chunk_of(start, size, count, index)
                cut += held[low : low + n]
            indices[placement.dim] = cut
        elif isinstance(placement, Shard):
            low, n = chunk_of(0, len(indices[placement.dim]), count, index)
            indices[placement.dim] = indices[placement.dim][low : low + n]
    return [_runs(held) for held in indices]


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for i in indices:
        if runs and i == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((i, 1))
    return runs or [(0, 0)]


def _boxes(per_dim: Runs) -> Iterator[Box]:
    for combination in itertools.product(*per_dim):
        yield Box(tuple(start for start, _ in combination), tuple(size for _, size in combination))


def _held(per_dim: Runs) -> Iterator[tuple[Box, Box]]:
    """Yield each box held and its place in the local tensor: the runs of a dimension lie one after another."""
    for combination in itertools.product(*(list(enumerate(runs)) for runs in per_dim)):
        sizes = tuple(size for _, (_, size) in combination)
        local = tuple(sum(n for _, n in per_dim[d][:i]) for d, (i, _) in enumerate(combination))
        yield Box(tuple(start for _, (start, _) in combination), sizes), Box(local, sizes)


def _view(local: torch.Tensor, box: Box) -> torch.Tensor:
    if box.sizes == local.shape:
        return local
    for d, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        local = local.narrow(d, start, size)
    return local
