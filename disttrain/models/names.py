"""The public names of a text encoder's modules, whatever the installed transformers calls them.

Files of every tool (diffusers, kohya, the web UI) name a module of the text encoder with a leading
`text_model.`; transformers dropped that level from `CLIPTextModel` in some releases. Invariant:
what is written to a file, or feeds a random draw, uses public names; only live modules are looked
up by local ones.
"""

from __future__ import annotations

from torch import nn

TEXT_PREFIX = "text_model."


def public_name(part: str, local: str) -> str:
    """The name in files of a module or parameter of `part` ("unet", "text_encoder" or "vae")."""
    if part != "text_encoder" or local.startswith(TEXT_PREFIX):
        return local
    return TEXT_PREFIX + local


def local_name(text_encoder: nn.Module, name: str) -> str:
    """The name in this text encoder of a module or parameter, given with or without the prefix."""
    plain = name.removeprefix(TEXT_PREFIX)
    return TEXT_PREFIX + plain if hasattr(text_encoder, "text_model") else plain
