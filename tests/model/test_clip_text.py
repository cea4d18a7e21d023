"""Text tower and tokenizer: the exact cut of the context, pooling, ties, and the reduced vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from errseg.data.toy import vocabulary as toy
from errseg.errors import ErrSegError
from errseg.model.clip import DenseCLIP
from errseg.model.config import CONFIGS, PROMPT, TINY_TOKEN_IDS, ClipConfig, TextConfig, VisionConfig
from errseg.model.tokenizer import Tokenizer, prompt_length

VISION = VisionConfig(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))


@pytest.fixture(scope="module")
def clip() -> DenseCLIP:
    text = TextConfig(width=24, heads=3, layers=2)
    clip = DenseCLIP(ClipConfig(embed_dim=20, vision=VISION, text=text)).double()
    for parameter in clip.transformer.parameters():  # far from the near-identity of the initial tower
        torch.nn.init.normal_(parameter, std=0.3)
    return clip


@pytest.fixture(scope="module")
def tiny() -> DenseCLIP:
    return DenseCLIP(CONFIGS["errseg-tiny"].clip)


WORDS = ["cat", "very long and winding word, with a comma", "sofa", "x", "traffic light"]


def gradients(clip: DenseCLIP, tokens: torch.Tensor, length: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    clip.zero_grad()
    embeddings = clip.encode_text(tokens, length=length)
    (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
    text = [p for n, p in clip.named_parameters() if not n.startswith(("visual", "logit_scale"))]
    return embeddings.detach(), [p.grad.clone() for p in text if p.grad is not None]


def test_cutting_the_context_is_exact(clip: DenseCLIP) -> None:
    tokens = clip.tokenizer.tokenize([PROMPT.format(word) for word in WORDS])
    assert prompt_length(tokens) < 20
    cut, cut_gradients = gradients(clip, tokens, None)
    full, full_gradients = gradients(clip, tokens, tokens.shape[1])
    torch.testing.assert_close(cut, full, rtol=0, atol=1e-12)
    for a, b in zip(cut_gradients, full_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max().clamp_min(1)))


def test_tower_runs_at_the_longest_prompt(clip: DenseCLIP) -> None:
    tokens = clip.tokenizer.tokenize([PROMPT.format("cat"), PROMPT.format("traffic light")])
    lengths = []
    hook = clip.transformer.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    clip.encode_text(tokens)
    hook.remove()
    assert lengths == [11]  # start, seven words of the prompt, two of the name, end


def test_agrees_with_open_clip(clip: DenseCLIP) -> None:
    import open_clip

    vision = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
    reference = open_clip.CLIP(20, vision, {"width": 24, "heads": 3, "layers": 2}).double()
    text = {key: value for key, value in clip.state_dict().items() if not key.startswith("visual")}
    reference.load_state_dict(text, strict=False)
    tokens = clip.tokenizer.tokenize([PROMPT.format(word) for word in WORDS])
    assert torch.equal(tokens, open_clip.tokenize([PROMPT.format(word) for word in WORDS]))
    torch.testing.assert_close(
        clip.encode_text(tokens), reference.encode_text(tokens, normalize=True), rtol=0, atol=1e-12
    )


def test_what_follows_the_end_does_not_matter(clip: DenseCLIP) -> None:
    tokens = clip.tokenizer.tokenize([PROMPT.format("cat"), PROMPT.format("very long word")])
    filled = tokens.clone()
    filled[0, 10:] = 5
    torch.testing.assert_close(clip.encode_text(filled), clip.encode_text(tokens), rtol=0, atol=1e-12)


def test_embed_words(clip: DenseCLIP) -> None:
    words = ["cat", "sofa", "cat", "a much longer name", "cat"]
    seen: list[tuple[int, int]] = []
    embeddings = clip.embed_words(words, prompt=PROMPT, batch_size=2, progress=lambda *done: seen.append(done))
    assert seen == [(2, 3), (3, 3)]
    assert embeddings.shape == (5, 20) and not embeddings.requires_grad
    # Equal words tie exactly whatever batch they would have fallen into.
    assert torch.equal(embeddings[0], embeddings[2]) and torch.equal(embeddings[0], embeddings[4])
    one_by_one = [clip.encode_text(clip.tokenizer.tokenize([PROMPT.format(word)])) for word in words]
    torch.testing.assert_close(embeddings, torch.cat(one_by_one).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5).double())
    assert clip.embed_words([], prompt=PROMPT).shape == (0, 20)


def test_words_with_braces(clip: DenseCLIP) -> None:
    assert clip.embed_words(["{0}", "a {} b"], prompt=PROMPT).shape == (2, 20)


def test_prompt_without_a_place_for_the_word(clip: DenseCLIP) -> None:
    with pytest.raises(ErrSegError, match=r"'a photo' has no \{\}"):
        clip.embed_words(["cat"], prompt="a photo")


def test_long_prompts(clip: DenseCLIP) -> None:
    assert prompt_length(clip.tokenizer.tokenize(["cat " * 75])) == 77
    with pytest.warns(UserWarning, match="cut after 77 tokens"):
        tokens = clip.tokenizer.tokenize(["cat " * 76])
    assert tokens[0, -1] == 49407 and tokens.shape == (1, 77)
    assert clip.encode_text(tokens).shape == (1, 20)


@pytest.mark.parametrize("tokens", [torch.zeros(2, 78, dtype=torch.int64), torch.zeros(2, 5), torch.zeros(5).long()])
def test_wrong_tokens(clip: DenseCLIP, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected tokens"):
        clip.encode_text(tokens)


def test_one_text_is_not_a_list(clip: DenseCLIP) -> None:
    with pytest.raises(ValueError, match="expected a list of texts"):
        clip.tokenizer.tokenize("cat")


# ---- the reduced vocabulary of errseg-tiny


def test_tiny_ids_are_the_toy_world() -> None:
    whole = Tokenizer(16)
    texts = [PROMPT.format(word) for word in (*toy.WORDS, *toy.SHAPE_WORDS, *toy.COLOUR_WORDS)]
    used = whole.tokenize(texts).unique().tolist()
    assert tuple(used[1:]) == TINY_TOKEN_IDS  # all but the padding
    assert len(TINY_TOKEN_IDS) == CONFIGS["errseg-tiny"].clip.text.vocab_size == 36


def test_reduced_ids_are_positions(tiny: DenseCLIP) -> None:
    texts = [PROMPT.format("striped blue ring"), PROMPT.format("grass")]
    whole, reduced = Tokenizer(16).tokenize(texts), tiny.tokenizer.tokenize(texts)
    ends = whole.argmax(1)
    assert torch.equal(ends, reduced.argmax(1))
    for ids, positions, end in zip(whole, reduced, ends.tolist(), strict=True):
        assert [TINY_TOKEN_IDS[i] for i in positions[: end + 1]] == ids[: end + 1].tolist()


def test_reduced_vocabulary_gives_what_the_whole_would(tiny: DenseCLIP) -> None:
    """Rows of a whole token embedding, taken at the listed ids, give the same embeddings."""
    text = TextConfig(width=64, heads=4, layers=2, context_length=16)
    whole = DenseCLIP(ClipConfig(embed_dim=128, vision=VISION, text=text))
    state_dict = {key: value for key, value in tiny.state_dict().items() if not key.startswith(("visual", "token"))}
    whole.load_state_dict(state_dict, strict=False)
    with torch.no_grad():
        whole.token_embedding.weight[list(TINY_TOKEN_IDS)] = tiny.token_embedding.weight
    words = ["striped blue ring", "red thing", "sky"]
    torch.testing.assert_close(tiny.embed_words(words, prompt=PROMPT), whole.embed_words(words, prompt=PROMPT))


def test_unknown_word_lists_the_known_ones(tiny: DenseCLIP) -> None:
    with pytest.raises(ErrSegError) as error:
        tiny.embed_words(["red star", "zebra red"], prompt=PROMPT)
    message = str(error.value)
    assert "'zebra'" in message and "'red'" not in message and "\n" not in message
    assert all(word in message for word in (*toy.BACKGROUNDS, *toy.COLOURS, *toy.SHAPES, "striped", "thing"))


def test_case_and_spaces_do_not_matter(tiny: DenseCLIP) -> None:
    embeddings = tiny.embed_words(["Red  STAR ", "red star"], prompt=PROMPT)
    assert torch.equal(embeddings[0], embeddings[1])


@pytest.mark.parametrize("ids", [(5, 3, 49406, 49407), (3, 5), (3, 3, 49406, 49407)])
def test_bad_token_ids(ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected sorted token ids"):
        Tokenizer(16, ids)


def test_token_ids_argument_overrides(tiny: DenseCLIP) -> None:
    ids = (*TINY_TOKEN_IDS[:5], 49406, 49407)
    clip = DenseCLIP(CONFIGS["errseg-tiny"].clip, token_ids=ids)
    assert clip.token_embedding.weight.shape == (7, 64) and clip.config.text.token_ids == ids


def test_normalised_output(tiny: DenseCLIP) -> None:
    embeddings = tiny.embed_words(list(toy.WORDS), prompt=PROMPT)
    torch.testing.assert_close(embeddings, F.normalize(embeddings, dim=1))
    assert embeddings.shape == (168, 128)
