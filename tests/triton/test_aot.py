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


@pytest.mark.parametrize(("arch", "matrix"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_costs_run_on_tensor_cores(rows: list[aot.Compiled], arch: int, matrix: str) -> None:
    found = [row for row in rows if (row.op, row.arch) == ("cost_volume", arch) and "float64" not in row.config]
    products = [row for row in found if not row.config.startswith(("bwd sum", "bwd order"))]
    assert len(products) == 21 and {row.matrix for row in products} == {matrix}


@pytest.mark.parametrize(("arch", "matrix"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_the_gated_mlp_runs_on_tensor_cores(rows: list[aot.Compiled], arch: int, matrix: str) -> None:
    found = [row for row in rows if (row.op, row.arch) == ("gated_mlp", arch) and "float64" not in row.config]
    split = [row for row in found if "float32 256" in row.config]  # blocks of 32 tokens
    assert len(found) == 18 and {row.matrix for row in found if row not in split} == {matrix}
    if arch == 80:  # as on the GPUs with 99 KB per program
        assert max(row.shared for row in found) <= 99 << 10


@pytest.mark.parametrize(("arch", "matrix"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_the_cost_embedding_runs_on_tensor_cores(rows: list[aot.Compiled], arch: int, matrix: str) -> None:
    found = [row for row in rows if (row.op, row.arch) == ("cost_embedding", arch)]
    products = {
        f"{kernel} {dtype}" for kernel in ("fwd", "bwd cost", "bwd weight") for dtype in ("bfloat16", "float16")
    }
    assert {row.config for row in found if row.matrix == matrix} >= products


@pytest.mark.parametrize(("arch", "matrix"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_spatial_attention_runs_on_tensor_cores(rows: list[aot.Compiled], dtype: str, arch: int, matrix: str) -> None:
    for kernel in ("keys fwd", "fwd", "queries bwd", "keys bwd", "bwd"):
        key = "spatial_attention", f"{kernel} {dtype} 128/4", arch
        assert [row.matrix for row in rows if (row.op, row.config, row.arch) == key] == [matrix]


@pytest.mark.parametrize(("arch", "matrix"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_the_up_decoder_runs_on_tensor_cores(rows: list[aot.Compiled], arch: int, matrix: str) -> None:
    found = [row for row in rows if (row.op, row.arch) == ("up_step", arch)]
    products = [row for row in found if row.config not in ("norm", "finish")]
    assert len(products) == 10 and {row.matrix for row in products} == {matrix}


def test_a_spill_is_seen() -> None:
    row = aot.Compiled("op", "fwd", 90, 255, 8, 0, 4, "-", 0)
    assert row.spilled and "255" in aot.table([row]) and "sm_90" in aot.table([row])


@pytest.mark.parametrize(("arch", "matrix"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_class_attention_runs_on_tensor_cores(rows: list[aot.Compiled], dtype: str, arch: int, matrix: str) -> None:
    found = [row for row in rows if (row.op, row.arch) == ("class_attention", arch) and f" {dtype} 128/4" in row.config]
    assert len(found) == 6 and {row.matrix for row in found} == {matrix}
