"""LoRA files: stock diffusers applies exactly what was trained; others' files are read."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from disttrain.errors import ModelError
from disttrain.formats import lora
from disttrain.formats.lora import LoRALayer, read_lora, write_lora
from disttrain.models.base import load_base
from disttrain.models.names import public_name

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def tiny():
    return load_base("tiny")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("lora") / "model"
    tiny.save(place)
    return place


@pytest.fixture(scope="module")
def modules(tiny):
    models = {"unet": tiny.unet, "text_encoder": tiny.text_encoder}
    return {f"{part}.{name}" for part, model in models.items() for name, _ in model.named_modules()}


def make_layers(tiny, rank=4, alpha=2.0, vary=False) -> dict[str, LoRALayer]:
    """A change of every kind of linear layer; with `vary` each has its own rank and alpha."""
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for part, model, targets in (
        ("unet", tiny.unet, UNET_TARGETS),
        ("text_encoder", tiny.text_encoder, TEXT_TARGETS),
    ):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(targets):
                own = rank + len(layers) % 3 if vary else rank
                layers[f"{part}.{name}"] = LoRALayer(
                    torch.randn(own, module.in_features, generator=generator) * 0.1,
                    torch.randn(module.out_features, own, generator=generator) * 0.1,
                    alpha + len(layers) % 4 if vary else alpha,
                )
    return layers


def weight_changes(pipeline, tiny) -> dict[str, torch.Tensor]:
    """What fusing the loaded LoRA did to every weight."""
    pipeline.fuse_lora()
    found = {}
    for part in ("unet", "text_encoder"):
        before = getattr(tiny, part).state_dict()
        for name, tensor in getattr(pipeline, part).state_dict().items():
            if "lora_" not in name:
                plain = name.replace(".base_layer", "")
                found[f"{part}.{plain}"] = tensor - before[plain]
    return found


def assert_changes(found, layers):
    for name, change in found.items():
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            assert not change.any(), f"{name} changed"
        else:
            expected = layer.alpha / layer.rank * layer.up @ layer.down
            torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6, msg=name)


def same(first: LoRALayer, second: LoRALayer) -> bool:
    return (
        torch.equal(first.down, second.down)
        and torch.equal(first.up, second.up)
        and first.alpha == second.alpha
    )


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 1.0), (2, 16.0), (3, 0.7)])
def test_stock_pipeline_applies_exactly_the_change(tiny, folder, tmp_path, rank, alpha):
    layers = make_layers(tiny, rank, alpha)
    write_lora(tmp_path / "fox.safetensors", layers, {})
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "fox.safetensors")
    assert_changes(weight_changes(pipeline, tiny), layers)


@pytest.mark.parametrize("vary", ["ranks and alphas", "alpha of a part"])
def test_stock_pipeline_with_different_alphas(tiny, folder, tmp_path, vary):
    layers = make_layers(tiny, vary=vary == "ranks and alphas")
    if vary == "alpha of a part":
        for name, layer in layers.items():
            if name.startswith("text_encoder."):
                layers[name] = LoRALayer(layer.down, layer.up, 6.0)
    write_lora(tmp_path / "fox.safetensors", layers, {})
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "fox.safetensors")
    assert_changes(weight_changes(pipeline, tiny), layers)


def test_stock_pipeline_with_only_the_unet(tiny, folder, tmp_path):
    layers = {n: layer for n, layer in make_layers(tiny).items() if n.startswith("unet.")}
    write_lora(tmp_path / "fox.safetensors", layers, {})
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "fox.safetensors")
    assert_changes(weight_changes(pipeline, tiny), layers)


def test_alpha_of_zero_is_no_change(tiny, folder, tmp_path):
    layers = make_layers(tiny, alpha=0.0)
    last = list(layers)[-1]
    layers[last] = LoRALayer(layers[last].down, layers[last].up, 2.0)
    write_lora(tmp_path / "fox.safetensors", layers, {})
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "fox.safetensors")
    assert_changes(weight_changes(pipeline, tiny), layers)


def test_names_are_kohyas(tiny, tmp_path):
    layers = make_layers(tiny, 4, 2.0)
    write_lora(tmp_path / "fox.safetensors", layers, {})
    tensors = load_file(tmp_path / "fox.safetensors")
    stems = {name.split(".")[0] for name in tensors}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in stems
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in stems
    assert "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj" in stems
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in stems
    assert "lora_te_text_model_encoder_layers_2_mlp_fc1" in stems
    assert len(stems) == len(layers)
    for stem in stems:
        assert tensors[f"{stem}.lora_down.weight"].shape[0] == 4
        assert tensors[f"{stem}.lora_up.weight"].shape[1] == 4
        assert tensors[f"{stem}.alpha"].shape == ()
        assert tensors[f"{stem}.alpha"] == 2.0
    assert len(tensors) == 3 * len(layers)


def test_metadata(tiny, tmp_path):
    given = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_output_name": "fox"}
    write_lora(tmp_path / "fox.safetensors", make_layers(tiny, 4, 2.0), given)
    with safe_open(tmp_path / "fox.safetensors", framework="pt") as archive:
        found = archive.metadata()
    assert given.items() <= found.items()
    assert found["ss_network_module"] == "networks.lora"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2.0")
    content = (tmp_path / "fox.safetensors").read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert found["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    write_lora(tmp_path / "vary.safetensors", make_layers(tiny, vary=True), {})
    _, found = read_lora(tmp_path / "vary.safetensors", make_layers(tiny, vary=True))
    assert found["ss_network_dim"] == "Dynamic"


def test_reading_back_resolves_every_module(tiny, modules, tmp_path):
    layers = make_layers(tiny, alpha=0.7)
    layers = {n: LoRALayer(x.down, x.up, torch.tensor(x.alpha).item()) for n, x in layers.items()}
    write_lora(tmp_path / "fox.safetensors", layers, {"ss_output_name": "fox"})
    found, metadata = read_lora(tmp_path / "fox.safetensors", modules)
    assert found.keys() == layers.keys()
    assert all(same(found[name], layers[name]) for name in layers)
    assert metadata["ss_output_name"] == "fox"


def test_text_encoder_names_with_and_without_the_dropped_level(tiny, modules, tmp_path):
    layers = make_layers(tiny)
    public = {}
    for name, layer in layers.items():
        part, _, local = name.partition(".")
        public[f"{part}.{public_name(part, local)}"] = layer
    assert public.keys() != layers.keys() or hasattr(tiny.text_encoder, "text_model")
    write_lora(tmp_path / "local.safetensors", layers, {})
    write_lora(tmp_path / "public.safetensors", public, {})
    local = load_file(tmp_path / "local.safetensors")
    assert local.keys() == load_file(tmp_path / "public.safetensors").keys()
    assert read_lora(tmp_path / "public.safetensors", modules)[0].keys() == layers.keys()
    assert read_lora(tmp_path / "local.safetensors", public)[0].keys() == public.keys()


def peft_pipeline(folder, **settings):
    """A stock pipeline with a LoRA attached by PEFT, its `up` no longer zero."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    options = {"r": 4, "init_lora_weights": "gaussian", **settings}
    pipeline.unet.add_adapter(LoraConfig(target_modules=list(UNET_TARGETS[:4]), **options))
    options.pop("alpha_pattern", None)
    pipeline.text_encoder.add_adapter(LoraConfig(target_modules=list(TEXT_TARGETS[:4]), **options))
    generator = torch.Generator().manual_seed(1)
    for part in (pipeline.unet, pipeline.text_encoder):
        for name, parameter in part.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return pipeline


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 8},
        {"lora_alpha": 8, "alpha_pattern": {"to_q": 2}},
        {"lora_alpha": 8, "use_rslora": True},
    ],
)
def test_files_saved_by_diffusers(tiny, folder, modules, tmp_path, settings):
    pipeline = peft_pipeline(folder, **settings)
    names = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        **{
            f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict()
            for part, model in names.items()
        },
    )
    layers, _ = read_lora(tmp_path / "pytorch_lora_weights.safetensors", modules)
    assert {name.split(".")[0] for name in layers} == {"unet", "text_encoder"}
    assert_changes(weight_changes(pipeline, tiny), layers)


