"""How much disk a run is certain to need, known before anything is loaded.

For `preflight.py`. Invariant: never more than the run will need, so that nobody is refused who
would have had room: what cannot be known from files counts as a small floor.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from disttrain.config import RunConfig
from disttrain.engine.checkpoint import list_checkpoints
from disttrain.engine.run_folder import RunFolder
from disttrain.models.base import HUB_ID, SINGLE_FILES
from disttrain.models.folder import weight_files

FLOOR = 64 * 2**20
BYTES = 4  # of a float32, in which all that is trained is kept and saved
MOMENTS = 2  # tensors of that size that AdamW keeps for each trained one
UNET_OF_SINGLE_FILE = "model.diffusion_model."


def needed_bytes(config: RunConfig, fresh: bool) -> int:
    """For the checkpoints kept, one more that is being written, and the results; less what the
    run folder has of them already.

    Args:
        fresh: the run starts over in a new folder.

    Raises:
        DataError: the run folder's progress.json is damaged.
    """
    trained = _trained_bytes(config)
    if not trained:
        return FLOOR
    train, folder = config.train, RunFolder(config.folder)
    copies = 1 + MOMENTS + (1 if config.optim.ema_decay else 0)
    kept = min(train.keep_checkpoints, -(-train.max_steps // train.checkpoint_every))
    done = {} if fresh else folder.finished()
    checkpoints, results = 0, 0
    for subject in config.subjects:
        end = done.get(subject.name)
        if end is None or not end.holds(train):
            have = 0 if fresh else len(list_checkpoints(folder.checkpoints(subject.name)))
            checkpoints += max(0, kept - have)
            results += 1
    if not results:
        return FLOOR
    if kept == train.keep_checkpoints:  # an old one leaves only after the new one is in place
        checkpoints += 1
    return FLOOR + trained * (checkpoints * copies + results)


def _trained_bytes(config: RunConfig) -> int:
    """Float32 bytes of what is trained, at least; 0 where it is little or unknown."""
    if config.packable:
        return 0
    parts = ["unet", *(["text_encoder"] if config.trains_text else [])]
    path = Path(config.base_model).expanduser()
    if path.is_file():
        return _single_file_bytes(path) if path.suffix == SINGLE_FILES[0] else 0
    return sum(_part_bytes(config, path, part) for part in parts)


def _part_bytes(config: RunConfig, folder: Path, part: str) -> int:
    for name in weight_files(part):
        path = folder / name if folder.is_dir() else _in_hub_cache(config, name)
        if path is not None and path.is_file():
            return path.stat().st_size * (2 if ".fp16." in name else 1)
    return 0


def _in_hub_cache(config: RunConfig, name: str) -> Path | None:
    if config.base_model == "tiny" or not HUB_ID.fullmatch(config.base_model):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(
            config.base_model, name, revision=config.base_revision or None
        )
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _single_file_bytes(path: Path) -> int:
    total = 0
    try:
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                if name.startswith(UNET_OF_SINGLE_FILE):
                    size = BYTES
                    for side in handle.get_slice(name).get_shape():
                        size *= side
                    total += size
    except (OSError, SafetensorError):
        return 0  # loading it will say what is wrong
    return total
