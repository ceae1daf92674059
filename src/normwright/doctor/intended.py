"""Saying that what a check finds is meant: `nw.intended("NW203", why)`."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["intended"]

_Marked = TypeVar("_Marked", bound="nn.Module | type[nn.Module]")


class intended:
    """Mark a module, or every module of a class, as meant to be what a check calls a fault.

    The doctor then keeps the finding, at this module or below it, out of `report.findings`, and lists it with the
    reason in `report.intended`. The mark is an attribute and changes nothing else: no state_dict key, no output.

    Arguments:
        code: the check's, such as `"NW203"`.
        why: the reason, one sentence; shown in the report.

    Errors: `ValueError` for no reason; `TypeError` for anything but a module or a module class.

    Example:
        >>> import torch, normwright as nw
        >>> norm = nw.intended("NW203", "style transfer: one image is the batch")(torch.nn.BatchNorm2d(8))
        >>> @nw.intended("NW203", "style transfer: one image is the batch")
        ... class Style(torch.nn.Module): ...
    """

    def __init__(self, code: str, why: str) -> None:
        if not isinstance(why, str) or not why.strip():
            raise ValueError(f"A mark says why {code} is meant, in a sentence; got {why!r}.")
        self.code, self.why = code, why

    def __call__(self, marked: _Marked) -> _Marked:
        if not isinstance(marked, nn.Module) and not (isinstance(marked, type) and issubclass(marked, nn.Module)):
            raise TypeError(f"A mark is put on a module or a module class; got {type(marked).__name__}.")
        # a new dict each time, so that a mark on an object does not reach its class
        marked.nw_intended = {**getattr(marked, "nw_intended", {}), self.code: self.why}  # type: ignore[union-attr]
        return marked
