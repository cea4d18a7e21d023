"""Building a vocabulary's file: streamed, resumable, the same whatever happened on the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errseg.errors import ErrSegError
from errseg.testing.memory import measure_peak_memory
from errseg.vocabulary import Vocabulary
from tests.disk import files_of_at_most

WIDTH, BLOCK = 8, 16
MADE_OF = {"model": "m", "weights": "w", "prompt": "a {}"}


class Tower:
    """A different unit vector per phrase and call, so that equal rows show one encoding; may stop like a kill."""

    def __init__(self, calls: int = 10**9) -> None:
        self.calls = calls
        self.phrases: list[str] = []

    def __call__(self, phrases: list[str], progress: Any) -> Tensor:
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.phrases += phrases
        progress(len(phrases), len(phrases))
        seeds = [int.from_bytes(phrase.encode(), "big") % 2**31 + len(phrases) for phrase in phrases]
        rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errseg.vocabulary._BUILD_ROWS", BLOCK)


def words(count: int = 70) -> list[str]:
    return [f"w{i % 60}" for i in range(count)]  # w0 to w9 come twice, some blocks later


def build(path: Path, tower: Tower, vocabulary: Vocabulary | None = None, **options: Any) -> Vocabulary:
    settings = {"width": WIDTH, "dtype": torch.float32, **MADE_OF, **options}
    (vocabulary or Vocabulary(words())).build(path, tower, **settings)
    return Vocabulary.load(path)


def test_the_file_is_that_of_save(tmp_path: Path) -> None:
    tower = Tower()
    built = build(tmp_path / "new" / "v.safetensors", tower)
    assert tower.phrases == words(60)  # each once
    assert torch.equal(built.embeddings[60:], built.embeddings[:10])
    assert (built.words, built.model, built.weights, built.prompt) == (words(), "m", "w", "a {}")
    saved = Vocabulary(words(), built.embeddings.clone(), **MADE_OF)
    saved.save(tmp_path / "saved.safetensors")
    data = (tmp_path / "saved.safetensors").read_bytes()
    assert data == (tmp_path / "new" / "v.safetensors").read_bytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["v.safetensors"]
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", [0, 5, -3])
def test_a_build_goes_on_where_it_was_stopped(tmp_path: Path, dtype: torch.dtype, cut: int) -> None:
    path, partial = tmp_path / "v.safetensors", tmp_path / "v.safetensors.partial"
    build(tmp_path / "at-once.safetensors", Tower(), dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        build(path, Tower(calls=2), dtype=dtype)
    assert not path.exists()
    data = partial.read_bytes()
    partial.write_bytes(data + bytes(cut) if cut >= 0 else data[:cut])  # killed while it wrote
    seen: list[tuple[int, int]] = []
    tower = Tower()
    build(path, tower, dtype=dtype, progress=lambda *done: seen.append(done))
    kept = 2 * BLOCK if cut >= 0 else BLOCK
    assert seen[0] == (kept, 70) and seen[-1] == (70, 70) and seen == sorted(seen)
    assert tower.phrases == words(60)[kept:]
    assert path.read_bytes() == (tmp_path / "at-once.safetensors").read_bytes()
    assert not partial.exists()
    tower = Tower(calls=0)  # nothing left to do
    assert build(path, tower, dtype=dtype).words == words()


def test_holes_of_a_power_cut_are_made_anew(tmp_path: Path) -> None:
    path, partial = tmp_path / "v.safetensors", tmp_path / "v.safetensors.partial"
    with pytest.raises(KeyboardInterrupt):
        build(path, Tower(calls=3))
    data = partial.read_bytes()
    hole = len(data) - 3 * BLOCK * WIDTH * 4 + (BLOCK + 4) * WIDTH * 4  # in the second block
    partial.write_bytes(data[:hole] + bytes(WIDTH * 4) + data[hole + WIDTH * 4 :])
    tower = Tower()
    build(path, tower)
    assert tower.phrases == words(60)[BLOCK:]
    build(tmp_path / "at-once.safetensors", Tower())
    assert path.read_bytes() == (tmp_path / "at-once.safetensors").read_bytes()


def test_stopped_before_the_first_row(tmp_path: Path) -> None:
    path, partial = tmp_path / "v.safetensors", tmp_path / "v.safetensors.partial"
    with pytest.raises(KeyboardInterrupt):
        build(path, Tower(calls=0))
    partial.write_bytes(partial.read_bytes()[:20])  # in the middle of the header
    assert build(path, Tower()).words == words()


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"vocabulary": Vocabulary([*words()[:-1], "other"])}, "with other words"),
        ({"vocabulary": Vocabulary(words(), synonyms="mean")}, "another rule of synonyms ('first', not 'mean')"),
        ({"model": "n"}, "another model ('m', not 'n')"),
        ({"weights": "x"}, "other weights ('w', not 'x')"),
        ({"prompt": "a much longer prompt for {}"}, "another prompt ('a {}', not 'a much longer prompt for {}')"),
        ({"dtype": torch.bfloat16}, "another dtype ('F32', not 'BF16')"),
    ],
)
def test_another_build_is_refused(tmp_path: Path, options: dict[str, Any], line: str, finished: bool) -> None:
    path = tmp_path / "v.safetensors"
    if finished:
        build(path, Tower())
    else:
        with pytest.raises(KeyboardInterrupt):
            build(path, Tower(calls=2))
    left = next(tmp_path.iterdir())
    before = left.read_bytes()
    with pytest.raises(ErrSegError) as caught:
        build(path, Tower(), **options)
    assert str(caught.value).startswith(f"{left} was made with ") and line in str(caught.value)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    for occupied in (path, tmp_path / "v.safetensors.partial"):
        occupied.write_text("a diary\n" * 100)
        with pytest.raises(ErrSegError, match="is no vocabulary of these words"):
            build(path, Tower())
        assert occupied.read_text().startswith("a diary")
        occupied.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(ErrSegError, match="cannot write"):
        build(tmp_path / "file" / "v.safetensors", Tower())
    with pytest.raises(ErrSegError, match=r"cannot write|is there already"):
        build(tmp_path, Tower())


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"

    def meanwhile(phrases: list[str], progress: Any) -> Tensor:
        with pytest.raises(ErrSegError, match="is being written by another process"):
            build(path, Tower())
        return Tower()(phrases, progress)

    assert len(build(path, meanwhile)) == 70  # type: ignore[arg-type]


def test_killed_at_the_very_end(tmp_path: Path) -> None:
    path, partial = tmp_path / "v.safetensors", tmp_path / "v.safetensors.partial"
    build(tmp_path / "at-once.safetensors", Tower())
    expected = (tmp_path / "at-once.safetensors").read_bytes()
    for size in (len(expected), len(expected) - 7):  # the words are there, or some of them
        partial.write_bytes(expected[:size])
        build(path, Tower(calls=0))
        assert path.read_bytes() == expected and not partial.exists()
        path.unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of files")
def test_a_full_disk_keeps_what_is_done(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    rows = build(whole, Tower()).embeddings
    header = whole.stat().st_size - rows.nbytes - len(json.dumps(words(60)).encode())
    size = header + int(2.5 * BLOCK) * rows[0].nbytes
    with files_of_at_most(size), pytest.raises(ErrSegError, match=r"File too large; 32 words are kept"):
        build(tmp_path / "v.safetensors", Tower())
    tower = Tower()
    build(tmp_path / "v.safetensors", tower)
    assert tower.phrases == words(60)[2 * BLOCK :]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of files")
def test_a_disk_that_was_full_before(tmp_path: Path) -> None:
    with files_of_at_most(20), pytest.raises(ErrSegError, match=r"cannot write .*v.safetensors: File too large$"):
        build(tmp_path / "v.safetensors", Tower(calls=0))
    assert len(build(tmp_path / "v.safetensors", Tower())) == 70


def test_mean_of_synonyms(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["sofa, couch", "cat", "sofa, couch", "sofa"], synonyms="mean")
    tower = Tower()
    built = build(tmp_path / "v.safetensors", tower, vocabulary)
    assert tower.phrases == ["sofa", "cat", "couch"]
    encoded = vocabulary.encode(lambda phrases: Tower()(phrases, lambda *_: None))
    torch.testing.assert_close(built.embeddings, encoded)
    assert torch.equal(built.embeddings[0], built.embeddings[2]) and built.synonyms == vocabulary.synonyms
    assert not torch.equal(built.embeddings[0], built.embeddings[3])


_SETUP = """
import torch
from errseg.vocabulary import Vocabulary
from tests.disk import files_of_at_most

def embed(phrases, progress):
    return torch.randn(len(phrases), 640)

def build(vocabulary, name):
    path = f"{folder}/{name}.safetensors"
    vocabulary.build(path, embed, width=640, dtype=torch.float32, model="m", weights="w", prompt="a {}")

build(Vocabulary(f"w{i}" for i in range(3_000)), "first")  # what is loaded or made once
vocabulary = Vocabulary(f"w{i}" for i in range(50_000))
"""


def test_a_block_of_embeddings_is_held(tmp_path: Path) -> None:
    setup = f"folder = {str(tmp_path)!r}\n" + _SETUP
    measured = measure_peak_memory(setup, "build(vocabulary, 'second')")
    assert (tmp_path / "second.safetensors").stat().st_size > 128e6
    assert measured.extra < 56e6  # a table of the words and a few copies of a block of 5 MB