def rename_old_processor(module: str) -> tuple[str, str]:
    name = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora", module)
    return f"{name}.down.weight", f"{name}.up.weight"


SPELLINGS = {
    "PEFT": lambda name: (f"{name}.lora_A.weight", f"{name}.lora_B.weight"),
    "PEFT adapter": lambda name: (f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"),
    "PEFT model": lambda name: (
        f"base_model.model.{name.removeprefix('unet.')}.lora_A.weight",
        f"base_model.model.{name.removeprefix('unet.')}.lora_B.weight",
    ),
    "diffusers": lambda name: (f"{name}.lora.down.weight", f"{name}.lora.up.weight"),
    "old diffusers": rename_old_processor,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_other_spellings(tiny, modules, tmp_path, spelling, kind):
    layers = {n: x for n, x in make_layers(tiny, 4, 4.0).items() if ".attn1." in n}
    tensors = {}
    for name, layer in layers.items():
        down, up = SPELLINGS[spelling](name)
        tensors |= {down: layer.down, up: layer.up}
    path = tmp_path / f"fox.{kind}"
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    found, _ = read_lora(path, modules)
    assert found.keys() == layers.keys()
    assert all(same(found[name], layers[name]) for name in layers)


def test_each_layers_own_alpha_is_read(tiny, modules, tmp_path):
    layers = make_layers(tiny, vary=True)
    tensors = {}
    for name, layer in layers.items():
        stem = lora._kohya_name(name)
        tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
        tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, tmp_path / "fox.safetensors")
    found, _ = read_lora(tmp_path / "fox.safetensors", modules)
    assert found.keys() == layers.keys()
    assert all(same(found[name], layers[name]) for name in layers)


def test_kohyas_second_text_prefix_half_precision_and_convolutions(tiny, modules, tmp_path):
    stem, conv = "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_conv_in"
    proj = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(2, 64).half(),
        f"{stem}.lora_up.weight": torch.randn(256, 2).half(),
        f"{conv}.lora_down.weight": torch.randn(2, 4, 3, 3),
        f"{conv}.lora_up.weight": torch.randn(64, 2, 1, 1),
        f"{proj}.lora_down.weight": torch.randn(2, 128, 1, 1),
        f"{proj}.lora_up.weight": torch.randn(128, 2, 1, 1),
        f"{proj}.alpha": torch.tensor(1.0).half(),
    }
    save_file(tensors, tmp_path / "fox.safetensors")
    found, _ = read_lora(tmp_path / "fox.safetensors", modules)
    text = next(layer for name, layer in found.items() if name.startswith("text_encoder."))
    assert text.down.dtype == torch.float32
    assert torch.equal(text.down, tensors[f"{stem}.lora_down.weight"].float())
    assert text.alpha == 2.0
    assert found["unet.mid_block.attentions.0.proj_in"].down.shape == (2, 128)
    assert found["unet.mid_block.attentions.0.proj_in"].alpha == 1.0
    assert found["unet.conv_in"].down.shape == (2, 4, 3, 3)
    assert found["unet.conv_in"].up.shape == (64, 2)
    write_lora(tmp_path / "again.safetensors", found, {})
    again = load_file(tmp_path / "again.safetensors")
    assert again[f"{conv}.lora_up.weight"].shape == (64, 2, 1, 1)
    assert torch.equal(again[f"{conv}.lora_down.weight"], tensors[f"{conv}.lora_down.weight"])


