"""DreamBooth (Ruiz et al. 2022): the whole UNet learns one subject by a rare word.

Invariant: it trains what full fine-tuning trains. What makes it DreamBooth is in the data: prompts
with the rare word, and for prior preservation class pictures as rows of the batch with a weight.
"""

from __future__ import annotations

from disttrain.methods.finetune import Finetune


class Dreambooth(Finetune):
    """The UNet and, if asked, the text encoder in full."""
