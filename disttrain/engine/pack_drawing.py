"""Drawing with a pack's own layers: for each of its slots other prompts, all in one batch.

Between a pack and what is drawn of it: previews, and the pictures that scores are made of. Called
inside `Pack.whole`, on rank zero, and performs no collective. Invariant: nothing that trains
changes, and a slot's pictures depend on its own prompts, seeds and tensors only (to rounding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from disttrain.engine.artist import DRAWN_TOGETHER, Ask, Drawn
from disttrain.engine.pack import Pack
from disttrain.models.packed import placed
from disttrain.models.sampler import DrawSettings, decode_latents, draw_latents, to_pixels
from disttrain.models.text import encode_ids

FILLER: Ask = ("", 0)
"""What a slot draws of which less is asked than of others: a pack wants as many rows of each."""


@torch.no_grad()
def pack_context(pack: Pack, slots: list[int], prompts: list[str]) -> Tensor:
    """Contexts of prompts, as the pack's text encoder gives them; row i belongs to `slots[i]`."""
    if not pack.method.trains_text:
        return pack.contexts.get(prompts)
    ids = torch.stack(
        [
            pack.method.tokenizer.ids(prompt, pack.method.new_word(slot))
            for slot, prompt in zip(slots, prompts, strict=True)
        ]
    )
    return encode_ids(pack.base.text_encoder, ids.to(pack.mesh.device))


@contextmanager
def at_rest(pack: Pack) -> Iterator[None]:
    """Inside, the pack's model is where it can draw, and does not train."""
    training = pack.base.unet.training
    pack.base.unet.eval()
    for part in (pack.base.unet, pack.base.text_encoder):  # whole copies wait in main memory
        placed(part, pack.mesh.device)
    try:
        with torch.no_grad(), pack.mesh.autocast():
            yield
    finally:
        pack.base.unet.train(training)


def draw_rows(
    pack: Pack, asked: Sequence[Sequence[Ask]], negative: str, settings: DrawSettings
) -> list[Tensor]:
    """Latents `[N, C, h, w]` of each slot, in one batch.

    Args:
        asked: by slot, the same number N of each.
    """
    slots = [slot for slot, own in enumerate(asked) for _ in own]
    rows = [ask for own in asked for ask in own]
    with at_rest(pack):
        dtype = pack.base.unet.dtype
        latents = draw_latents(
            pack.base.unet,
            pack.base.pipeline_scheduler,
            pack_context(pack, slots, [prompt for prompt, _ in rows]).to(dtype),
            pack_context(pack, slots, [negative] * len(rows)).to(dtype),
            [seed for _, seed in rows],
            settings,
            pack.base.latent_scale,
        )
    return list(latents.float().unflatten(0, (len(asked), -1)))


def open_vae(pack: Pack) -> AutoencoderKL:
    """The autoencoder that turns the latents of a pack into pictures."""
    return placed(pack.base.load_vae(), pack.mesh.device)


def draw_for_slots(
    pack: Pack, asked: Sequence[Sequence[Ask]], settings: DrawSettings
) -> list[Drawn | None]:
    """What each slot draws of what is asked of it, a few pictures at a time.

    Args:
        asked: by slot; of some nothing.

    Returns:
        By slot; None where nothing was asked or the model draws numbers that are not finite.
    """
    at_once = max(1, DRAWN_TOGETHER // len(asked))
    found: list[list[Tensor]] = [[] for _ in asked]
    for begin in range(0, max(map(len, asked)), at_once):
        rows = [
            [own[i] if i < len(own) else FILLER for i in range(begin, begin + at_once)]
            for own in asked
        ]
        for own, latents in zip(found, draw_rows(pack, rows, "", settings), strict=True):
            own.append(latents)
    vae = open_vae(pack)
    drawn: list[Drawn | None] = []
    for own, parts in zip(asked, found, strict=True):
        latents = torch.cat(parts)[: len(own)]
        fine = bool(own) and bool(latents.isfinite().all())
        drawn.append(Drawn(to_pixels(decode_latents(vae, latents)), latents) if fine else None)
    return drawn


def draw_anywhere(pack: Pack, asked: Sequence[Ask], settings: DrawSettings) -> Drawn | None:
    """What a pack draws of a list whatever the slot, spread over all of them."""
    slots = len(pack.slots)
    each = -(-len(asked) // slots)
    spread = [list(asked[i * each : (i + 1) * each]) for i in range(slots)]
    found = draw_for_slots(pack, spread, settings)
    parts = [part for part in found if part is not None]
    if len(parts) < sum(map(bool, spread)):
        return None
    return Drawn(
        np.concatenate([part.pictures for part in parts]), torch.cat([p.latents for p in parts])
    )
