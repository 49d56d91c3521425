"""LoRA files: what a LoRA run hands to diffusers, the web UI and ComfyUI, and reading theirs.

Written under kohya's names, the one convention that all of them read. Invariant: a file that
`write_lora` leaves behind was read back and holds the same bits it was given.

A layer changes its module's weight by `alpha / rank * up @ down` (Hu et al. 2021, section 4.1).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.errors import ModelError
from disttrain.files import sha256_bytes, write_bytes
from disttrain.formats.container import file_bytes, tensor_bytes
from disttrain.models.foreign import read_pickled, read_safetensors
from disttrain.models.names import public_name

SIZE_LIMIT = 4 * 2**30
KOHYA_PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
WRITTEN_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
# How the two matrices of a layer are called; the rest of the name is the layer's.
SIDES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
OLD_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
OTHER_KINDS = (
    "dora_scale",
    "lora_magnitude_vector",
    "hada_",
    "lokr_",
    "lora_mid",
    "oft_",
    "bundle_emb",
)
PEFT_METADATA = "lora_adapter_metadata"

Metadata = dict[str, str]


@dataclass(frozen=True)
class LoRALayer:
    """The change of one module: down `[rank, in]`, up `[out, rank]`, scaled by alpha / rank.

    Of a convolution with a kernel larger than 1 x 1 down is `[rank, in, height, width]`.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner width."""
        return self.down.shape[0]


def write_lora(path: Path, layers: Mapping[str, LoRALayer], metadata: Metadata) -> None:
    """Write a `.safetensors` file that loads anywhere, and read it back.

    The file has one alpha for the UNet and one for the text encoder: diffusers (seen in 0.42)
    applies the commonest of a part to all its layers. Where alphas differ, `up` is scaled instead.

    Args:
        layers: by module path, `unet.` or `text_encoder.` and the module's name in the model (for
            the text encoder with or without the `text_model.` that transformers dropped).
        metadata: kohya's `ss_` keys; what follows from the layers (network module, rank, alpha,
            hash) is filled in.

    Raises:
        ModelError: a number is not finite, or what was read back differs.
    """
    layers = _one_alpha(layers)
    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        name = _kohya_name(module)
        assert name + ".alpha" not in tensors, f"two modules are called {name}"
        for side, tensor in (("down", layer.down), ("up", layer.up)):
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{path}: not written, {module} has numbers that are not finite")
            plain = tensor.detach().float().cpu().contiguous()
            if side == "up" and layer.down.ndim == 4:
                plain = plain[:, :, None, None]
            tensors[f"{name}.lora_{side}.weight"] = plain
        tensors[name + ".alpha"] = torch.tensor(float(layer.alpha))
    write_bytes(path, file_bytes(tensors, {**_described(layers, tensors), **metadata}))
    found, _ = read_lora(path, layers)
    for module, layer in layers.items():
        if not _same(found.get(module), layer):
            path.unlink(missing_ok=True)
            raise ModelError(f"{path}: {module} was not the same when read back; check the disk")


def read_lora(path: Path, modules: Iterable[str]) -> tuple[dict[str, LoRALayer], Metadata]:
    """The layers of a LoRA file, in float32 on the CPU, by module path; and the file's metadata.

    Understands kohya's names, those of diffusers and PEFT, and those of old diffusers releases.
    Without an alpha, in the file or in PEFT's metadata, alpha is the rank. 1 x 1 convolutions are
    given as matrices.

    Args:
        modules: the module paths of the base model, such as `unet.mid_block.attentions.0.proj_in`;
            kohya's names have underscores for dots and cannot be read without them.

    Raises:
        ModelError: damaged, incomplete, another kind of file, or made for another model.
    """
    tensors, metadata = _load(path)
    kinds = sorted(kind for kind in OTHER_KINDS if any(kind in name for name in tensors))
    if kinds:
        raise ModelError(
            f"{path}: holds {kinds[0].strip('_')} weights; only plain LoRA is supported"
        )
    known = _spellings(modules)
    peft = _peft_settings(path, metadata)
    found: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for name, tensor in tensors.items():
        layer, side = _split(name)
        module = known.get(layer)
        if module is None or not side:
            strange.append(name)
        else:
            found.setdefault(module, {})[side] = tensor
    if not found:
        raise ModelError(f"{path}: no LoRA, or made for another kind of model ({_some(strange)})")
    if strange:
        raise ModelError(
            f"{path}: {len(strange)} of {len(tensors)} weights have no place in this base model,"
            f" such as {_some(strange)}; it was made for another kind of model"
        )
    return {module: _layer(path, module, sides, peft) for module, sides in found.items()}, metadata


def _some(names: list[str]) -> str:
    return names[0] if names else "it is empty"


def _kohya_name(module: str) -> str:
    part, _, name = module.partition(".")
    assert part in WRITTEN_PREFIX, f"{module}: not a module of the UNet or the text encoder"
    return WRITTEN_PREFIX[part] + public_name(part, name).replace(".", "_")


def _one_alpha(layers: Mapping[str, LoRALayer]) -> dict[str, LoRALayer]:
    """The same changes with a single alpha in each part, the one most of its layers have."""
    counts: dict[str, Counter[float]] = {}
    for module, layer in layers.items():
        counts.setdefault(module.partition(".")[0], Counter())[float(layer.alpha)] += 1
    found = {}
    for module, layer in layers.items():
        alpha = counts[module.partition(".")[0]].most_common(1)[0][0] or 1.0
        if layer.alpha != alpha:
            layer = LoRALayer(layer.down, layer.up * (layer.alpha / alpha), alpha)
        found[module] = layer
    return found


def _described(layers: Mapping[str, LoRALayer], tensors: dict[str, Tensor]) -> Metadata:
    """The metadata that follows from the layers; different ranks are "Dynamic", as kohya says."""
    ranks = {layer.rank for layer in layers.values()}
    alphas = Counter(float(layer.alpha) for layer in layers.values())
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.most_common(1)[0][0]) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": "{}",
        "sshs_model_hash": sha256_bytes(tensor_bytes(tensors)),
    }


def _same(found: LoRALayer | None, given: LoRALayer) -> bool:
    return (
        found is not None
        and torch.equal(found.down, given.down.detach().float().cpu())
        and torch.equal(found.up, given.up.detach().float().cpu())
        and found.alpha == torch.tensor(float(given.alpha)).item()
    )


def _load(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    if path.suffix == ".safetensors":
        tensors, _, metadata = read_safetensors(path)
        return tensors, metadata
    found = read_pickled(path, SIZE_LIMIT)
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds no dictionary of weights")
    found = found.get("state_dict", found)
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ModelError(f"{path}: holds other things than weights, so it is no LoRA")
    return {str(name): tensor for name, tensor in found.items()}, {}


def _spellings(modules: Iterable[str]) -> dict[str, str]:
    """Every way a file may call a module, and the module it is."""
    known: dict[str, str] = {}
    for module in modules:
        part, _, local = module.partition(".")
        for name in {local, public_name(part, local)}:
            known.setdefault(name, module)  # PEFT's own files name no part
            known[f"{part}.{name}"] = module
            for prefix, owner in KOHYA_PREFIXES.items():
                if owner == part:
                    known[prefix + name.replace(".", "_")] = module
    return known


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as its layer's name and "down", "up" or "alpha"; "" for anything else."""
    name = name.removeprefix("base_model.model.")
    if match := OLD_PROCESSOR.search(name):
        target = match[1] + (".0" if match[1] == "to_out" else "")
        return f"{name[: match.start()]}.{target}", match[2]
    for suffix, side in SIDES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), side
    return name, ""


