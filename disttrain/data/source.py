"""Where pictures come from: a folder, or shards through their index; both look the same from here.

Between the files of a subject and latents or loader: `open_source` is the way in. Invariant: what
the protocol in `samples.py` promises holds for every source that it returns.
"""

from __future__ import annotations

from pathlib import Path

from disttrain.config import RunConfig
from disttrain.data.folder import FolderSource, list_folder
from disttrain.data.samples import (
    DEFAULT_OPTIONS,
    SampleRecord,
    Source,
    SourceOptions,
    allowance,
)
from disttrain.data.shard_source import ShardSource, fetched_source
from disttrain.data.storage import place_of
from disttrain.errors import DataError

__all__ = [
    "INDEX_NAME",
    "FolderSource",
    "SampleRecord",
    "ShardSource",
    "Source",
    "SourceOptions",
    "allowance",
    "open_source",
    "source_options",
]

INDEX_NAME = "index.json"


def source_options(config: RunConfig) -> SourceOptions:
    """How a config wants pictures to be opened."""
    data = config.data
    return SourceOptions(
        max_damaged=data.max_damaged,
        caption_column=config.captions.column,
        shard_folder=config.cache_folder / "remote",
        shard_bytes=int(data.shard_cache_gb * 10**9),
    )


def open_source(where: str | Path, options: SourceOptions = DEFAULT_OPTIONS) -> Source:
    """Open a folder of pictures, an `index.json`, or a folder that holds one beside its shards.

    Args:
        where: a path, or a URL (`storage.SCHEMES`); of a remote store the URL of the index.

    Raises:
        DataError: missing, empty, of another kind, or with more damaged pictures than may be.
    """
    path = place_of(where)
    if isinstance(path, str):
        if not path.partition("?")[0].lower().endswith(".json"):
            raise DataError(f"{path}: give the URL of an index.json (`disttrain shard` makes one)")
        return fetched_source(path, options)
    if path.is_dir():
        listing = list_folder(path, options.caption_column)
        if not listing.pictures and (path / INDEX_NAME).is_file():
            return ShardSource(path / INDEX_NAME, options)
        return FolderSource(listing, options)
    if not path.exists():
        raise DataError(f"{path}: no such folder or index; give a folder of pictures")
    if path.suffix.lower() == ".json":
        return ShardSource(path, options)
    hint = "give its index.json (`disttrain shard` makes one)" if path.suffix == ".tar" else ""
    raise DataError(f"{path}: {hint or 'not a folder of pictures and not an index.json'}")
