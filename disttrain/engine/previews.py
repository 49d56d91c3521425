"""Preview pictures of what a pack has learned so far.

Drawn by rank zero from the pack's own layers, with fixed seeds, into `subjects/NAME/samples/`; the
prompt and settings lie in each PNG's text. Invariant: previews change nothing that trains, so a run
with previews ends with the weights of one without.
"""

from __future__ import annotations

from collections.abc import Sequence

from disttrain.config import RunConfig
from disttrain.data.images import encode_png
from disttrain.engine.pack import Pack
from disttrain.engine.pack_drawing import draw_rows, open_vae
from disttrain.engine.run_folder import RunFolder
from disttrain.engine.slot import Slot
from disttrain.files import write_bytes
from disttrain.models.sampler import DrawSettings, decode_latents, to_pixels
from disttrain.prompts import prompt_plan


def preview_settings(config: RunConfig) -> DrawSettings:
    """How previews are drawn."""
    side, train = config.data.resolution, config.train
    return DrawSettings(train.sample_steps, train.sample_guidance_scale, side, side)


def draw_previews(pack: Pack, wanted: Sequence[Slot], config: RunConfig, folder: RunFolder) -> None:
    """Write one picture for each wanted slot and sample prompt; rank zero only (no collective)."""
    train, settings = config.train, preview_settings(config)
    negative, seed = train.sample_negative_prompt, train.sample_seed
    texts = [
        [prompt_plan(slot.config, slot.subject).fill(prompt) for prompt in train.sample_prompts]
        for slot in pack.slots
    ]
    # Of all slots, because the layers of a pack want as many rows for each.
    asked = [[(text, seed) for text in own] for own in texts]
    drawn = draw_rows(pack, asked, negative, settings)
    vae = open_vae(pack)
    for slot, own, latents in zip(pack.slots, texts, drawn, strict=True):
        if slot not in wanted:
            continue
        path = folder.subject(slot.name) / "samples"
        pictures = to_pixels(decode_latents(vae, latents))
        for i, (text, picture) in enumerate(zip(own, pictures, strict=True)):
            note = parameters_text(config, text, negative, seed, settings)
            name = f"{slot.step:08d}-{i}.png"
            write_bytes(path / name, encode_png(picture, {"parameters": note}))


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
