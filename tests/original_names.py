"""The original (single-file) names of a diffusers model's weights, for tests.

Written from the layout of the original networks, independently of the converters under test.
"""

from __future__ import annotations

import re

import torch

Tensors = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str, layers: int, up_attends: list[bool]) -> str:
    """`layers` residual blocks a level; `up_attends`: which levels of the way up have attention."""
    for new, old in UNET_ENDS.items():
        if name.startswith(new + "."):
            return name.replace(new, old, 1)
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        way, block, kind, layer, rest = found.groups()
        place = int(block) * (layers + 1) + int(layer)
        stem = f"input_blocks.{place + 1}" if way == "down" else f"output_blocks.{place}"
        return f"{stem}.0.{resnet_name(rest)}" if kind == "resnets" else f"{stem}.1.{rest}"
    if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op.{found[2]}"
    if found := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", name):
        block = int(found[1])
        place, after = (block + 1) * (layers + 1) - 1, 2 if up_attends[block] else 1
        return f"output_blocks.{place}.{after}.{found[2]}"
    if found := re.match(r"mid_block\.resnets\.(\d)\.(.*)", name):
        return f"middle_block.{2 * int(found[1])}.{resnet_name(found[2])}"
    found = re.match(r"mid_block\.attentions\.0\.(.*)", name)
    assert found, name
    return f"middle_block.1.{found[1]}"


def resnet_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    return f"{RESNET[module]}.{kind}"


def vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
    name = re.sub(r"\bto_([qkv])\b", r"\1", name).replace("to_out.0", "proj_out")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)",
        lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}",
        name,
    )
    return re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name
    )


def original_unet(unet) -> Tensors:
    layers = unet.config.layers_per_block
    up_attends = ["CrossAttn" in kind for kind in unet.config.up_block_types]
    return {
        "model.diffusion_model." + unet_name(name, layers, up_attends): tensor
        for name, tensor in unet.state_dict().items()
    }


def original_vae(vae) -> Tensors:
    levels = len(vae.config.block_out_channels)
    found = {}
    for name, tensor in vae.state_dict().items():
        if "mid_block.attentions" in name and name.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # the original has 1x1 convolutions here
        found["first_stage_model." + vae_name(name, levels)] = tensor
    return found


def clip_names(text_encoder, prefix: str = "cond_stage_model.transformer.text_model.") -> Tensors:
    """Names of the text encoder in Stable Diffusion 1.x files."""
    found = text_encoder.state_dict()
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in found.items()}


def open_clip_names(text_encoder) -> Tensors:
    """Names of the text encoder in Stable Diffusion 2.x files: joined projections, other words."""
    weights = clip_names(text_encoder, "")
    found: Tensors = {}
    words = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    words |= {"mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    words |= {"encoder.layers.": "transformer.resblocks.", "final_layer_norm": "ln_final"}
    words |= {"embeddings.position_embedding.weight": "positional_embedding"}
    words |= {"embeddings.token_embedding": "token_embedding"}
    for name, tensor in weights.items():
        if match := re.match(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            layer, kind = match.groups()
            three = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(three)
        elif ".k_proj." not in name and ".v_proj." not in name:
            for new, old in words.items():
                name = name.replace(new, old)
            found[name] = tensor
    width = weights["final_layer_norm.weight"].shape[0]
    found["text_projection"] = torch.eye(width)
    found["logit_scale"] = torch.tensor(1.0)
    return {"cond_stage_model.model." + name: tensor for name, tensor in found.items()}


def original_checkpoint(base, open_clip: bool = False) -> Tensors:
    """A whole base model under the original names."""
    names = open_clip_names if open_clip else clip_names
    parts = (original_unet(base.unet), original_vae(base.load_vae()), names(base.text_encoder))
    found = {name: tensor.contiguous() for part in parts for name, tensor in part.items()}
    return found | {"scale_factor": torch.tensor(base.scaling_factor)}
