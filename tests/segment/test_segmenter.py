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
from errseg.data.images import to_square
from errseg.data.labels import load_labels
from errseg.errors import ErrSegError
from errseg.model.errseg import create_model
from errseg.settings import default_num_selected
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
    # Words encoded in another company differ in the last digit, which decides near ties.
    assert (result.labels != plain.labels.clamp(max=2)).float().mean() < 1e-3
    assert result.class_ids.tolist() == [0, 1, 2]
    offered_too = segmenter(picture(), vocabulary=["red star", "grass", "sky", "water"], background=["sky", "water"])
    assert offered_too.vocabulary[-1] == "background" and len(offered_too.vocabulary) == 5
    moved = torch.where(offered_too.labels == 4, 2, offered_too.labels)
    assert (moved != result.labels).float().mean() < 1e-3


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
    monkeypatch.setattr("errseg.settings.create_model", lambda name, weights: tiny)
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


# ---- streams


def test_a_stream_gives_what_a_call_gives(segmenter: Segmenter, tmp_path: Path) -> None:
    sources: list[object] = []
    for i, size in enumerate([(70, 90), (33, 200), (160, 160), (1, 1), (90, 70), (40, 40), (50, 60)]):
        Image.fromarray(picture(*size, seed=i)).save(tmp_path / f"{i}.png")
        sources.append(tmp_path / f"{i}.png" if i % 2 else picture(*size, seed=i))
    expected = segmenter(sources, vocabulary=WORDS, batch_size=3, return_scores=True)
    for workers in (0, 1, 3):
        stream = segmenter.stream(
            iter(sources), workers=workers, vocabulary=WORDS, batch_size=3, return_scores=True, background=()
        )
        results = list(stream)
        assert [r.source for r in results] == [r.source for r in expected]
        for result, other in zip(results, expected, strict=True):
            assert torch.equal(result.labels, other.labels) and torch.equal(result.scores, other.scores)
            assert torch.equal(result.class_ids, other.class_ids) and result.image == other.image


def test_a_stream_takes_pictures_as_it_needs_them(segmenter: Segmenter) -> None:
    taken: list[int] = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            taken.append(len(taken))
            yield picture(40, 30, seed=taken[-1])

    stream = segmenter.stream(endless(), workers=2, batch_size=2, vocabulary=WORDS)
    assert not taken
    for done in range(1, 9):
        next(stream)
        assert len(taken) <= done + 2 + 2 * 2 + 2  # ahead, and a batch of which this is one, and on a GPU another
    stream.close()


def test_a_stream_goes_on_after_a_bad_picture(segmenter: Segmenter, tmp_path: Path) -> None:
    sources = [picture(seed=0), tmp_path / "gone.png", picture(50, 40, seed=1), 3, picture(60, 60, seed=2)]
    errors: list[tuple[object, str]] = []
    stream = segmenter.stream(
        sources, vocabulary=WORDS, workers=2, batch_size=2, on_error=lambda s, e: errors.append((s, str(e)))
    )
    assert [tuple(r.labels.shape) for r in stream] == [(70, 90), (50, 40), (60, 60)]
    assert [source for source, _ in errors] == [tmp_path / "gone.png", 3]
    assert "no such file" in errors[0][1] and "expected a path" in errors[1][1]
    with pytest.raises(ErrSegError, match="no such file"):
        list(segmenter.stream(sources, vocabulary=WORDS, workers=2))


def test_a_stream_goes_on_after_a_batch_too_large(segmenter: Segmenter) -> None:
    calls: list[int] = []

    def fail_once(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError

    errors: list[object] = []
    handle = segmenter.model.decoder.rrca.register_forward_pre_hook(fail_once)
    try:
        pictures = [picture(seed=i) for i in range(3)]
        stream = segmenter.stream(pictures, vocabulary=WORDS, batch_size=2, on_error=lambda s, e: errors.append((s, e)))
        assert len(list(stream)) == 1
    finally:
        handle.remove()
    assert [source is expected for (source, _), expected in zip(errors, pictures, strict=False)] == [True, True]
    assert all("out of memory" in str(error) for _, error in errors)


def test_a_stream_keeps_the_words_of_its_start(segmenter: Segmenter) -> None:
    own = Segmenter(segmenter.model, vocabulary=["grass", "sky"])
    stream = own.stream([picture(), picture()], workers=0)
    next(stream)
    own.set_vocabulary(["water"])
    assert next(stream).vocabulary == ["grass", "sky"]
    with pytest.raises(ErrSegError, match="workers: expected 0 or more, got -1"):
        own.stream([], workers=-1)  # at once, not at the first picture


def test_timings_of_a_stream(segmenter: Segmenter) -> None:
    results = list(segmenter.stream([picture()] * 3, vocabulary=WORDS, workers=2, batch_size=2, timings=True))
    assert all(result.timings["read"] > 0 and result.timings["upsampler"] > 0 for result in results)


def test_building_a_vocabulary(segmenter: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    seen: list[tuple[int, int]] = []
    built = segmenter.build_vocabulary(
        {"grass": ["sand"], "sky": []}, path, synonyms="mean", progress=lambda *done: seen.append(done)
    )
    embedded = segmenter.embed({"grass": ["sand"], "sky": []}, synonyms="mean")
    torch.testing.assert_close(built.embeddings, embedded.embeddings)
    assert (built.model, built.weights, built.prompt) == (embedded.model, embedded.weights, embedded.prompt)
    assert seen[0] == (0, 2) and seen[-1] == (2, 2)
    half = segmenter.build_vocabulary(["grass", "sky"], tmp_path / "half.safetensors", dtype=torch.float16)
    assert half.embeddings.dtype == torch.float16
    assert segmenter(picture(), vocabulary=half).labels.shape == (70, 90)


def test_words_by_the_thousand_are_tokenised_in_turns(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("errseg.segmenter._ENCODE_WORDS", 3)
    seen: list[tuple[int, int]] = []
    built = segmenter.embed(WORDS, progress=lambda *done: seen.append(done))
    assert seen == [(3, 6), (6, 6)]  # "red star" comes twice
    with torch.no_grad():
        expected = segmenter.model.clip.embed_words(WORDS, prompt=segmenter.prompt).cpu()
    torch.testing.assert_close(built.embeddings, expected)
