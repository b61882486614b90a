"""How two stretches of a tensor differ, element by element."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size: what integers are compared as; torch compares few of the unsigned ones."""


@dataclass(slots=True)
class Tally:
    """Of all stretches of one tensor so far."""

    elements: int = 0
    unequal: int = 0
    """NaN is equal to NaN, and 0 to -0."""
    not_finite: int = 0
    """Of the unequal ones, those of which one is infinite or no number."""
    max_abs: float = 0.0
    sum_abs: float = 0.0
    is_measured: bool = True
    """Whether the elements are numbers of which a difference can be taken."""

    @property
    def mean_abs(self) -> float:
        """Over all elements but those that are not finite."""
        count = self.elements - self.not_finite
        return self.sum_abs / count if count else 0.0

    def add(self, one: bytearray, other: bytearray, dtypes: tuple[str, str]) -> None:
        """Two stretches of as many elements, not none; some float64 for each are in memory meanwhile."""
        first = torch.frombuffer(one, dtype=getattr(torch, dtypes[0]))
        second = torch.frombuffer(other, dtype=getattr(torch, dtypes[1]))
        self.elements += first.numel()
        if dtypes[0] == dtypes[1] and one == other:
            return
        if _is_opaque(first) or _is_opaque(second):
            self._add_opaque(first, second)
            return
        a, b = _wide(first), _wide(second)
        unequal = (a != b) & ~(a.isnan() & b.isnan())
        if dtypes[0] == dtypes[1] and not (first.is_floating_point() or first.is_complex()):
            exact = _SIGNED[first.element_size()]
            unequal = first.view(exact) != second.view(exact)
        finite = a.isfinite() & b.isfinite()
        distance = (a - b).abs()[unequal & finite]
        self.unequal += int(unequal.sum())
        self.not_finite += int((unequal & ~finite).sum())
        if distance.numel():
            self.max_abs = max(self.max_abs, float(distance.max()))
            self.sum_abs += float(distance.sum())

    def _add_opaque(self, first: torch.Tensor, second: torch.Tensor) -> None:
        self.is_measured = False
        if first.dtype != second.dtype:
            self.unequal += first.numel()
            return
        rows = (first.numel(), first.element_size())
        pair = [tensor.view(torch.uint8).view(rows) for tensor in (first, second)]
        self.unequal += int((pair[0] != pair[1]).any(dim=1).sum())


def _is_opaque(tensor: torch.Tensor) -> bool:
    """Whether its elements are no numbers, or several in one."""
    name = str(tensor.dtype)
    return ".bits" in name or name.endswith("_x2")


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
