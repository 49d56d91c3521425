"""Everything that can be computed once, computed now: what `disttrain cache` does.

Before any training, which does the same by itself. Invariant: a second call finds everything and
computes nothing; an interrupted one keeps what it has; nothing is written but the caches.
"""

from __future__ import annotations

from functools import partial

import torch

from disttrain.config import RunConfig
from disttrain.engine.batch_size import settle_batch
from disttrain.engine.distributed import Mesh
from disttrain.engine.launcher_settings import settle_parallel
from disttrain.engine.pictures import open_subject
from disttrain.engine.preflight import preflight
from disttrain.engine.progress import Progress
from disttrain.engine.slot import alone
from disttrain.engine.streams import StreamMaker
from disttrain.engine.text_cache import cache_prompts
from disttrain.errors import ConfigError
from disttrain.models.base import configured_base
from disttrain.models.packed import placed
from disttrain.models.text import ContextCache, PromptTokenizer


def fill_caches(config: RunConfig) -> None:
    """Class pictures, latents and encoded prompts of a config's subjects, by all ranks together.

    Raises:
        UserError: the config asks for no cache, or something is wrong with its subjects.
    """
    if not config.data.cache_latents and (config.trains_text or not config.data.cache_text):
        raise ConfigError("data.cache_latents: false, and no text is fixed: nothing to cache")
    config = settle_parallel(config)
    with Mesh(config) as mesh:
        progress = Progress(mesh.is_main)
        preflight(config, mesh, progress, "cache")
        config = settle_batch(config, mesh.world)
        progress.say(f"loading base model {config.base_model}")
        base = configured_base(config, progress.say, partial(progress.warn_from, mesh.rank))
        data = [open_subject(alone(config, one), progress) for one in config.subjects]
        maker = StreamMaker(config, mesh, base, progress, together=len(data))
        maker.make(data)
        dtype = mesh.weight_dtype if config.packable else torch.float32
        placed(base.text_encoder, mesh.device, dtype)
        contexts = ContextCache(PromptTokenizer(base.tokenizer), base.text_encoder)
        prompts = cache_prompts(config, mesh, data, contexts, progress)
        progress.say(f"pictures encoded now: {maker.encoded}; prompts encoded now: {prompts}")
        progress.say(f"cache {config.cache_folder}")