def kohya(**changes):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {"lora_down.weight": torch.ones(2, 128), "lora_up.weight": torch.ones(128, 2)}
    tensors |= {"alpha": torch.tensor(2.0)}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {f"{stem}.{name}": t for name, t in tensors.items() if t is not None}


WRONG = {
    "nothing": ({}, "no LoRA, or made for another kind of model (it is empty)"),
    "other model": (
        {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 2)},
        "no LoRA, or made for another kind of model (lora_unet_input_blocks_4_1_proj_in",
    ),
    "partly other": (
        kohya() | {"lora_te2_text_model_x.lora_down.weight": torch.ones(2, 2)},
        "1 of 4 weights have no place in this base model, such as lora_te2_text_model_x",
    ),
    "one side": (kohya(lora_up__weight=None), "lacks its up matrix"),
    "shapes": (kohya(lora_up__weight=torch.ones(128, 3)), "have shapes (2, 128) and (128, 3)"),
    "vector": (kohya(lora_down__weight=torch.ones(2)), "have shapes (2,) and"),
    "alpha": (kohya(alpha=torch.ones(2)), "alpha of unet.mid_block.attentions.0.proj_in is not"),
    "alpha nan": (kohya(alpha=torch.tensor(float("nan"))), "proj_in is nan"),
    "DoRA": (kohya(dora_scale=torch.ones(2)), "holds dora_scale weights; only plain LoRA"),
    "LoHa": (kohya(hada_w1_a=torch.ones(2)), "holds hada weights"),
}


