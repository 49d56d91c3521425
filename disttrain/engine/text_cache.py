"""Contexts of prompts on disk, for text encoders that are not trained and prompts that are fixed.

Between `prompts.py` (the prompts a subject can get) and `models/text.py` (which looks contexts up
before it computes them). Invariant: on one kind of machine a run gets the same bits with and
without it; a context that is not on disk is computed when it is needed, so no rank waits for
another here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from disttrain.config import RunConfig
from disttrain.data.tensor_store import TensorStore
from disttrain.engine.distributed import Mesh
from disttrain.engine.pictures import SubjectData
from disttrain.engine.progress import Progress
from disttrain.models.text import ContextCache

MOST_PROMPTS = 20_000
"""Prompts kept for one set of prompts; a context of SD 1 takes 231 KiB, so these take 4.7 GB."""


def cache_prompts(
    config: RunConfig,
    mesh: Mesh,
    subjects: Sequence[SubjectData],
    contexts: ContextCache,
    progress: Progress,
) -> int:
    """Encode the prompts that these subjects can get, where they are fixed and the config wants it.

    Returns:
        How many contexts this rank computed.
    """
    if config.trains_text or not config.data.cache_text:
        return 0
    open_context_store(config.cache_folder / "contexts", contexts)
    count = 0
    for data in subjects:
        with progress.counter(f"prompts of {data.settings.name}") as counted:
            count += prepare_contexts(
                contexts, _prompts(config, data), mesh.rank, mesh.world, counted
            )
    return count


def _prompts(config: RunConfig, data: SubjectData) -> Iterator[str]:
    if config.prior is not None:
        yield data.plan.fill(data.settings.class_prompt)
    if data.plan.fixed:
        yield from data.plan.every(map(data.caption, range(len(data.source.records))))


def open_context_store(folder: Path, contexts: ContextCache) -> None:
    """Let `contexts` look into the folder's contexts of its text encoder from now on.

    Call it when the text encoder is where and what it will be: its weights are digested here.
    """
    digest = contexts.encoder_digest
    device = contexts.text_encoder.device.type
    store = TensorStore(folder, f"{digest[:12]}-{device}", (f"text encoder on {device}", digest))
    store.scan()
    contexts.store = store


def prepare_contexts(
    contexts: ContextCache,
    prompts: Iterable[str],
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
    *,
    most: int = MOST_PROMPTS,
) -> int:
    """Compute this rank's share of the contexts that are not on disk, and write them there.

    Needs a store from `open_context_store`. A cancelled call keeps what it has; a second call
    computes nothing. No collective and no waiting: what other ranks have not written when it is
    needed is computed then.

    Args:
        prompts: in the same order on every rank, as `PromptPlan.every` gives them.
        progress: told contexts done and to do, of this rank.
        most: prompts beyond so many are left to be computed when needed.

    Returns:
        How many contexts this call computed.
    """
    store = contexts.store
    assert store is not None, "open_context_store() comes first"
    store.scan()
    wanted: dict[str, Tensor] = {}
    for prompt in islice(prompts, most):
        ids = contexts.tokenizer.ids(prompt)
        wanted.setdefault(contexts.key(ids), ids)
    share = list(wanted.items())[rank::world]
    missing = [(key, ids) for key, ids in share if store.read(key) is None]
    count = store.write_all(_computed(contexts, missing, progress))
    store.scan()
    return count


def _computed(
    contexts: ContextCache,
    missing: list[tuple[str, Tensor]],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Tensor]]:
    for done, (key, ids) in enumerate(missing, start=1):
        yield key, contexts.compute(ids).to("cpu", torch.float32)
        if progress is not None:
            progress(done, len(missing))
