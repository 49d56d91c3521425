"""The methods by the name a config gives them."""

from disttrain.methods.base import Method
from disttrain.methods.dreambooth import Dreambooth
from disttrain.methods.finetune import Finetune
from disttrain.methods.lora import Lora
from disttrain.methods.textual_inversion import TextualInversion

METHODS: dict[str, type[Method]] = {
    "textual_inversion": TextualInversion,
    "lora": Lora,
    "dreambooth": Dreambooth,
    "finetune": Finetune,
}
