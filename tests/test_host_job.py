"""The job that times the host: what it measures, without measuring. See tests/static/test_host_time.py."""

from __future__ import annotations

import pytest

from benchmarks import host


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_both_sides_compute_the_same(path: str) -> None:
    found = host.calls()
    assert len(found) == 8
    for (name, mode), (ours, theirs) in found.items():
        y, expected = ours(), theirs()
        assert (y - expected).abs().max() < 1e-5, name
        assert y.requires_grad == expected.requires_grad == (mode == "with gradient")
