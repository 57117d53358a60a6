"""Where this rank's float32 master weights lie: flat tensors, and which piece of which parameter each stretch is.

Everything that must not depend on the number of ranks or the ZeRO stage (EMA, checkpoints, exports) is written against
`Shards`: a list of flat tensors and a map from stretches of them to named parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Elements gathered in one collective: large enough to use the network, small beside a model.
BUCKET = 1 << 26


@dataclass(frozen=True)
class Segment:
    """Elements [start, start + length) of parameter `name` lie in flat tensor `shard` from `offset` on."""

    name: str
    start: int
    length: int
    shard: int
    offset: int


class Shards(Protocol):
    """This rank's part of the master weights.

    Attributes:
        masters: flat float32 tensors that the optimizer updates, in the order of its states.
        segments: what lies in them; padding belongs to no segment.
        replicated: every rank holds everything.
        shapes: full shapes of all trained parameters, in the module's order.
    """

    masters: list[Tensor]
    segments: list[Segment]
    replicated: bool
    shapes: dict[str, tuple[int, ...]]

    def optimizer_keys(self) -> list[Tensor]:
        """The optimizer's parameters, one for each of `masters`."""
        ...

    def gradients(self) -> Iterable[Tensor]:
        """Gradients that await the next step, averaged over ranks; those of this rank's masters only."""
        ...

    def publish(self) -> None:
        """Carry masters that were written from outside into the module's weights, on all ranks."""
        ...


class PlainShards:
    """Parameters held whole by every rank: one process, DDP, ZeRO stage 0."""

    replicated = True

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shapes = {n: tuple(p.shape) for n, p in self._parameters.items()}
        self.masters = [p.detach().view(-1) for p in self._parameters.values()]
        self.segments = [Segment(n, 0, p.numel(), i, 0) for i, (n, p) in enumerate(self._parameters.items())]

    def optimizer_keys(self) -> list[Tensor]:
        """The module's parameters."""
        return list(self._parameters.values())

    def gradients(self) -> Iterable[Tensor]:
        """Gradients of the parameters that took part."""
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    def publish(self) -> None:
        """The masters are the weights."""


class ZeroShards:
    """ZeRO stages 1 and 2: each parameter group is one flat buffer, cut into equal partitions."""

    replicated = False

    def __init__(self, zero_optimizer: Any, names: dict[int, str], rank: int) -> None:
        self._zero = zero_optimizer
        self.masters = [flat.detach() for flat in zero_optimizer.single_partition_of_fp32_groups]
        self.shapes, self.segments = {}, []
        for shard, parameters in enumerate(zero_optimizer.round_robin_bit16_groups):
            # Parameters sit back to back in the flat buffer; their own storage says where.
            flat = zero_optimizer.bit16_groups_flat[shard]
            size = self.masters[shard].numel()
            for parameter in parameters:
                name = names[id(parameter)]
                self.shapes[name] = tuple(parameter.shape)
                begin = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
                overlap = _overlap(begin, parameter.numel(), rank * size, size)
                if overlap is not None:
                    start, length = overlap
                    self.segments.append(Segment(name, start - begin, length, shard, start - rank * size))

    def optimizer_keys(self) -> list[Tensor]:
        """The flat partitions."""
        return list(self._zero.single_partition_of_fp32_groups)

    def gradients(self) -> Iterable[Tensor]:
        """Averaged gradients of this rank's partitions, as DeepSpeed keeps them between backward and step."""
        return [g for group in self._zero.averaged_gradients.values() if group is not None for g in group]

    def publish(self) -> None:
        """Masters to (possibly bfloat16) partitions, partitions to all ranks."""
        self._zero.update_lp_params()


class Zero3Shards:
    """ZeRO stage 3: each parameter is cut into equal parts, one a rank, the last one padded."""

    replicated = False

    def __init__(self, zero_optimizer: Any, names: dict[int, str], rank: int) -> None:
        self._zero = zero_optimizer
        self.masters = [flat.detach() for flat in zero_optimizer.fp32_partitioned_groups_flat]
        self.shapes, self.segments = {}, []
        for shard, parameters in enumerate(zero_optimizer.fp16_groups):
            offset = 0
            for parameter in parameters:
                name, size = names[id(parameter)], parameter.partition_numel()
                self.shapes[name] = tuple(parameter.ds_shape)
                overlap = _overlap(0, parameter.ds_numel, rank * size, size)
                if overlap is not None:
                    self.segments.append(Segment(name, overlap[0], overlap[1], shard, offset))
                offset += size

    def optimizer_keys(self) -> list[Tensor]:
        """The flat partitions, one for each sub-group."""
        return list(self._zero.fp32_partitioned_groups_flat)

    def gradients(self) -> Iterable[Tensor]:
        """Averaged gradients of this rank's partitions."""
        return [g for group in self._zero.averaged_gradients.values() if group is not None for g in group]

    @torch.no_grad()
    def publish(self) -> None:
        """Masters to the partitions that the forward pass gathers."""
        persistent = self._zero.persistent_parameters
        if len(persistent) > 0:
            # Small parameters stay gathered: give them back, so that the new partitions are what is gathered next.
            persistent[0].partition(persistent)
        for shard, parameters in enumerate(self._zero.fp16_groups):
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                parameter.ds_tensor.data.copy_(self.masters[shard].narrow(0, offset, size))
                offset += size
        if len(persistent) > 0:
            persistent[0].all_gather(persistent)


def gather(shards: Shards, flats: Sequence[Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Full float32 tensors by parameter name, on the CPU, from flat tensors laid out as `shards.masters`.

    Collective. Each rank writes its segments into zeros, and a sum over ranks makes the whole, bucket by bucket, so
    that no device ever holds more than one bucket beside the model.

    Args:
        shards: the layout.
        flats: one for each of `shards.masters`.
        keep: False on ranks that only take part.
    """
    by_name: dict[str, list[Segment]] = {}
    for segment in shards.segments:
        by_name.setdefault(segment.name, []).append(segment)
    found: dict[str, Tensor] = {}
    for names in _buckets(shards.shapes):
        starts, total = {}, 0
        for name in names:
            starts[name] = total
            total += prod(shards.shapes[name])
        bucket = torch.zeros(total, dtype=torch.float32, device=flats[0].device)
        for name in names:
            for s in by_name.get(name, ()):
                begin = starts[name] + s.start
                bucket[begin : begin + s.length] = flats[s.shard][s.offset : s.offset + s.length]
        if not shards.replicated and dist.get_world_size() > 1:
            dist.all_reduce(bucket)
        if keep:
            host = bucket.cpu()
            for name in names:
                shape = shards.shapes[name]
                found[name] = host[starts[name] : starts[name] + prod(shape)].view(shape).clone()
    return found


def _buckets(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """Parameter names in runs of at most `BUCKET` elements (a larger parameter is a run of its own)."""
    runs: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        if not runs or prod(shape) > room:
            runs.append([])
            room = BUCKET
        runs[-1].append(name)
        room -= prod(shape)
    return runs


def _overlap(begin: int, length: int, window: int, size: int) -> tuple[int, int] | None:
    """(start, length) of what [begin, begin + length) has in common with [window, window + size)."""
    start, end = max(begin, window), min(begin + length, window + size)
    return (start, end - start) if end > start else None