@pytest.mark.parametrize("what", WRONG)
def test_other_files_are_told_in_one_line(modules, tmp_path, what):
    tensors, message = WRONG[what]
    path = tmp_path / "fox.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        read_lora(path, modules)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files(tiny, modules, tmp_path):
    path = tmp_path / "fox.safetensors"
    write_lora(path, make_layers(tiny), {})
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ModelError, match="cannot be read"):
            read_lora(path, modules)
    with pytest.raises(ModelError, match="cannot be read"):
        read_lora(tmp_path / "missing.safetensors", modules)
    save_file(kohya(), path, {"lora_adapter_metadata": "{"})
    with pytest.raises(ModelError, match="not JSON"):
        read_lora(path, modules)
    save_file(kohya(), path, {"lora_adapter_metadata": json.dumps([1])})
    with pytest.raises(ModelError, match="not a JSON object"):
        read_lora(path, modules)
    torch.save([1, 2], tmp_path / "fox.pt")
    with pytest.raises(ModelError, match="no dictionary of weights"):
        read_lora(tmp_path / "fox.pt", modules)
    torch.save({"a": 1}, tmp_path / "fox.pt")
    with pytest.raises(ModelError, match="other things than weights"):
        read_lora(tmp_path / "fox.pt", modules)


def test_numbers_that_are_not_finite_are_not_written(tiny, tmp_path):
    layers = make_layers(tiny)
    next(iter(layers.values())).up[0, 0] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        write_lora(tmp_path / "fox.safetensors", layers, {})
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_what_was_given_does_not_stay(tiny, tmp_path, monkeypatch):
    """A disk that flips one bit of a weight."""
    real = lora.write_bytes

    def flipping(path, data):
        spoiled = bytearray(data)
        spoiled[-3] ^= 1
        real(path, bytes(spoiled))

    monkeypatch.setattr(lora, "write_bytes", flipping)
    with pytest.raises(ModelError, match="was not the same when read back"):
        write_lora(tmp_path / "fox.safetensors", make_layers(tiny), {})
    assert not list(tmp_path.iterdir())


def test_files_are_the_same_bytes_each_time(tiny, tmp_path):
    for name in ("a", "b"):
        write_lora(tmp_path / f"{name}.safetensors", make_layers(tiny), {"ss_output_name": "fox"})
    first = (tmp_path / "a.safetensors").read_bytes()
    assert int.from_bytes(first[:8], "little") % 8 == 0
    write_lora(tmp_path / "b.safetensors", make_layers(tiny), {"ss_output_name": "foxes"})
    other = (tmp_path / "b.safetensors").read_bytes()
    assert int.from_bytes(other[:8], "little") % 8 == 0
    write_lora(tmp_path / "b.safetensors", make_layers(tiny), {"ss_output_name": "fox"})
    assert first == (tmp_path / "b.safetensors").read_bytes()
