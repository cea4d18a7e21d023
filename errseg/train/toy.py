"""How errseg-tiny was made: the toy world, two towers from nothing, then the decoder on top of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errseg.data.toy import BACKGROUND_IDS, training_vocabularies
from errseg.data.toy.render import render_scenes
from errseg.model.clip import DenseCLIP, DenseFeatures, copy_downsample
from errseg.model.errseg import ERRSeg, create_model
from errseg.ops import cost_volume, upsample_bce
from errseg.train.batches import scene_batches, training_tensors
from errseg.train.loop import Losses, fit, make_accelerator
from errseg.train.losses import class_fractions, soft_cross_entropy
from errseg.train.optim import Group, MuonWithAdamW, Schedule, trapezoid


@dataclass(frozen=True)
class Recipe:
    """Every number of the run; the defaults made the shipped weights."""

    seed: int = 0
    scenes: int = 8192
    batch_size: int = 8
    tower_steps: int = 2200  # towers alone
    joint_steps: int = 1500  # then everything, while the rates fall to 0
    decoder_images: int = 8  # of the batch that also go through the decoder
    num_selected: int = 12  # K in training
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    decoder_muon_lr: float = 0.012
    decoder_adamw_lr: float = 2.5e-3
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 100
    clip_norm: float = 1.0
    object_weight: float = 2.0  # added to the weight 1 of a cell, times its share of object pixels
    coarse_every: int = 4  # from half of the tower steps on, every so many steps use coarser words
    processes: int = 2

    def vocabulary_at(self, step: int) -> int:
        """Which of `training_vocabularies` a step uses: 0 all words, 1 by shape, 2 by colour."""
        if step < self.tower_steps // 2 or step % self.coarse_every:
            return 0
        return 1 + step // self.coarse_every % 2

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.tower_steps + self.joint_steps


class ToyObjective(nn.Module):
    """The losses of errseg-tiny over one of the training vocabularies.

    Without pre-trained towers the cosines are noise: votes, selection and decoder have nothing to work on. A
    cross-entropy over the cosines of every os16 and os32 cell stands in for CLIP's pre-training.
    """

    def __init__(self, model: ERRSeg, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        for i, (words, indices) in enumerate(training_vocabularies()):
            prompts = [model.config.prompt.replace("{}", word) for word in words]
            self.register_buffer(f"tokens{i}", model.clip.tokenizer.tokenize(prompts), persistent=False)
            self.register_buffer(f"indices{i}", torch.tensor(indices), persistent=False)

    def forward(self, image: Tensor, labels: Tensor, *, vocabulary: int, decode: bool) -> Losses:
        """Losses for images [B, 3, S, S] in 0..255 and labels [B, S, S] int64 into `TRAINING_IDS`.

        `vocabulary` counts into `training_vocabularies`; `decode` adds the decoder's losses to the towers'.
        """
        labels = self.get_buffer(f"indices{vocabulary}")[labels]
        features = self.model.clip(self.model.normalize(image))
        text = self.model.clip.encode_text(self.get_buffer(f"tokens{vocabulary}"))  # [T, D]
        scale = self.model.clip.logit_scale.exp().clamp(max=50)
        os4 = class_fractions(labels, len(text), 4)
        os16 = F.avg_pool2d(os4, 4)
        losses = {
            "ce16": self._cell_loss(scale * cost_volume(features.os16_dense, text), os16),
            "ce32": 0.5 * self._cell_loss(scale * cost_volume(features.os32_dense, text), F.avg_pool2d(os16, 2)),
        }
        if decode:
            count = self.recipe.decoder_images
            some = DenseFeatures(*(feature[:count] for feature in features))
            losses |= self._decoder_losses(some, text, labels[:count], os4[:count])
        return losses

    def _decoder_losses(self, features: DenseFeatures, text: Tensor, labels: Tensor, os4: Tensor) -> Losses:
        present = os4.flatten(2).any(2)
        output = self.model.decoder(features, text, num_selected=self.recipe.num_selected, required=present)
        bce = upsample_bce(output.logits, output.class_ids, labels, vocabulary_size=len(text))
        selected = output.class_ids[:, :, None, None].expand_as(output.logits)
        # The published loss asks word by word "is this a red star?"; the second lets the words compete.
        return {
            "bce": 0.5 * len(text) * bce,
            "ce4": 0.5 * self._cell_loss(output.logits, os4.gather(1, selected), os4),
        }

    def _cell_loss(self, logits: Tensor, target: Tensor, fractions: Tensor | None = None) -> Tensor:
        objects = (target if fractions is None else fractions)[:, len(BACKGROUND_IDS) :].sum(1)
        return soft_cross_entropy(logits, target, 1 + self.recipe.object_weight * objects)


@torch.no_grad()
def initialise_towers(clip: DenseCLIP) -> None:
    """Fan-in scales for narrow towers that train from nothing (the usual ones leave them nearly silent)."""
    for module in clip.visual.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    copy_downsample(clip.visual.trunk.stages[3].downsample, clip.visual.modify_downsample)
    nn.init.normal_(clip.token_embedding.weight, std=0.3)
    for block in clip.transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=0.25)
        nn.init.normal_(block.attn.out_proj.weight, std=0.125)
    clip.logit_scale.fill_(math.log(20))


def make_optimizer(model: ERRSeg, recipe: Recipe) -> MuonWithAdamW:
    """One falling curve for everything; the decoder joins when the towers have learned to name things."""

    def schedule(start: int) -> Schedule:
        return trapezoid(start, recipe.steps, warmup=recipe.warmup, decay=recipe.joint_steps)

    towers = Group(model.clip.named_parameters(), schedule(0), recipe.muon_lr, recipe.adamw_lr)
    decoder = Group(
        model.decoder.named_parameters(),
        schedule(recipe.tower_steps),
        recipe.decoder_muon_lr,
        recipe.decoder_adamw_lr,
    )
    return MuonWithAdamW([towers, decoder], weight_decay=recipe.weight_decay, betas=recipe.betas)


def train_tiny(
    recipe: Recipe = Recipe(),
    *,
    device: str | None = None,
    on_render: Callable[[int, int], object] | None = None,
    on_step: Callable[[int, Losses], object] | None = None,
) -> ERRSeg:
    """Train errseg-tiny from nothing: about 15 minutes on two CPU cores.

    `on_render(done, count)` and `on_step(step, losses)` report progress; ErrSegError without accelerate.
    """
    accelerator = make_accelerator(device)
    torch.manual_seed(recipe.seed)
    model = create_model("errseg-tiny", "random")
    initialise_towers(model.clip)
    size = model.config.size
    images, labels = training_tensors(
        *render_scenes(recipe.seed, recipe.scenes, size, processes=recipe.processes, progress=on_render)
    )
    batches = scene_batches(images, labels, recipe.batch_size, torch.Generator().manual_seed(recipe.seed))
    # Channels last spares the convolutions on a CPU their conversions: about a tenth of a step.
    objective = ToyObjective(model, recipe).to(accelerator.device).to(memory_format=torch.channels_last)

    def losses_at(step: int) -> Losses:
        image, target = (tensor.to(accelerator.device) for tensor in next(batches))
        return objective(image, target, vocabulary=recipe.vocabulary_at(step), decode=step >= recipe.tower_steps)

    optimizer = make_optimizer(model, recipe)
    for step, losses in fit(accelerator, objective, optimizer, recipe.steps, losses_at, clip_norm=recipe.clip_norm):
        if on_step is not None:
            on_step(step, losses)
    return model.to("cpu").to(memory_format=torch.contiguous_format).eval()
