"""The Segmenter against the plain computation, on a tiny model with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from errseg import Segmenter, Vocabulary
from errseg.data.labels import load_labels
from errseg.errors import ErrSegError
from errseg.model.errseg import create_model
from errseg.segmenter import default_num_selected, to_square
from errseg.timing import STAGES

WORDS = ["red star", "blue circle", "grass", "red star", "sky", "green heart", "water"]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def picture(height: int = 70, width: int = 90, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height)))


@pytest.fixture(scope="module", params=DEVICES)
def segmenter(request: pytest.FixtureRequest) -> Iterator[Segmenter]:
    torch.manual_seed(0)
    yield Segmenter("errseg-tiny", "random", device=request.param)


def expected_probabilities(segmenter: Segmenter, image: np.ndarray, words: list[str], k: int) -> torch.Tensor:
    """[T, H, W] as published: sigmoid of dense logits, then bilinear to the picture's size."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().to(segmenter.device)
    square = F.interpolate(pixels, size=(160, 160), mode="bilinear", align_corners=False)
    model = segmenter.model
    with torch.inference_mode():
        embeddings = model.clip.embed_words(words, prompt=model.config.prompt)
        dense = model(square, embeddings, num_selected=k).dense(len(words)).sigmoid()
        return F.interpolate(dense, size=image.shape[:2], mode="bilinear", align_corners=False)[0].cpu()


@pytest.mark.parametrize("k", [16, 3, 1])
def test_labels_are_the_published_argmax(segmenter: Segmenter, k: int) -> None:
    image = picture()
    result = segmenter(image, vocabulary=WORDS, num_selected=k, return_scores=True)
    probabilities = expected_probabilities(segmenter, image, WORDS, k)
    assert result.labels.dtype == torch.int32 and result.labels.shape == (70, 90)
    top = probabilities.topk(2, dim=0).values
    sure = top[0] - top[1] > 1e-5
    sure |= top[0] - probabilities[0] < 1e-12  # the two equal words tie exactly: the lower id wins
    assert sure.float().mean() > 0.2 or k == 1
    assert torch.equal(result.labels.long()[sure], probabilities.argmax(0)[sure])
    torch.testing.assert_close(result.scores, top[0], rtol=0, atol=1e-5)
    result.labels[0, 0] = result.class_ids[0] = 0  # results may be changed in place
    assert len(result.class_ids) == min(k, len(WORDS)) and result.vocabulary == WORDS
    assert not (result.labels == 3).any() or k < 7  # the second of two equal words never wins


def test_lists_of_different_sizes_run_as_batches(segmenter: Segmenter) -> None:
    sizes = [(70, 90), (33, 200), (160, 160), (1, 1), (90, 70)]
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    together = segmenter(images, vocabulary=WORDS, batch_size=3)
    assert [tuple(r.labels.shape) for r in together] == sizes
    for image, result in zip(images, together, strict=True):
        alone = segmenter(image, vocabulary=WORDS)
        assert (alone.labels == result.labels).float().mean() > 0.99  # rounding decides near-ties
    assert segmenter([], vocabulary=WORDS) == []


def test_panorama(segmenter: Segmenter) -> None:
    assert segmenter(picture(800, 8000), vocabulary=WORDS).labels.shape == (800, 8000)


@pytest.mark.parametrize(("words", "k"), [(1, 16), (20, 16), (21, 24), (59, 24), (60, 32), (171, 32), (172, 48)])
def test_default_number_of_selected_words(words: int, k: int) -> None:
    assert default_num_selected(words) == k


def test_num_selected_of_the_model_and_of_the_segmenter(segmenter: Segmenter) -> None:
    many = Vocabulary([f"w{i}" for i in range(50)], torch.randn(50, 128))
    assert len(segmenter(picture(), vocabulary=many).class_ids) == 16
    few = Segmenter(segmenter.model, num_selected=5, vocabulary=many)
    assert len(few(picture()).class_ids) == 5
    assert len(few(picture(), num_selected=60).class_ids) == 50


def test_many_words(segmenter: Segmenter) -> None:
    words = Vocabulary([f"w{i}" for i in range(70_000)], torch.randn(70_000, 128))
    result = segmenter(picture(), vocabulary=words)
    assert result.labels.max() > 255 and len(result.class_ids) == 16


