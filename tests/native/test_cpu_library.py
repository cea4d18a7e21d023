"""The C++ library as PyTorch sees it: opcheck, compilation, odd arguments, threads, sanitizers, symbols."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from errseg import ops
from errseg.ops import native, native_build
from errseg.testing import assert_close
from errseg.testing.samples import Sizes, sample

OPS = [name for name, op in ops.OPS.items() if op.why_not("cpu") is None]
IN_LIBRARY = [name for name in OPS if ops.OPS[name].backends["cpu"].forward is None]  # the others are PyTorch calls
every_op = pytest.mark.parametrize("op", OPS)
EDGES = {
    "one of each": Sizes(batch=1, classes=1, words=1, height=2, width=2),
    "empty batch": Sizes(batch=0),
    "wide": Sizes(batch=1, classes=9, words=70, height=3, width=67, text=33),
    "many words": Sizes(batch=3, classes=4, words=500, height=2, width=3),
}


def results(value: object) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)  # type: ignore[return-value]


def test_there_is_a_library() -> None:
    assert native.why_not("cpu") is None
    assert {"class_votes", "upsample_argmax", "upsample_bce"} <= set(OPS)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    arguments = sample(op).to(dtype).raw_arguments()
    names = [a.name for a in ops.OPS[op].overload._schema.arguments]
    for name, argument in zip(names, arguments, strict=False):
        if name in ops.OPS[op].differentiable:
            argument.requires_grad_()
    if ops.OPS[op].backends["cpu"].saved:
        arguments = (*arguments, True)
    torch.library.opcheck(getattr(torch.ops.errseg, f"{op}_cpu").default, arguments)


@every_op
@pytest.mark.parametrize("sizes", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_sizes_and_strided_views(op: str, sizes: Sizes, dtype: torch.dtype) -> None:
    call = sample(op, sizes).to(dtype)
    viewed = call.map(lambda t: t.repeat_interleave(2, -1)[..., ::2])
    exact = call.to(torch.float64)(backend="reference")
    for got, wanted in zip(results(viewed(backend="cpu")), results(exact), strict=True):
        assert got.dtype == (dtype if wanted.is_floating_point() else wanted.dtype)
        if wanted.is_floating_point():
            assert_close(got, wanted, 1e-12 if dtype == torch.float64 else 1e-6)
        else:
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(7, 9), (28, 36), (21, 27), (22, 35), (8, 131), (5, 4), (1, 1)])
@pytest.mark.parametrize("exclude_ignored", [False, True])
def test_gradient_of_the_loss(dtype: torch.dtype, size: tuple[int, int], exclude_ignored: bool) -> None:
    logits, ids, _ = sample("upsample_bce").to(dtype).args
    target = torch.randint(12, (2, *size))
    gradients = []
    for backend, leaf in (("cpu", logits.clone()), ("reference", logits.double())):
        loss = ops.upsample_bce(
            leaf.requires_grad_(), ids, target, vocabulary_size=11, exclude_ignored=exclude_ignored, backend=backend
        )
        (1024 * loss).backward()  # as a gradient scaler would, for float16
        gradients.append(leaf.grad)
    assert gradients[0].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert_close(gradients[0], gradients[1], tolerance)


@pytest.mark.parametrize("factor", range(1, 9))
def test_labels_at_integer_factors(factor: int) -> None:
    logits, ids = torch.randn(2, 6, 5, 7, dtype=torch.float64) * 4, torch.arange(6).expand(2, 6)
    got = ops.upsample_argmax(logits, ids, (5 * factor, 7 * factor), return_scores=True, backend="cpu")
    wanted = ops.upsample_argmax(logits, ids, (5 * factor, 7 * factor), return_scores=True, backend="reference")
    assert torch.equal(got[0], wanted[0])
    assert_close(got[1], wanted[1], 1e-13)


def test_probabilities_from_saturated_to_denormal() -> None:
    logits = torch.linspace(-110, 30, 4001)[None, None, None]
    scores = ops.upsample_argmax(logits, torch.zeros(1, 1).long(), (1, 4001), return_scores=True, backend="cpu")[1]
    wanted = logits[0, 0].double().sigmoid()
    assert ((scores[0] - wanted).abs() <= 3e-7 * wanted + 3e-45).all()
    assert scores[0, 0, -1] == 1 and scores[0, 0, 0] == 0


def test_a_loss_that_is_not_a_number_stays_so() -> None:
    logits, ids, target = sample("upsample_bce").to(torch.float32).args
    logits[0, 0, 0, 0] = float("nan")
    assert ops.upsample_bce(logits, ids, target, vocabulary_size=11, backend="cpu").isnan()


@pytest.mark.parametrize("bias", ["fc1_bias", "fc3_bias"])
@pytest.mark.parametrize("op", ["gated_mlp", "class_attention"])
def test_what_is_no_number_stays_none_in_relu6(op: str, bias: str) -> None:
    """Gradients pass it, as in the reference's plain loops."""
    call = sample(op).to(torch.float32)
    place = getattr(getattr(call.args[-1], "mlp", call.args[-1]), bias)
    place[3] = torch.nan
    found, wanted = call(backend="cpu"), call(backend="reference")
    assert wanted.isnan().any() and torch.equal(found.isnan(), wanted.isnan())
    place.requires_grad_()
    call(backend="cpu").sum().backward()
    assert place.grad is not None and place.grad[3].isfinite() and place.grad[3] != 0


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", IN_LIBRARY)
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads(op: str) -> None:
    call = sample(op, Sizes(classes=7, words=300, height=11, width=40, text=50)).to(torch.float32)
    call = call.map(lambda t: t.requires_grad_() if t.is_floating_point() and ops.OPS[op].differentiable else t)
    seen = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        made = results(call(backend="cpu"))
        if made[0].requires_grad:
            leaves = [leaf for leaf in call.leaves() if leaf.is_leaf]
            made = (*made, *torch.autograd.grad(made[0].square().sum(), leaves))
        seen.append(made)
    for made in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made, seen[0], strict=True))


