"""Cosines of pixels and selected words, and their gradients.

Forward is one launch: a program takes the words by their ids, multiplies them with its pixels as they are, adds up the
squares of both on the way, and divides at the end. Gradients start from the inverse lengths that it leaves. With v the
gradient of a unit vector u = x / |x|, that of x is (v - u (u v)) / |x|: pixels get theirs in one launch that makes v
twice. For words one launch makes v, one finds who else selected the same word, and a last one adds these up, in the
order of images and classes, and projects.

Products are float32-grade: those of float32 numbers are split into three tf32 products. The interpreter computes tf32
as float32, so that it cannot show the error of this choice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from errseg.kernels.common import LANGUAGE_DTYPE, Config

PROGRAMS = 132  # one for each multiprocessor


@triton.jit
def _inverse_lengths(squares, DTYPE: tl.constexpr):
    """Rounded once: every cosine and gradient carries this error."""
    lengths = tl.sqrt(squares.to(tl.float64))
    return (1.0 / tl.maximum(lengths, tl.full((), 1e-12, tl.float64))).to(DTYPE)


@triton.jit
def _projection(along, inverse):
    """What is to be taken off per unit of the vector; a length that is clamped does not move with its vector."""
    return tl.where(inverse < tl.full((), 1e12, inverse.dtype), along * inverse * inverse, 0.0)


@triton.jit
def _word_rows(words, class_ids, image, k, num_classes, word_stride):
    """Addresses of the selected words, or of all in order."""
    if class_ids is None:
        return words + k.to(tl.int64) * word_stride
    return words + tl.load(class_ids + image * num_classes + k, mask=k < num_classes, other=0) * word_stride


@triton.jit(do_not_specialize=["num_classes", "save"])
def _cost_volume_fwd_kernel(
    images,  # [B, D, P], by its strides
    words,  # [T, D]
    class_ids,  # [B, K] int64, or None
    costs,  # [B, K, P]
    pixel_scales,  # [B, P], inverse lengths
    word_scales,  # [B, K], likewise
    num_classes,
    num_pixels,
    channels,
    image_stride,
    channel_stride,
    pixel_stride,
    word_stride,
    save,  # 1: the scales are wanted
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    WORDS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    pixel_blocks = tl.cdiv(num_pixels, PIXELS)
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    first_pixel = tl.program_id(0) % pixel_blocks * PIXELS
    channel, column = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    p = first_pixel + column
    k = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    rows = _word_rows(words, class_ids, image, k, num_classes, word_stride)
    tile = images + image * image_stride + first_pixel.to(tl.int64) * pixel_stride
    pixel_offsets = channel[:, None] * channel_stride + column[None, :] * pixel_stride

    sums = tl.zeros((WORDS, PIXELS), SUM)
    word_squares = tl.zeros((WORDS, CHANNELS), SUM)
    pixel_squares = tl.zeros((CHANNELS, PIXELS), SUM)
    for start in range(0, channels, CHANNELS):
        there = channel < channels - start
        inside = (k < num_classes)[:, None] & there[None, :]
        word = tl.load(rows[:, None] + (start + channel)[None, :], mask=inside, other=0.0).to(PRODUCT)
        inside = there[:, None] & (p < num_pixels)[None, :]
        pixel = tl.load(tile + pixel_offsets, mask=inside, other=0.0).to(PRODUCT)
        sums = tl.dot(word, pixel, sums, input_precision=PRECISION, out_dtype=SUM)
        word_squares += word.to(SUM) * word.to(SUM)
        pixel_squares += pixel.to(SUM) * pixel.to(SUM)
        tile += CHANNELS * channel_stride
    word_scale = _inverse_lengths(tl.sum(word_squares, 1), SUM)
    pixel_scale = _inverse_lengths(tl.sum(pixel_squares, 0), SUM)

    cost = sums * word_scale[:, None] * pixel_scale[None, :]
    out = costs + (image * num_classes + k)[:, None] * num_pixels + p[None, :]
    inside = (k < num_classes)[:, None] & (p < num_pixels)[None, :]
    tl.store(out, cost.to(costs.dtype.element_ty), mask=inside)
    saving = (p < num_pixels) & (tl.program_id(1) == 0) & (save != 0)
    tl.store(pixel_scales + image * num_pixels + p, pixel_scale, mask=saving)
    saving = (k < num_classes) & (first_pixel == 0) & (save != 0)
    tl.store(word_scales + image * num_classes + k, word_scale, mask=saving)


@triton.jit
def _selected_words(
    grads, words, class_ids, word_scales, image, k, p, num_classes, num_pixels, word_stride, PRODUCT: tl.constexpr
):
    """Addresses and scales of some words, and the costs' gradients [WORDS, PIXELS]."""
    rows = _word_rows(words, class_ids, image, k, num_classes, word_stride)
    scale = tl.load(word_scales + image * num_classes + k, mask=k < num_classes, other=0.0)
    grad = grads + (image * num_classes + k)[:, None] * num_pixels + p[None, :]
    grad = tl.load(grad, mask=(k < num_classes)[:, None] & (p < num_pixels)[None, :], other=0.0)
    return rows, scale, grad.to(PRODUCT)