def test_words_are_encoded_once_and_told_apart(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Segmenter(segmenter.model)
    calls: list[list[str]] = []
    embed = segmenter.model.clip.embed_words
    monkeypatch.setattr(
        segmenter.model.clip, "embed_words", lambda words, **options: calls.append(words) or embed(words, **options)
    )
    own.set_vocabulary(["grass", "sky"])
    before = own.vocabulary
    for words in (None, ["grass", "sky"], Vocabulary(["grass", "sky"]), ["sky", "grass"], ["sky", "grass"], None):
        own(picture(), vocabulary=words)
    assert calls == [["grass", "sky"], ["sky", "grass"]]
    assert own.vocabulary is before
    for i in range(20):
        own.set_vocabulary(["grass"] * (i + 1))
    assert len(own._offers) <= 4


def test_given_and_saved_embeddings(segmenter: Segmenter, tmp_path: Path) -> None:
    built = segmenter.embed({"grass": ["sand"], "sky": []}, synonyms="mean")
    built.save(tmp_path / "v.safetensors")
    loaded = Vocabulary.load(tmp_path / "v.safetensors")
    expected = segmenter(picture(), vocabulary=built).labels
    assert torch.equal(segmenter(picture(), vocabulary=loaded).labels, expected)
    torch.manual_seed(1)
    with pytest.raises(ErrSegError, match="made with weights"):
        Segmenter("errseg-tiny", "random", vocabulary=loaded, device="cpu")
    with pytest.raises(ErrSegError, match="made with prompt"):
        Segmenter(segmenter.model, vocabulary=loaded, prompt="the {}")
    with pytest.raises(ErrSegError, match="5 wide, errseg-tiny needs 128"):
        segmenter(picture(), vocabulary=Vocabulary(["a"], torch.zeros(1, 5)))


def test_threshold_leaves_pixels_unknown(segmenter: Segmenter) -> None:
    scores = segmenter(picture(), vocabulary=WORDS, return_scores=True).scores
    threshold = float(scores.median())
    result = segmenter(picture(), vocabulary=WORDS, threshold=threshold)
    assert torch.equal(result.labels == -1, scores < threshold)
    assert result.scores is None
    assert (segmenter(picture(), vocabulary=WORDS, threshold=0).labels >= 0).all()


def test_background_words_share_one_label(segmenter: Segmenter) -> None:
    plain = segmenter(picture(), vocabulary=["red star", "grass", "sky", "water"])
    result = segmenter(picture(), vocabulary=["red star", "grass"], background=["sky", "water"])
    assert result.vocabulary == ["red star", "grass", "background"]
    assert torch.equal(result.labels, plain.labels.clamp(max=2))
    assert result.class_ids.tolist() == [0, 1, 2]
    offered_too = segmenter(picture(), vocabulary=["red star", "grass", "sky", "water"], background=["sky", "water"])
    assert offered_too.vocabulary[-1] == "background" and len(offered_too.vocabulary) == 5
    moved = torch.where(offered_too.labels == 4, 2, offered_too.labels)
    assert torch.equal(moved, result.labels)


def test_background_may_be_a_word_itself(segmenter: Segmenter) -> None:
    words = Vocabulary(["background", "star"], torch.randn(2, 128))
    result = segmenter(picture(), vocabulary=words, background=["sky"])
    assert result.vocabulary == ["background", "star"]
    assert set(result.labels.unique().tolist()) <= {0, 1}


def test_published_protocol(segmenter: Segmenter) -> None:
    image = Image.fromarray(picture(300, 500))
    resized = image.resize((1333, 800), Image.Resampling.BILINEAR)
    assert torch.equal(to_square(image, 160, "published"), to_square(resized, 160))
    tall = Image.fromarray(picture(900, 100))
    assert torch.equal(
        to_square(tall, 96, "published"), to_square(tall.resize((148, 1333), Image.Resampling.BILINEAR), 96)
    )
    assert segmenter(image, vocabulary=WORDS, protocol="published").labels.shape == (300, 500)
    with pytest.raises(ErrSegError, match="protocol"):
        segmenter(image, vocabulary=WORDS, protocol="new")


def test_size_is_a_setting(segmenter: Segmenter) -> None:
    seen: list[tuple[int, ...]] = []
    other = Segmenter(segmenter.model, size=96, vocabulary=WORDS)
    handle = segmenter.model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    other(picture())
    handle.remove()
    assert seen == [(1, 3, 96, 96)]


def test_bfloat16() -> None:
    torch.manual_seed(0)
    segmenter = Segmenter("errseg-tiny", "random", dtype=torch.bfloat16, device="cpu", vocabulary=WORDS)
    result = segmenter(picture(), return_scores=True)
    assert segmenter.dtype == torch.bfloat16 and result.scores.dtype == torch.float32
    assert torch.isfinite(result.scores).all()


def test_timings_cover_every_stage(segmenter: Segmenter) -> None:
    own = Segmenter(segmenter.model, vocabulary=WORDS)
    results = own([picture(), picture(50, 40)], batch_size=2, timings=True)
    assert results[0].timings is not results[1].timings
    for result in results:
        assert tuple(result.timings) == STAGES
        assert all(seconds > 0 for seconds in result.timings.values())
    assert own(picture(), timings=True).timings["text"] == 0
    assert own(picture()).timings is None
    assert not segmenter.model.clip._forward_hooks and not segmenter.model.decoder.rrhc._forward_pre_hooks


def test_saving(segmenter: Segmenter, tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    result = segmenter(tmp_path / "photo.png", vocabulary=WORDS, threshold=0.3)
    paths = result.save(tmp_path / "out" / "photo.labels.png")
    assert [p.name for p in paths] == ["photo.labels.png", "photo.overlay.png", "photo.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    assert np.array_equal(load_labels(paths[0]), result.labels.numpy())
    assert np.array_equal(np.asarray(Image.open(paths[1])), np.asarray(result.overlay()))
    facts = json.loads(paths[2].read_text())
    assert facts["image"] == str(tmp_path / "photo.png")
    assert (facts["width"], facts["height"], facts["vocabulary_size"]) == (90, 70, len(WORDS))
    assert sum(area["pixels"] for area in facts["areas"]) == 70 * 90
    assert [entry["word"] for entry in facts["selected"]] == WORDS
    assert [p.name for p in result.save(tmp_path / "one.png", overlay=False)] == ["one.png", "one.json"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"device": "cuda:99"}, "no such device: cuda:99"),
        ({"device": "toaster"}, "no such device: 'toaster'"),
        ({"device": "meta:x"}, "no such device"),
        ({"size": 100}, "size: expected a positive multiple of 32, got 100"),
        ({"size": 0}, "size: expected"),
        ({"num_selected": 0}, "num_selected: expected at least 1, got 0"),
        ({"prompt": "no place"}, "prompt: expected a sentence with one {}"),
        ({"dtype": torch.int8}, "dtype: expected one of float32"),
        ({"vocabulary": []}, "vocabulary is empty"),
        ({"vocabulary": ["zebra"]}, "'zebra'"),
    ],
)
def test_bad_settings(settings: dict[str, object], line: str) -> None:
    with pytest.raises(ErrSegError) as caught:
        Segmenter("errseg-tiny", "random", **{"device": "cpu", **settings})  # type: ignore[arg-type]
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"threshold": 1.5}, "threshold"),
        ({"batch_size": -1}, "batch size"),
        ({"num_selected": 0}, "num_selected"),
        ({"background": [""]}, "word 0 is empty"),
        ({"background": "sky"}, "background: expected a list of words"),
        ({"vocabulary": None}, "no words to look for"),
    ],
)
def test_bad_calls(segmenter: Segmenter, options: dict[str, object], line: str) -> None:
    with pytest.raises(ErrSegError, match=line):
        segmenter(picture(), **{"vocabulary": WORDS, **options})


def test_unknown_models_and_spare_weights() -> None:
    with pytest.raises(ErrSegError, match="errseg-b"):
        Segmenter("errseg-x", "random")
    with pytest.raises(ErrSegError, match="brings its own"):
        Segmenter(create_model("errseg-tiny", "random"), "random")


def test_random_weights_are_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = create_model("errseg-tiny", "random")
    monkeypatch.setattr("errseg.segmenter.create_model", lambda name, weights: tiny)
    with pytest.warns(UserWarning, match="errseg-b with random weights"):
        Segmenter("errseg-b", device="cpu")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_says_what_to_do(segmenter: Segmenter, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    handle = segmenter.model.decoder.rrca.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ErrSegError, match=r"out of memory on c.* smaller batch size"):
            segmenter(picture(), vocabulary=WORDS, timings=True)
    finally:
        handle.remove()
    assert not segmenter.model.decoder.rrca._forward_hooks
    assert segmenter(picture(), vocabulary=WORDS).labels.shape == (70, 90)
