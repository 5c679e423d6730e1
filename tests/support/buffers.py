"""Buffers that give a kernel away: poisoned allocations, guarded tensors, comparison by bits."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

GUARD = 256  # bytes on either side; a multiple of every alignment a kernel is specialised on
POISON_BYTE = 0x7F  # large positive integers; floating tensors get NaN

# A guard repeats one of these 16-bit words. Each is NaN in every floating type, so that a stray read shows in
# the results. Buffers take turns, or an overrun that copies one guard onto another would go unseen.
GUARD_WORDS = itertools.cycle(range(-16, 0))

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor, in place, with what no kernel should return."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(int.from_bytes([POISON_BYTE] * tensor.element_size(), "little"))


@contextlib.contextmanager
def nan_filled_allocations() -> Iterator[None]:
    """Poison the uninitialised memory that Python code allocates: what is never written is then seen."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: object, **options: object) -> torch.Tensor:
            with torch.no_grad():
                return poison(allocate(*args, **options))

        return allocate_poisoned

    with contextlib.ExitStack() as stack:
        for owner, name in ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


@dataclass(frozen=True)
class Guarded:
    """`tensor` lies in the middle of `buffer`, a byte tensor with `before` and `after` at its ends."""

    tensor: torch.Tensor
    buffer: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor

    def intact(self) -> bool:
        """Whether nobody wrote to the guards."""
        ends = self.buffer[: len(self.before)], self.buffer[-len(self.after) :]
        return torch.equal(ends[0], self.before) and torch.equal(ends[1], self.after)


def guarded(tensor: torch.Tensor) -> Guarded:
    """A copy of a tensor, same strides, as far past a 16-byte boundary, with guard bytes around it."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = span * tensor.element_size() if tensor.numel() else 0
    start = GUARD + tensor.data_ptr() % 16
    words = torch.full(((start + GUARD) // 2,), next(GUARD_WORDS), dtype=torch.int16, device=tensor.device)
    before, after = words.view(torch.uint8).split((start, GUARD))
    buffer = torch.cat((before, torch.zeros(size, dtype=torch.uint8, device=tensor.device), after))
    inner = buffer[start : start + size].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    inner.copy_(tensor.detach())
    return Guarded(inner, buffer, before, after)


def shifted(t: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy of a tensor, same strides, so many elements past the start of its storage."""
    storage = t.new_zeros(t.numel() + elements)
    return storage.as_strided(t.shape, t.stride(), elements).copy_(t)


def bit_identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in shape, type and every bit: NaN equals itself, and -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = (t.detach().clone(memory_format=torch.contiguous_format).reshape(-1) for t in (a, b))
    return torch.equal(*(t.view(torch.uint8) for t in flat))


def assert_same_bits(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str = ""
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert bit_identical(found[name], value), f"{name} {where}"