@triton.jit
def _add_unit_grads(sums, rows, scale, grad, d, k, channels, num_classes, PRECISION: tl.constexpr):
    """Adds the gradients of the pixels' unit vectors [CHANNELS, PIXELS] that some words cause."""
    inside = (d < channels)[:, None] & (k < num_classes)[None, :]
    word = tl.load(rows[None, :] + d[:, None], mask=inside, other=0.0).to(scale.dtype) * scale[None, :]
    return tl.dot(word.to(grad.dtype), grad, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit(do_not_specialize=["num_classes"])
def _cost_volume_bwd_pixels_kernel(
    grads,  # [B, K, P]
    images,  # [B, D, P], by its strides
    words,  # [T, D]
    class_ids,  # [B, K] int64, or None
    pixel_scales,  # [B, P], inverse lengths
    word_scales,  # [B, K], likewise
    pixel_grads,  # [B, D, P]
    num_classes,
    num_pixels,
    channels,
    image_stride,
    channel_stride,
    pixel_stride,
    word_stride,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    WORDS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ONE_TILE: tl.constexpr,  # K <= WORDS: the loop over channels has no other inside, so that it is pipelined
):
    pixel_blocks = tl.cdiv(num_pixels, PIXELS)
    image = (tl.program_id(0) // pixel_blocks).to(tl.int64)
    first_pixel = tl.program_id(0) % pixel_blocks * PIXELS
    channel, column = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    p = first_pixel + column
    k = tl.arange(0, WORDS)
    images += image * image_stride + first_pixel.to(tl.int64) * pixel_stride
    pixel_grads += image * channels * num_pixels + first_pixel
    pixel_offsets = channel[:, None] * channel_stride + column[None, :] * pixel_stride
    out_offsets = channel[:, None] * num_pixels + column[None, :]
    pixel_scale = tl.load(pixel_scales + image * num_pixels + p, mask=p < num_pixels, other=0.0)
    if ONE_TILE:
        rows, scale, grad = _selected_words(
            grads, words, class_ids, word_scales, image, k, p, num_classes, num_pixels, word_stride, PRODUCT
        )

    projection = tl.zeros((PIXELS,), SUM)
    for writing in tl.static_range(2):
        tile, out = images, pixel_grads
        for start in range(0, channels, CHANNELS):
            d = start + channel
            sums = tl.zeros((CHANNELS, PIXELS), SUM)
            if ONE_TILE:
                sums = _add_unit_grads(sums, rows, scale, grad, d, k, channels, num_classes, PRECISION)
            else:
                for first in range(0, num_classes, WORDS):
                    k = first + tl.arange(0, WORDS)
                    rows, scale, grad = _selected_words(
                        grads,
                        words,
                        class_ids,
                        word_scales,
                        image,
                        k,
                        p,
                        num_classes,
                        num_pixels,
                        word_stride,
                        PRODUCT,
                    )
                    sums = _add_unit_grads(sums, rows, scale, grad, d, k, channels, num_classes, PRECISION)
            inside = (d < channels)[:, None] & (p < num_pixels)[None, :]
            pixel = tl.load(tile + pixel_offsets, mask=inside, other=0.0).to(SUM)
            if writing:
                pixel_grad = (sums - pixel * projection[None, :]) * pixel_scale[None, :]
                tl.store(out + out_offsets, pixel_grad.to(pixel_grads.dtype.element_ty), mask=inside)
            else:
                projection += tl.sum(sums * pixel, 0)
            tile += CHANNELS * channel_stride
            out += CHANNELS * num_pixels
        projection = _projection(projection, pixel_scale)


@triton.jit(do_not_specialize=["num_classes", "pixels_per_split"])
def _cost_volume_bwd_words_kernel(
    grads,  # [B, K, P]
    images,  # [B, D, P], by its strides
    pixel_scales,  # [B, P], inverse lengths
    unit_grads,  # [B, K, splits, D]: of the words' unit vectors
    num_classes,
    num_pixels,
    channels,
    image_stride,
    channel_stride,
    pixel_stride,
    pixels_per_split,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    WORDS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    first_channel = tl.program_id(0) % channel_blocks * CHANNELS
    split, splits = tl.program_id(0) // channel_blocks, tl.num_programs(0) // channel_blocks
    image = tl.program_id(2).to(tl.int64)
    channel, column = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    d = first_channel + channel
    k = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    first_pixel = split * pixels_per_split
    end = tl.minimum(first_pixel + pixels_per_split, num_pixels)
    tile = images + image * image_stride + first_channel.to(tl.int64) * channel_stride
    tile += first_pixel.to(tl.int64) * pixel_stride
    pixel_offsets = channel[:, None] * channel_stride + column[None, :] * pixel_stride
    rows = grads + (image * num_classes + k) * num_pixels
    pixel_scales += image * num_pixels

    sums = tl.zeros((CHANNELS, WORDS), SUM)
    for start in range(first_pixel, end, PIXELS):
        p = start + column
        inside = (d < channels)[:, None] & (p < end)[None, :]
        pixel = tl.load(tile + pixel_offsets, mask=inside, other=0.0).to(SUM)
        pixel *= tl.load(pixel_scales + p, mask=p < end, other=0.0)[None, :]
        inside = (p < end)[:, None] & (k < num_classes)[None, :]
        grad = tl.load(rows[None, :] + p[:, None], mask=inside, other=0.0)  # [PIXELS, WORDS]
        sums = tl.dot(pixel.to(PRODUCT), grad.to(PRODUCT), sums, input_precision=PRECISION, out_dtype=SUM)
        tile += PIXELS * pixel_stride
    out = unit_grads + (((image * num_classes + k) * splits + split) * channels)[None, :] + d[:, None]
    tl.store(out, sums, mask=(d < channels)[:, None] & (k < num_classes)[None, :])


@triton.jit(do_not_specialize=["pairs"])
def _cost_volume_bwd_order_kernel(
    class_ids,  # [pairs], of image and class
    following,  # [pairs] int32: the next pair with the same word, `pairs` behind the last
    leading,  # [pairs] int32: 1 for the first pair of a word, else 0
    pairs,
    PAIRS: tl.constexpr,
):
    i = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    own = tl.load(class_ids + i, mask=i < pairs, other=0)
    after = tl.zeros((PAIRS,), tl.int32) + pairs
    before = tl.zeros((PAIRS,), tl.int32)
    for start in range(0, pairs, PAIRS):
        j = start + tl.arange(0, PAIRS)
        other = tl.load(class_ids + j, mask=j < pairs, other=0)
        same = (own[:, None] == other[None, :]) & (j < pairs)[None, :]
        after = tl.minimum(after, tl.min(tl.where(same & (j[None, :] > i[:, None]), j[None, :], pairs), 1))
        before += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
    tl.store(following + i, after, mask=i < pairs)
    tl.store(leading + i, (before == 0).to(tl.int32), mask=i < pairs)


@triton.jit(do_not_specialize=["pairs", "num_classes", "splits"])
def _cost_volume_bwd_sum_kernel(
    unit_grads,  # [pairs, splits, D]
    words,  # [T, D]
    class_ids,  # [pairs] int64, or None
    following,  # [pairs], or None
    leading,  # [pairs], or None
    word_scales,  # [pairs]
    word_grads,  # [T, D]
    pairs,
    num_classes,
    splits,
    channels,
    word_stride,
    SUM: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    first = tl.program_id(0)
    t = first.to(tl.int64)
    if class_ids is not None:
        if tl.load(leading + first) == 0:
            return
        t = tl.load(class_ids + first)
    split = tl.arange(0, SPLITS)
    scale = tl.load(word_scales + first)
    projection = tl.zeros((1,), SUM)
    for writing in tl.static_range(2):
        for start in range(0, channels, CHANNELS):
            d = start + tl.arange(0, CHANNELS)
            total = tl.zeros((CHANNELS,), SUM)
            pair = first
            while pair < pairs:
                parts = unit_grads + (pair.to(tl.int64) * splits + split)[:, None] * channels + d[None, :]
                inside = (split < splits)[:, None] & (d < channels)[None, :]
                total += tl.sum(tl.load(parts, mask=inside, other=0.0), 0)
                pair = pair + num_classes if class_ids is None else tl.load(following + pair)
            word = tl.load(words + t * word_stride + d, mask=d < channels, other=0.0).to(SUM)
            if writing:
                word_grad = (total - word * projection) * scale
                out = word_grads + t * channels + d
                tl.store(out, word_grad.to(word_grads.dtype.element_ty), mask=d < channels)
            else:
                projection += tl.sum(total * word, 0)
        projection = _projection(projection, scale)


# WORDS, PIXELS, CHANNELS, warps and stages of each product; "many" is for more words than a tile has
_HALF = {
    "fwd": (64, 32, 64, 4, 4),
    "bwd pixels": (64, 32, 64, 4, 4),
    "bwd pixels many": (64, 32, 64, 8, 2),
    "bwd words": (64, 64, 64, 8, 3),
}
_TILES = {
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
    torch.float32: {
        "fwd": (64, 32, 32, 4, 3),
        "bwd pixels": (64, 32, 64, 4, 2),
        "bwd pixels many": (16, 32, 64, 4, 3),
        "bwd words": (64, 16, 64, 8, 3),
    },
    torch.float64: {
        "fwd": (32, 16, 16, 4, 2),
        "bwd pixels": (16, 16, 32, 4, 2),
        "bwd pixels many": (16, 16, 32, 4, 2),
        "bwd words": (16, 32, 32, 4, 2),
    },
}
CONFIGS: dict[str, Config] = {}


def _product_dtype(image: torch.dtype, text: torch.dtype) -> torch.dtype:
    """The dtype that is multiplied: float64 for float64 pixels, half precision where both agree, else float32."""
    return image if image in (torch.float64, text) else torch.float32


def _add_configs(label: str, image: torch.dtype, text: torch.dtype, sizes: tuple[int, ...], last: bool) -> None:
    """The products for typical ``sizes`` (K, P, D) of images that lie as [D, P] or with the channels last."""
    product = _product_dtype(image, text)
    total = torch.promote_types(product, torch.float32)
    _, num_pixels, channels = sizes
    scales, strides = (total, total), (channels * num_pixels, *((1, channels) if last else (num_pixels, 1)))
    ids = torch.int64
    fwd = image, text, ids, image, *scales, *sizes, *strides, channels, 1
    bwd_pixels = image, image, text, ids, *scales, image, *sizes, *strides, channels
    bwd_words = image, image, total, total, *sizes, *strides, 512
    kernels = {
        "fwd": (_cost_volume_fwd_kernel, fwd, {}),
        "bwd pixels": (_cost_volume_bwd_pixels_kernel, bwd_pixels, {"ONE_TILE": True}),
        "bwd words": (_cost_volume_bwd_words_kernel, bwd_words, {}),
    }
    if label == str(product):
        kernels["bwd pixels many"] = _cost_volume_bwd_pixels_kernel, bwd_pixels, {"ONE_TILE": False}
    for name, (kernel, arguments, constants) in kernels.items():
        *tile, warps, stages = _TILES[product][name]
        constants |= {
            "PRODUCT": LANGUAGE_DTYPE[product],
            "SUM": LANGUAGE_DTYPE[total],
            "PRECISION": "tf32x3" if product == torch.float32 else "ieee",
            **dict(zip(("WORDS", "PIXELS", "CHANNELS"), tile, strict=True)),
        }
        # With 8 warps and a loop inside the loop ptxas would rather spill than take more than half of the registers.
        limit = 255 if name == "bwd pixels many" else None
        CONFIGS[f"{name} {label}"] = Config(kernel, arguments, constants, warps, stages, limit)


for _dtype in _TILES:
    _add_configs(str(_dtype), _dtype, _dtype, (48, 1600, 640), last=True)
# Never launched by these names, but compiled ahead of time: other layouts, odd sizes, two types.
_add_configs("float32 [D, P]", torch.float32, torch.float32, (48, 1600, 640), last=False)
_add_configs("bfloat16 odd", torch.bfloat16, torch.bfloat16, (48, 1599, 641), last=False)
_add_configs("bfloat16, float32", torch.bfloat16, torch.float32, (48, 1600, 640), last=True)
for _total in (torch.float32, torch.float64):
    CONFIGS[f"bwd sum {_total}"] = Config(
        _cost_volume_bwd_sum_kernel,
        (_total, _total, torch.int64, torch.int32, torch.int32, _total, _total, 48, 48, 13, 640, 640),
        {"SUM": LANGUAGE_DTYPE[_total], "SPLITS": 16, "CHANNELS": 256},
        num_warps=4,
    )
CONFIGS["bwd order"] = Config(
    _cost_volume_bwd_order_kernel, (torch.int64, torch.int32, torch.int32, 48), {"PAIRS": 64}, num_warps=4
)


def forward(
    image_embeddings: Tensor, text_embeddings: Tensor, class_ids: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines [B, K, H, W] and, in training, the inverse lengths of pixels [B, P] and words [B, K]."""
    batch, channels, height, width = image_embeddings.shape
    images, strides = _columns(image_embeddings)
    words = _rows(text_embeddings)
    num_classes, num_pixels = len(words) if class_ids is None else class_ids.shape[1], height * width
    product = _product_dtype(images.dtype, words.dtype)
    costs = images.new_empty((batch, num_classes, height, width))
    scales = [
        images.new_empty((batch, size) if training else 0, dtype=torch.promote_types(product, torch.float32))
        for size in (num_pixels, num_classes)
    ]
    config = CONFIGS[f"fwd {product}"]
    grid = batch * triton.cdiv(num_pixels, config.constants["PIXELS"]), _word_tiles(config, num_classes)
    if costs.numel():
        tensors = images, words, None if class_ids is None else class_ids.contiguous(), costs, *scales
        config.launch(grid, *tensors, num_classes, num_pixels, channels, *strides, words.stride(0), int(training))
    return costs, *scales


def backward(
    grad: Tensor,
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    class_ids: Tensor | None,
    pixel_scales: Tensor,
    word_scales: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of the embeddings; of words, those that were not selected have none."""
    arguments = grad.contiguous(), image_embeddings, text_embeddings, class_ids, pixel_scales, word_scales
    pixel_grads = _backward_pixels(*arguments) if needed[0] else image_embeddings.new_empty(0)
    word_grads = _backward_words(*arguments) if needed[1] else text_embeddings.new_empty(0)
    return [pixel_grads, word_grads]


def _backward_pixels(
    grad: Tensor, image: Tensor, text: Tensor, class_ids: Tensor | None, pixel_scales: Tensor, word_scales: Tensor
) -> Tensor:
    (batch, num_classes, height, width), channels = grad.shape, image.shape[1]
    images, strides = _columns(image)
    words = _rows(text)
    if not grad.numel() * channels:
        return images.new_zeros(image.shape)
    product = _product_dtype(images.dtype, words.dtype)
    pixel_grads = images.new_empty(image.shape)
    one_tile = num_classes <= CONFIGS[f"bwd pixels {product}"].constants["WORDS"]
    config = CONFIGS[f"bwd pixels {'' if one_tile else 'many '}{product}"]
    ids = None if class_ids is None else class_ids.contiguous()
    grid = (batch * triton.cdiv(height * width, config.constants["PIXELS"]),)
    tensors = grad, images, words, ids, pixel_scales, word_scales, pixel_grads
    config.launch(grid, *tensors, num_classes, height * width, channels, *strides, words.stride(0))
    return pixel_grads


def _backward_words(
    grad: Tensor, image: Tensor, text: Tensor, class_ids: Tensor | None, pixel_scales: Tensor, word_scales: Tensor
) -> Tensor:
    (batch, num_classes, height, width), channels = grad.shape, image.shape[1]
    pairs, num_pixels = batch * num_classes, height * width
    images, strides = _columns(image)
    words = _rows(text)
    if not grad.numel() * channels:
        return words.new_zeros(words.shape)

    product = _product_dtype(images.dtype, words.dtype)
    config, total = CONFIGS[f"bwd words {product}"], CONFIGS[f"bwd sum {pixel_scales.dtype}"]
    channel_blocks, word_tiles = triton.cdiv(channels, config.constants["CHANNELS"]), _word_tiles(config, num_classes)
    pixel_tiles = triton.cdiv(num_pixels, config.constants["PIXELS"])
    most = min(total.constants["SPLITS"], PROGRAMS // (channel_blocks * word_tiles * batch))
    pixels_per_split = triton.cdiv(pixel_tiles, max(1, most)) * config.constants["PIXELS"]
    splits = triton.cdiv(num_pixels, pixels_per_split)
    unit_grads = pixel_scales.new_empty((pairs, splits, channels))
    sizes = num_classes, num_pixels, channels, *strides, pixels_per_split
    config.launch((channel_blocks * splits, word_tiles, batch), grad, images, pixel_scales, unit_grads, *sizes)

    ids = following = leading = None
    if class_ids is None:
        word_grads = words.new_empty(words.shape)
    else:
        word_grads, ids = words.new_zeros(words.shape), class_ids.contiguous()
        following, leading = ids.new_empty((2, pairs), dtype=torch.int32)
        order = CONFIGS["bwd order"]
        order.launch((triton.cdiv(pairs, order.constants["PAIRS"]),), ids, following, leading, pairs)
    tensors = unit_grads, words, ids, following, leading, word_scales, word_grads
    programs = num_classes if ids is None else pairs
    total.launch((programs,), *tensors, pairs, num_classes, splits, channels, words.stride(0))
    return word_grads


def _word_tiles(config: Config, num_classes: int) -> int:
    return triton.cdiv(num_classes, config.constants["WORDS"])


def _columns(image: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """[B, D, H, W] and the strides of [B, D, P]; a copy only where neither channels nor pixels are neighbours."""
    _, channels, height, width = image.shape
    image_stride, channel_stride, row_stride, pixel_stride = image.stride()
    in_rows = height == 1 or row_stride == width * pixel_stride
    if not in_rows or 1 not in (channel_stride, pixel_stride):
        image = image.contiguous()
        image_stride, channel_stride, pixel_stride = channels * height * width, height * width, 1
    return image, (image_stride, channel_stride, pixel_stride)


def _rows(text: Tensor) -> Tensor:
    """[T, D] whose rows are contiguous, whatever lies between them."""
    return text if text.stride(1) == 1 else text.contiguous()
