"""Single-file checkpoints: every tensor comes back, and what is not one is told in a line."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from original_names import (
    clip_names,
    open_clip_names,
    original_checkpoint,
    original_unet,
    original_vae,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from disttrain.errors import ModelError
from disttrain.models import single_file
from disttrain.models.base import load_base
from disttrain.models.infer import below, infer_text_encoder, infer_unet, infer_vae
from disttrain.models.parts import frozen, skeleton

UNET = "model.diffusion_model."
# The configurations published with the diffusers folders of these models.
SD1_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "in_channels": 4,
    "out_channels": 4,
    "use_linear_projection": False,
}
SD2_UNET = {
    **SD1_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
OPEN_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


@pytest.fixture(scope="module")
def tiny():
    """The embedded model, with an autoencoder of 32 groups: files of this kind tell no other."""
    base = load_base("tiny")
    vae = {**base.vae_config, "block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        own = frozen(AutoencoderKL(**vae))
    return replace(base, vae_source=lambda: own, vae_config=vae)


@pytest.fixture(scope="module")
def tiny2(tiny):
    """A tiny model with the features of Stable Diffusion 2.x, weights of its own."""
    base = replace(tiny)
    unet = dict(base.unet.config)
    heads = tuple(width // 64 for width in unet["block_out_channels"])
    linear = {"use_linear_projection": True, "attention_head_dim": heads}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base.unet = frozen(UNet2DConditionModel(**{**unet, **linear}))
        text = {**tiny.text_encoder.config.to_dict(), "hidden_act": "gelu"}
        base.text_encoder = frozen(CLIPTextModel(CLIPTextConfig(**text)))
    return base


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def same(first, second) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def assert_same_model(loaded, base):
    assert same(loaded.unet, base.unet)
    assert same(loaded.text_encoder, base.text_encoder)
    assert same(loaded.load_vae(), base.load_vae())
    assert loaded.scaling_factor == pytest.approx(base.scaling_factor, rel=1e-6)
    ids = torch.tensor(base.tokenizer(["a photo of a fox"], padding="max_length").input_ids)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 8, 8, 8, generator=generator)
    with torch.no_grad():
        outputs = []
        for model in (loaded, base):
            context = model.text_encoder(ids).last_hidden_state
            outputs.append(model.unet(latents, torch.tensor(500), context).sample)
            outputs.append(model.load_vae().decode(latents).sample)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "bare ckpt"])
def test_round_trip(tiny, tmp_path, kind):
    path = tmp_path / f"model.{kind.split()[-1]}"
    tensors = original_checkpoint(tiny)
    tensors["model_ema.decay"] = torch.tensor(0.9)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors if kind == "bare ckpt" else {"state_dict": tensors, "epoch": 3}, path)
    loaded = load_base(str(path))
    assert_same_model(loaded, tiny)
    assert (loaded.name, loaded.family, loaded.prediction_type) == ("model", "sd1", "epsilon")
    assert loaded.notes == ()
    assert torch.equal(loaded.scheduler.betas, tiny.scheduler.betas)
    assert loaded.tokenizer("a fox").input_ids == tiny.tokenizer("a fox").input_ids
    for part in (loaded.unet, loaded.text_encoder, loaded.load_vae()):
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())


def test_stock_loader_agrees_with_the_file(tiny, tmp_path):
    """The renaming in this test, read by diffusers' own loader with the configuration given."""
    save_file(original_checkpoint(tiny), tmp_path / "model.safetensors")
    tiny.save(tmp_path / "folder")
    pipeline = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    assert same(pipeline.unet, tiny.unet)
    assert same(pipeline.vae, tiny.load_vae())
    assert same(pipeline.text_encoder, tiny.text_encoder)


def test_half_precision_and_old_text_names(tiny, tmp_path):
    tensors = original_checkpoint(tiny)
    prefix = "cond_stage_model.transformer."
    tensors = {n.replace(prefix + "text_model.", prefix): t.half() for n, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_base(str(tmp_path / "model.safetensors"))
    for name, tensor in loaded.text_encoder.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tiny.text_encoder.state_dict()[name].half().float())


