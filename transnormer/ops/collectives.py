"""What ops say to other processes."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch.distributed as dist

# Their names since torch 2.13, and before.
all_gather = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)
reduce_scatter = (
    dist.reduce_scatter_single
    if hasattr(dist, "reduce_scatter_single")
    else dist.reduce_scatter_tensor
)
# An op cannot take a process group as an argument. A group that is destroyed is forgotten.
_groups: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()


def name_of(group: dist.ProcessGroup) -> str:
    """A name by which ops find the group again (`group_of`)."""
    _groups[group.group_name] = group
    return str(group.group_name)


def group_of(name: str) -> dist.ProcessGroup:
    """The process group that `name_of` named. Raises KeyError where it was destroyed."""
    return _groups[name]
