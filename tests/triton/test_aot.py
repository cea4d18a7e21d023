"""Every shipped configuration compiles for three generations of GPUs without spilling, on a machine without any."""

from __future__ import annotations

import pytest

from errseg.testing import aot

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows() -> list[aot.Compiled]:
    return aot.check()


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("op", aot.kernel_ops())
def test_compiles_without_spills(rows: list[aot.Compiled], op: str, arch: int) -> None:
    ours = [row for row in rows if (row.op, row.arch) == (op, arch)]
    assert ours
    spilled = [row for row in ours if row.spilled]
    assert not spilled, aot.table(spilled)


@pytest.mark.parametrize(("arch", "matrix"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_votes_run_on_tensor_cores(rows: list[aot.Compiled], arch: int, matrix: str) -> None:
    for config in ("fwd float32", "fwd bfloat16", "fwd float16"):
        found = [row for row in rows if (row.op, row.config, row.arch) == ("class_votes", config, arch)]
        assert [row.matrix for row in found] == [matrix]


def test_a_spill_is_seen() -> None:
    row = aot.Compiled("op", "fwd", 90, 255, 8, 2, 0, 4, "-", 0)
    assert row.spilled and "255" in aot.table([row]) and "sm_90" in aot.table([row])
