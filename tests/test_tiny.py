"""The embedded base: real vocabulary, exact weights, and torch's random state left alone."""

from __future__ import annotations

import hashlib
import time

import pytest
import torch

from disttrain.models.tiny import build_tiny
from disttrain.models.vocabulary import clip_tokenizer


@pytest.fixture(scope="module")
def tiny():
    return build_tiny()


def digest(module: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.removeprefix("text_model.").encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()[:16]


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


def test_weights_are_fixed_and_independent_of_torch(tiny):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = build_tiny()
    vae = again.load_vae()
    assert torch.equal(before, torch.get_rng_state())
    found = [digest(again.unet), digest(again.text_encoder), digest(vae)]
    assert found == ["bf07a7a0961cc97f", "79e201140f4b37ef", "c71392096330d241"]
    assert digest(tiny.unet) == found[0]
    assert digest(tiny.load_vae()) == found[2]


def test_parts_fit_together_and_are_frozen(tiny):
    assert (tiny.family, tiny.prediction_type) == ("sd1", "epsilon")
    assert (tiny.latent_channels, tiny.latent_scale, tiny.resolution) == (4, 8, 64)
    ids = torch.tensor(tiny.tokenizer(["a fox", "a cat"], padding="max_length").input_ids)
    with torch.no_grad():
        context = tiny.text_encoder(ids).last_hidden_state
        noise = tiny.unet(torch.zeros(2, 4, 8, 8), torch.tensor([1, 900]), context).sample
        vae = tiny.load_vae()
        picture = vae.decode(torch.zeros(1, 4, 8, 8)).sample
    assert context.shape == (2, 77, 64)
    assert noise.shape == (2, 4, 8, 8)
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


def test_latents_have_about_unit_variance(tiny):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(16, 3, 6, 6, generator=generator) * 2 - 1
    pictures = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic")
    with torch.no_grad():
        posterior = tiny.load_vae().encode(pictures).latent_dist
    assert 0.7 < (posterior.mean * tiny.scaling_factor).std() < 1.4
    assert 0.01 < posterior.std.mean() < 0.1


def test_schedule_is_stable_diffusions(tiny):
    # The first and last cumulative products of Stable Diffusion 1.x, as published with its code.
    products = tiny.scheduler.alphas_cumprod
    assert products[0] == pytest.approx(1 - 0.00085, abs=1e-6)
    assert products[-1] == pytest.approx(0.0047, abs=1e-4)
    assert build_tiny("v_prediction").prediction_type == "v_prediction"
    assert build_tiny("v_prediction").digest == tiny.digest


def test_building_is_quick():
    start = time.perf_counter()
    build_tiny()
    assert time.perf_counter() - start < 3