def test_round_trip_of_stable_diffusion_2(tiny2, tmp_path):
    save_file(original_checkpoint(tiny2, open_clip=True), tmp_path / "model.safetensors")
    loaded = load_base(str(tmp_path / "model.safetensors"))
    assert_same_model(loaded, tiny2)
    assert loaded.family == "sd2"
    assert loaded.tokenizer.pad_token_id == 0


def test_what_stable_diffusion_2_predicts(tiny2, tmp_path):
    tensors = original_checkpoint(tiny2, open_clip=True)
    path, checkpoint = tmp_path / "model.safetensors", tmp_path / "model.ckpt"
    save_file(tensors, path)
    assumed = load_base(str(path))
    assert (assumed.prediction_type, assumed.resolution) == ("v_prediction", 768)
    assert "base_prediction_type: epsilon" in assumed.notes[0]
    told = load_base(str(path), prediction_type="epsilon")
    assert (told.prediction_type, told.resolution, told.notes) == ("epsilon", 512, ())
    save_file(tensors, path, {"modelspec.prediction_type": "epsilon"})
    assert load_base(str(path)).prediction_type == "epsilon"
    torch.save({"state_dict": tensors, "global_step": 875000}, checkpoint)
    assert load_base(str(checkpoint)).prediction_type == "epsilon"
    torch.save({"state_dict": tensors, "global_step": 140000}, checkpoint)
    assert load_base(str(checkpoint)).prediction_type == "v_prediction"


def test_what_stable_diffusion_1_predicts(tiny, tmp_path):
    tensors = original_checkpoint(tiny)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    assert load_base(str(path)).prediction_type == "epsilon"
    save_file(tensors | {"v_pred": torch.zeros(0)}, path)
    assert load_base(str(path)).prediction_type == "v_prediction"
    assert load_base(str(path)).resolution == 512
    save_file(tensors, path, {"modelspec.prediction_type": "v"})
    loaded = load_base(str(path))
    assert (loaded.prediction_type, loaded.pipeline_scheduler.config.prediction_type) == (
        "v_prediction",
        "v_prediction",
    )


@pytest.mark.parametrize("config", [SD1_UNET, SD2_UNET])
def test_unet_configuration_of_the_real_models(config):
    unet = skeleton(lambda: UNet2DConditionModel(**config))
    found = infer_unet(below(shapes(original_unet(unet)), UNET))
    assert {key: found[key] for key in config} == config
    again = skeleton(lambda: UNet2DConditionModel(**found))
    assert shapes(again.state_dict()) == shapes(unet.state_dict())
    assert 8.5e8 < sum(weight.numel() for weight in again.parameters()) < 8.7e8


def test_vae_configuration_of_the_real_models():
    vae = skeleton(lambda: AutoencoderKL(**SD_VAE))
    found = infer_vae(below(shapes(original_vae(vae)), "first_stage_model."))
    assert {key: found[key] for key in SD_VAE} == SD_VAE
    assert found["scaling_factor"] == 0.18215
    assert sum(w.numel() for w in skeleton(lambda: AutoencoderKL(**found)).parameters()) == 83653863


@pytest.mark.parametrize(("expected", "open_clip"), [(CLIP_L, False), (OPEN_CLIP_H, True)])
def test_text_configuration_of_the_real_models(expected, open_clip):
    layers = 24 if open_clip else 12  # the file holds one layer more than 2.x uses
    config = CLIPTextConfig(**{**expected, "num_hidden_layers": layers})
    text_encoder = skeleton(lambda: CLIPTextModel(config))
    names = open_clip_names if open_clip else clip_names
    found, is_open_clip = infer_text_encoder(shapes(names(text_encoder)))
    assert is_open_clip == open_clip
    assert {key: getattr(found, key) for key in expected} == expected
    assert (found.vocab_size, found.max_position_embeddings) == (49408, 77)


def test_last_layer_of_open_clip_is_left_out(tiny2, tmp_path):
    text = tiny2.text_encoder.config.to_dict() | {"num_hidden_layers": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = CLIPTextModel(CLIPTextConfig(**text))
    tensors = original_checkpoint(tiny2, open_clip=True) | open_clip_names(whole)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_base(str(tmp_path / "model.safetensors")).text_encoder.state_dict()
    expected = {n: t for n, t in whole.state_dict().items() if "layers.23." not in n}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def drop(name):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(name)}


