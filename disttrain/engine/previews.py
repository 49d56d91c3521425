"""Preview pictures of what a pack has learned so far.

Drawn by rank zero from the pack's own layers, with fixed seeds, into `subjects/NAME/samples/`; the
prompt and settings lie in each PNG's text. Invariant: previews change nothing that trains, so a run
with previews ends with the weights of one without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disttrain.config import RunConfig
from disttrain.data.images import encode_png
from disttrain.engine.pack import Pack
from disttrain.engine.run_folder import RunFolder
from disttrain.engine.slot import Slot
from disttrain.files import write_bytes
from disttrain.models.packed import placed
from disttrain.models.sampler import DrawSettings, decode_latents, draw_latents, to_pixels
from disttrain.models.text import encode_ids
from disttrain.prompts import prompt_plan


def preview_settings(config: RunConfig) -> DrawSettings:
    """How previews are drawn."""
    side, train = config.data.resolution, config.train
    return DrawSettings(train.sample_steps, train.sample_guidance_scale, side, side)


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


def draw_previews(pack: Pack, wanted: Sequence[Slot], config: RunConfig, folder: RunFolder) -> None:
    """Write one picture for each wanted slot and sample prompt; rank zero only (no collective)."""
    prompts = config.train.sample_prompts
    # Of all slots, because the layers of a pack want as many rows for each.
    slots = [slot for slot in range(len(pack.slots)) for _ in prompts]
    texts = [
        prompt_plan(slot.config, slot.subject).fill(prompt)
        for slot in pack.slots
        for prompt in prompts
    ]
    negative_text = config.train.sample_negative_prompt
    seeds = [config.train.sample_seed] * len(texts)
    settings = preview_settings(config)
    training = pack.base.unet.training
    pack.base.unet.eval()
    for part in (pack.base.unet, pack.base.text_encoder):  # whole copies wait in main memory
        placed(part, pack.mesh.device)
    with torch.no_grad(), pack.mesh.autocast():
        context = pack_context(pack, slots, texts)
        negative = pack_context(pack, slots, [negative_text] * len(texts))
        dtype = pack.base.unet.dtype
        latents = draw_latents(
            pack.base.unet,
            pack.base.pipeline_scheduler,
            context.to(dtype),
            negative.to(dtype),
            seeds,
            settings,
            pack.base.latent_scale,
        )
    pack.base.unet.train(training)
    vae = placed(pack.base.load_vae(), pack.mesh.device)
    pictures = to_pixels(decode_latents(vae, latents.float()))
    for i, (number, text) in enumerate(zip(slots, texts, strict=True)):
        slot = pack.slots[number]
        if slot in wanted:
            path = folder.subject(slot.name) / "samples"
            note = parameters_text(config, text, negative_text, seeds[i], settings)
            name = f"{slot.step:08d}-{i % len(prompts)}.png"
            write_bytes(path / name, encode_png(pictures[i], {"parameters": note}))


def parameters_text(
    config: RunConfig, prompt: str, negative: str, seed: int, settings: DrawSettings
) -> str:
    """Prompt and settings in the layout that web UIs write under `parameters` and read back."""
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    lines.append(
        f"Steps: {settings.steps}, Sampler: DDIM, CFG scale: {settings.guidance_scale:g}, "
        f"Seed: {seed}, Size: {settings.width}x{settings.height}, Model: {config.base_model}"
    )
    return "\n".join(lines)
