"""The embedded base: real vocabulary, a diffusers folder of the promised size, and it can draw."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disttrain.data.images import decode
from disttrain.models.sampler import DrawSettings, decode_latents, draw_latents, to_pixels
from disttrain.models.text import PromptTokenizer, encode_ids
from disttrain.models.tiny import TINY_BASE, load_tiny
from disttrain.models.vocabulary import clip_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


def test_vocabulary_is_clips(tiny):
    ids = tiny.tokenizer("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tiny.tokenizer("sks ohwx").input_ids == [49406, 48136, 47993, 49407]
    assert len(tiny.tokenizer) == 49408
    assert tiny.tokenizer.model_max_length == 77
    padded = tiny.tokenizer("fox", padding="max_length", truncation=True).input_ids
    assert len(padded) == 77
    assert padded[-1] == 49407
    assert tiny.tokenizer.decode(ids, skip_special_tokens=True) == "a photo of a cat"


def test_vocabulary_covers_every_byte_and_case():
    tokenizer = clip_tokenizer()
    assert tokenizer("A PHOTO").input_ids == tokenizer("a photo").input_ids
    assert tokenizer.unk_token_id not in tokenizer("żółw 狐 🦊", add_special_tokens=False).input_ids


def test_padding_of_stable_diffusion_2():
    tokenizer = clip_tokenizer("!")
    assert tokenizer("fox", padding="max_length").input_ids[-1] == 0


def test_added_tokens_survive_saving(tmp_path):
    tokenizer = clip_tokenizer()
    assert tokenizer.add_tokens(["<fox>", "<fox>_1"]) == 2
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path, local_files_only=True)
    assert again("a <fox>_1 here").input_ids == tokenizer("a <fox>_1 here").input_ids
    assert 49409 in again("a <fox>_1 here").input_ids
    assert again.model_max_length == 77


def test_each_tokenizer_is_its_own():
    clip_tokenizer().add_tokens(["<fox>"])
    assert len(clip_tokenizer()) == 49408


def test_torchs_random_state_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    load_tiny().load_vae()
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_small_and_stock_diffusers_loads_it():
    size = sum(path.stat().st_size for path in TINY_BASE.rglob("*") if path.is_file())
    assert size < 25e6
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        TINY_BASE, dtype=torch.float32, local_files_only=True
    )
    assert pipeline.tokenizer("a photo of a cat").input_ids[1:3] == [320, 1125]


def test_it_draws_colours_that_prompts_name(tiny):
    tokenizer = PromptTokenizer(tiny.tokenizer)
    seeds = list(range(6))
    reds = {}
    with torch.no_grad():
        for prompt in ("red apple", "green apple"):
            ids = torch.stack([tokenizer.ids(text, "") for text in (prompt, "")])
            words = encode_ids(tiny.text_encoder, ids)
            latents = draw_latents(
                tiny.unet,
                tiny.pipeline_scheduler,
                words[:1].expand(6, -1, -1),
                words[1:].expand(6, -1, -1),
                seeds,
                DrawSettings(20, 3.0, 64, 64),
                tiny.latent_scale,
            )
            pixels = to_pixels(decode_latents(tiny.load_vae(), latents)).astype(float)
            middle = pixels[:, 24:48, 20:44].mean(axis=(1, 2))
            reds[prompt] = middle[:, 0] - middle[:, 1]
    assert (reds["red apple"] > 30).sum() >= 5
    assert (reds["green apple"] < 0).sum() >= 4


def test_parts_fit_together_and_are_frozen(tiny):
    assert (tiny.family, tiny.prediction_type) == ("sd1", "v_prediction")
    assert (tiny.latent_channels, tiny.latent_scale, tiny.resolution) == (8, 8, 64)
    ids = torch.tensor(tiny.tokenizer(["a fox", "a cat"], padding="max_length").input_ids)
    with torch.no_grad():
        context = tiny.text_encoder(ids).last_hidden_state
        noise = tiny.unet(torch.zeros(2, 8, 8, 8), torch.tensor([1, 900]), context).sample
        vae = tiny.load_vae()
        picture = vae.decode(torch.zeros(1, 8, 8, 8)).sample
    assert context.shape == (2, 77, 64)
    assert noise.shape == (2, 8, 8, 8)
    assert picture.shape == (1, 3, 64, 64)
    assert not torch.equal(noise[0], noise[1])
    for part in (tiny.unet, tiny.text_encoder, vae):
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())
        assert all(weight.dtype == torch.float32 for weight in part.parameters())
        assert all(weight.data_ptr() % 64 == 0 for weight in part.parameters())


def test_attention_at_two_resolutions(tiny):
    names = {
        name.split(".attentions")[0] for name, _ in tiny.unet.named_modules() if "attn2" in name
    }
    assert {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.2"} == names
    assert 3e6 < sum(weight.numel() for weight in tiny.unet.parameters()) < 5e6


def test_latents_have_about_unit_variance_and_zero_mean_in_each_channel(tiny):
    paths = sorted((ROOT / "examples/subjects").glob("*/*.png"))
    pixels = np.stack([decode(path.read_bytes(), str(path)).pixels for path in paths])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = tiny.load_vae().encode(pictures).latent_dist
    channels = (posterior.mean * tiny.scaling_factor).transpose(0, 1).flatten(1)
    assert channels.std() == pytest.approx(1, abs=0.2)
    assert (channels.mean(1).abs() < 0.5).all()
    assert ((channels.std(1) > 0.6) & (channels.std(1) < 1.6)).all()
    assert 0.01 < posterior.std.mean() < 0.25


def test_schedule_is_stable_diffusions(tiny):
    # The first and last cumulative products of Stable Diffusion 1.x, as published with its code.
    products = tiny.scheduler.alphas_cumprod
    assert products[0] == pytest.approx(1 - 0.00085, abs=1e-6)
    assert products[-1] == pytest.approx(0.0047, abs=1e-4)
    assert load_tiny("epsilon").prediction_type == "epsilon"
    assert load_tiny("epsilon").digest == tiny.digest


def test_building_is_quick():
    start = time.perf_counter()
    load_tiny()
    assert time.perf_counter() - start < 3