@every_op
def test_compiles_to_one_graph_without_naming_a_backend(op: str) -> None:
    torch.compiler.reset()
    call = sample(op).to(torch.float32)
    chosen = ops.OPS[op].choose(None, *call.raw_arguments())
    assert chosen == "cpu"
    compiled = torch.compile(lambda c: c(), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(results(compiled(call)), results(call()), strict=True))


def test_tensors_of_another_device_are_refused() -> None:
    pixels, words = torch.empty(1, 4, 3, 3, device="meta"), torch.empty(5, 4, device="meta")
    with pytest.raises(ops.BackendError, match="cpu: needs tensors on cpu, got meta"):
        ops.class_votes(pixels, words, backend="cpu")


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_only_the_stable_interface_of_torch_is_used() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(native.library("cpu"))], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split(maxsplit=1)[1] for line in listed.splitlines()]
    assert any(name.startswith(("torch_", "aoti_torch_")) for name in names)
    assert [name for name in names if re.match(r"(at|c10|torch|caffe2)::|_?Py[A-Z_]", name)] == []


# ---- AddressSanitizer and UndefinedBehaviorSanitizer

SANITIZED = """
import sys, torch
from errseg.ops import native
native.library = lambda device: sys.argv[1]
from errseg import ops
from errseg.testing.samples import Sizes, sample
torch.set_num_threads(2)
edges = (Sizes(), Sizes(batch=0), Sizes(batch=1, classes=1, words=1, height=2, width=2),
         Sizes(batch=1, classes=9, words=70, height=3, width=67, text=33))
for op in sys.argv[2:]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for sizes in edges:
            call = sample(op, sizes).to(dtype)
            if ops.OPS[op].differentiable:
                call = call.map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
            result = call(backend="cpu")
            if isinstance(result, torch.Tensor) and result.requires_grad:
                result.sum().backward()
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux")
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    flags = [flag for flag in native_build.CXX_FLAGS if flag not in ("-O3", "-fopenmp-simd")]
    flags += ["-O0", "-std=c++20", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    library = tmp_path / "sanitized.so"

    def compile_(source: Path) -> str:
        made = str(tmp_path / f"{source.stem}.o")
        run("g++", *flags, f"-I{native_build.source_root()}", "-c", str(source), "-o", made)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_, native_build.sources("cpu")))
    folders = [f"-L{path}" for path in cpp_extension.library_paths()]
    run(
        "g++", "-shared", "-fsanitize=address,undefined", *objects, *folders, "-ltorch_cpu", "-lc10", "-o", str(library)
    )
    preloaded = [run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so.6")]
    wrapped = ["env", f"LD_PRELOAD={':'.join(preloaded)}", "ASAN_OPTIONS=detect_leaks=0", "OMP_NUM_THREADS=2"]
    root = Path(__file__).parents[2]
    assert run(*wrapped, f"PYTHONPATH={root}", sys.executable, "-c", SANITIZED, str(library), *OPS) == "done\n"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
