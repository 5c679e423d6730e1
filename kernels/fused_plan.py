"""What an activation and a residual add to a plan: what else its sweeps read, and what they move. Pure
Python, as plan.py."""

from __future__ import annotations

from dataclasses import dataclass

from .views import packs


@dataclass(frozen=True)
class After:
    """What follows a normalization in training: act(norm(x) + z). signs: whether the backward has a bit for
    each element to go by, rather than z."""

    activation: str = "none"
    residual: bool = False
    signs: bool = False

    @property
    def kept(self) -> str:
        """What the backward reads of the residual: "z", "signs" or, as without an activation, "" (dz is
        dy)."""
        if not self.residual or self.activation == "none":
            return ""
        return "signs" if self.signs else "z"

    @property
    def activation_of_dx(self) -> str:
        """Whose slope the last sweep of a backward takes: with a residual it reads dz, which has it."""
        return "none" if self.kept else self.activation

    def forward_bytes(self, elements: int, itemsize: int) -> int:
        """z read, and the signs written."""
        return self.residual * elements * itemsize + self._signs_bytes(elements)

    def backward_bytes(self, elements: int, itemsize: int) -> int:
        """z or the signs read, and dz written; dz is then read in dy's place."""
        each = elements * itemsize
        return {"": 0, "z": 2 * each, "signs": each}[self.kept] + self._signs_bytes(elements)

    def _signs_bytes(self, elements: int) -> int:
        return elements // 8 if self.kept == "signs" else 0


NOTHING = After()


def after(activation: str, residual: bool, c: int, s: int, itemsize: int, channels_last: bool) -> After:
    """With signs, where relu's backward has them. activation: its name, or "none"; the rest as in
    plan.batch_norm."""
    packed = residual and activation == "relu" and packs(c, s, itemsize, channels_last)
    return After(activation, residual, packed)