def _peft_settings(path: Path, metadata: Metadata) -> dict[str, Any]:
    """What diffusers stores of PEFT's configuration, its keys starting with the part's name."""
    try:
        found = json.loads(metadata.get(PEFT_METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: its {PEFT_METADATA} is not JSON") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: its {PEFT_METADATA} is not a JSON object")
    return found


def _layer(path: Path, module: str, sides: dict[str, Tensor], peft: dict[str, Any]) -> LoRALayer:
    missing = {"down", "up"} - sides.keys()
    if missing:
        raise ModelError(f"{path}: {module} lacks its {missing.pop()} matrix")
    down, up = _matrix(sides["down"]), _matrix(sides["up"])
    if down.ndim not in (2, 4) or up.ndim != 2 or down.shape[0] != up.shape[1]:
        sizes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise ModelError(f"{path}: the matrices of {module} have shapes {sizes}")
    rank = down.shape[0]
    stored = sides.get("alpha")
    if stored is not None and stored.numel() != 1:
        raise ModelError(f"{path}: the alpha of {module} is not a number")
    alpha = _peft_alpha(module, rank, peft) if stored is None else float(stored)
    if not math.isfinite(alpha):
        raise ModelError(f"{path}: the alpha of {module} is {alpha}")
    return LoRALayer(down, up, alpha)


def _matrix(tensor: Tensor) -> Tensor:
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    return tensor.to(torch.float32, copy=True).contiguous()


def _peft_alpha(module: str, rank: int, peft: dict[str, Any]) -> float:
    """Alpha by PEFT's configuration: a pattern that ends the module's name, else the common one.

    PEFT's "rslora" divides by the root of the rank, which is a larger alpha here.
    """
    part, _, name = module.partition(".")
    alpha = peft.get(f"{part}.lora_alpha", rank)
    patterns = peft.get(f"{part}.alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", public_name(part, name)):
            alpha = value
            break
    return float(alpha) * (math.sqrt(rank) if peft.get(f"{part}.use_rslora") else 1.0)
