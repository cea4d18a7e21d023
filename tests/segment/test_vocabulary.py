"""Vocabularies: words, synonyms, given and saved embeddings, words files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from errseg.errors import ErrSegError
from errseg.vocabulary import Vocabulary, parse_words, read_words


def embed(phrases: list[str]) -> Tensor:
    """A different unit vector per phrase, whatever else is asked for."""
    rows = [torch.randn(8, generator=torch.Generator().manual_seed(sum(map(ord, p)))) for p in phrases]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def test_words_and_synonyms() -> None:
    vocabulary = Vocabulary(["cat", "sofa, couch, settee", "1,5 m pole", "cat", "bed "])
    assert vocabulary.words == ["cat", "sofa", "1,5 m pole", "cat", "bed"]
    assert vocabulary.synonyms[1] == ["sofa", "couch", "settee"]
    assert len(vocabulary) == 5
    assert Vocabulary({"sofa": ["couch"], "cat": [], "dog": "puppy"}).synonyms == [
        ["sofa", "couch"],
        ["cat"],
        ["dog", "puppy"],
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "empty"),
        ({}, "empty"),
        ([""], "word 0 is empty"),
        (["a", "  "], "word 1 is empty"),
        (["a, , b"], "word 0 is empty"),
        ({"a": [""]}, "word 0 is empty"),
        ("cat", "expected a list of words"),
        (None, "expected a list of words"),
        (["a", "caf\udce9"], "word 1 is not valid text"),
        (["a", 3], "word 1: expected a string, got 3"),
        ({"a": [3]}, "word 0: expected a string"),
        ({3: ["a"]}, "word 0: expected a string"),
    ],
)
def test_bad_words(words: object, line: str) -> None:
    with pytest.raises(ErrSegError, match=line):
        Vocabulary(words)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "embeddings",
    [
        torch.zeros(3, 8),
        torch.zeros(2),
        torch.zeros(2, 8, dtype=torch.int64),
        torch.full((2, 8), float("nan")),
        [[1.0, 2.0]],
    ],
)
def test_bad_embeddings(embeddings: object) -> None:
    with pytest.raises(ErrSegError, match="embeddings"):
        Vocabulary(["a", "b"], embeddings)  # type: ignore[arg-type]


def test_embeddings_given_are_not_copied() -> None:
    array = np.ones((2, 8), np.float32)
    assert Vocabulary(["a", "b"], array).embeddings.data_ptr() == array.ctypes.data
    with pytest.raises(ErrSegError, match="synonyms: expected one of first, mean"):
        Vocabulary(["a"], synonyms="last")


def test_first_synonym_is_the_published_rule() -> None:
    seen: list[list[str]] = []
    encoded = Vocabulary(["sofa, couch", "cat", "sofa"]).encode(lambda phrases: seen.append(phrases) or embed(phrases))
    assert seen == [["sofa", "cat"]]
    assert torch.equal(encoded, embed(["sofa", "cat", "sofa"]))


def test_mean_of_synonyms() -> None:
    encoded = Vocabulary(["sofa, couch", "cat", "sofa"], synonyms="mean").encode(embed)
    mean = torch.nn.functional.normalize(embed(["sofa", "couch"]).mean(0), dim=0)
    torch.testing.assert_close(encoded, torch.stack([mean, *embed(["cat", "sofa"])]))


def test_keys_tell_contents_apart() -> None:
    same = [Vocabulary(["a, b", "c"]), Vocabulary([["a", "b"], "c"]), Vocabulary({"a": ["b"], "c": []})]
    assert len({v.key for v in same}) == 1
    others = [Vocabulary(["c", "a, b"]), Vocabulary(["a", "b", "c"]), Vocabulary(["a, b", "c"], synonyms="mean")]
    assert len({v.key for v in [*same, *others]}) == 4


def test_save_and_load(tmp_path: Path) -> None:
    words = ["théière, teapot", 'a "quoted" word', "cat", "cat"]
    saved = Vocabulary(words, torch.randn(4, 8), synonyms="mean", model="m", weights="w", prompt="a {}")
    saved.save(tmp_path / "new" / "v.safetensors")
    loaded = Vocabulary.load(tmp_path / "new" / "v.safetensors")
    assert loaded.words == saved.words and loaded.synonyms == saved.synonyms and loaded.key == saved.key
    assert torch.equal(loaded.embeddings, saved.embeddings)
    assert (loaded.rule, loaded.model, loaded.weights, loaded.prompt) == ("mean", "m", "w", "a {}")
    loaded.check_model("m", "w", "a {}")
    for other in (("x", "w", "a {}"), ("m", "x", "a {}"), ("m", "w", "x {}")):
        with pytest.raises(ErrSegError, match="'x"):
            loaded.check_model(*other)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["v.safetensors"]


def test_bad_vocabulary_files(tmp_path: Path) -> None:
    with pytest.raises(ErrSegError, match="no embeddings to save"):
        Vocabulary(["a"]).save(tmp_path / "v.safetensors")
    with pytest.raises(ErrSegError, match="no such vocabulary file"):
        Vocabulary.load(tmp_path / "v.safetensors")
    (tmp_path / "v.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ErrSegError, match="damaged vocabulary file"):
        Vocabulary.load(tmp_path / "v.safetensors")
    from safetensors.torch import save_file

    save_file({"embeddings": torch.zeros(1, 2)}, tmp_path / "v.safetensors")
    with pytest.raises(ErrSegError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "v.safetensors")
    Vocabulary(["a"], torch.zeros(1, 8)).save(tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:-4])
    with pytest.raises(ErrSegError, match="damaged vocabulary file"):
        Vocabulary.load(tmp_path / "w.safetensors")


def test_words_on_the_command_line() -> None:
    assert parse_words("cat, sofa|couch ,a b") == [["cat"], ["sofa", "couch"], ["a b"]]
    assert Vocabulary(parse_words("cat,sofa | couch")).synonyms == [["cat"], ["sofa", "couch"]]
    for text in ("", "cat,,dog", "cat,", "a||b"):
        with pytest.raises(ErrSegError, match="is empty"):
            Vocabulary(parse_words(text))


def test_words_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffcat\r\n\r\nsofa, couch\n  théière,teapot  \n".encode())
    assert read_words(path) == [["cat"], ["sofa", "couch"], ["théière", "teapot"]]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("cat\nthéière\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9 at offset 6)"),
        ("cat\n".encode("utf-16"), "line 1 is not UTF-8 (byte 0xff at offset 0)"),
        ("cat\n".encode("utf-16-le"), "line 1 holds a zero byte"),
        (b"", "holds no word"),
        (b"\n \n", "holds no word"),
        (b"cat\nsofa,,couch", "line 2 has an empty word: 'sofa,,couch'"),
    ],
)
def test_bad_words_files(data: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(data)
    with pytest.raises(ErrSegError) as caught:
        read_words(path)
    assert str(caught.value).startswith(f"{path}: ") and line in str(caught.value)


def test_missing_words_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ErrSegError, match="cannot read the words file"):
            read_words(path)
