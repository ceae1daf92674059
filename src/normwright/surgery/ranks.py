"""The processes of `torch.distributed` that an operation runs in together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """The processes of a group (None for all, False for this one alone); one alone agrees with itself."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, 0, 1
        if group is not False and dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise ValueError(
                    "A process recalibrates within a group that it belongs to, and this one is not in process_group; "
                    "call recalibrate on the group's processes only, or pass process_group=False."
                )

    def together(self, work: Callable[[], T], share: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """Do `work` in each process; its result here, and what all share of theirs, or raise in all of them."""
        if self.size == 1:
            result = work()
            return result, [share(result)]
        error: BaseException | None = None
        shared = result = None
        try:
            result = work()
            shared = share(result)
        except BaseException as raised:  # the others wait for this process, whatever happened here
            error = raised
        everyone: list[Any] = [None] * self.size
        told = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(everyone, (told, shared), group=self.group)
        if error is not None:
            raise error
        for rank, (told, _) in enumerate(everyone):
            if told is not None:
                raise RuntimeError(
                    f"Processes recalibrate together or not at all, and process {rank} raised "
                    f"{told.rstrip('.')}. Nothing was changed in any; mend that process's model or batches."
                )
        return result, [shared for _, shared in everyone]  # type: ignore[return-value]

    def agree(self, shared: list[Any], rule: str, why: str) -> None:
        """Raise, in every process, if one shares something else than process 0."""
        for rank, other in enumerate(shared):
            if other != shared[0]:
                raise ValueError(f"All processes {rule}, and process {rank} does not do as process 0: {why}.")