WRONG = {
    "SDXL": (
        lambda t: t | {"conditioner.embedders.1.model.ln_final.weight": torch.ones(2)},
        "SDXL is not supported yet: Stable Diffusion 1.x and 2.x are",
    ),
    "SD3": (
        lambda _: {UNET + "joint_blocks.0.context_block.attn.qkv.bias": torch.ones(2)},
        "SD3 is not supported yet",
    ),
    "Flux": (
        lambda _: {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(2)},
        "Flux is not supported yet",
    ),
    "LoRA": (
        lambda _: {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(1)},
        "this is a LoRA, not a complete checkpoint",
    ),
    "VAE": (lambda _: {"encoder.conv_in.weight": torch.ones(1)}, "this is a VAE"),
    "part": (
        lambda _: {"down_blocks.0.resnets.0.norm1.weight": torch.ones(1)},
        "this is a part of a diffusers folder",
    ),
    "nothing": (lambda _: {"weight": torch.ones(1)}, "not a Stable Diffusion checkpoint"),
    "no VAE": (drop("first_stage_model."), "lacks 'first_stage_model.*'"),
    "no text encoder": (drop("cond_stage_model."), "lacks 'cond_stage_model.transformer.*'"),
    "no UNet weight": (
        drop(UNET + "time_embed.0.bias"),
        "its UNet lacks time_embedding.linear_1.bias",
    ),
    "no text weight": (
        drop("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
        "its text encoder lacks",
    ),
    "no middle block": (drop(UNET + "middle_block.1.proj_in"), "lacks 'middle_block.1.proj_in"),
    "shape": (
        lambda t: t | {UNET + "time_embed.0.bias": torch.ones(3)},
        "has shape (3,), not (256,)",
    ),
    "inpainting": (
        lambda t: t | {UNET + "input_blocks.0.0.weight": torch.ones(64, 9, 3, 3)},
        "its UNet takes 9 channels",
    ),
    "groups": (
        lambda t: t | {"first_stage_model.encoder.down.0.block.0.conv1.weight": torch.ones(16, 1)},
        "its autoencoder has 16 channels, no multiple of 32",
    ),
    "class labels": (
        lambda t: t | {UNET + "label_emb.0.0.weight": torch.ones(1)},
        "class labels",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_other_files_are_told_in_one_line(tiny, tmp_path, what):
    spoil, message = WRONG[what]
    path = tmp_path / "model.safetensors"
    save_file(spoil(original_checkpoint(tiny)), path)
    with pytest.raises(ModelError) as caught:
        load_base(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vae_weight_that_is_missing_is_told_when_it_is_loaded(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(drop("first_stage_model.decoder.norm_out.bias")(original_checkpoint(tiny)), path)
    base = load_base(str(path))
    with pytest.raises(ModelError, match=r"its VAE lacks decoder.conv_norm_out.bias"):
        base.load_vae()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "callback": Hostile()}, "zip.ckpt")
    with open("old.ckpt", "wb") as handle:
        pickle.dump(Hostile(), handle)
    for name in ("zip.ckpt", "old.ckpt"):
        with pytest.raises(ModelError, match=r"convert it to \.safetensors"):
            load_base(name)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_damaged_files(tmp_path, kind):
    path = tmp_path / f"model.{kind}"
    tensors = {f"{UNET}input_blocks.0.0.weight": torch.ones(64, 4, 3, 3)}
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    whole = path.read_bytes()
    for size in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError) as caught:
            load_base(str(path))
        assert "\n" not in str(caught.value)


def test_files_that_unpack_to_more_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(single_file, "SIZE_LIMIT", 2**20)
    torch.save({"state_dict": {UNET + "x": torch.zeros(2**19)}}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as source,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in source.infolist():
            bomb.writestr(member.filename, source.read(member))
    assert (tmp_path / "bomb.ckpt").stat().st_size < 2**20
    for name in ("plain.ckpt", "bomb.ckpt"):
        with pytest.raises(ModelError, match="the limit is 1048576"):
            load_base(str(tmp_path / name))


def test_a_checkpoint_that_is_no_dictionary(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match="holds no dictionary of weights"):
        load_base(str(tmp_path / "model.ckpt"))
