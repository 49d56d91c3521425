"""A model on the Hugging Face hub becomes a local folder; `folder.py` loads it like any other.

Invariant: what is used is one commit, and only the files that are needed are fetched: every
configuration, and one weight file a part.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from disttrain.errors import ModelError
from disttrain.models.loading import one_line


def download(
    model: str,
    revision: str | None,
    weights: Iterable[Iterable[str]],
    key: str = "base_model",
) -> Path:
    """Local folder of hub model `model`; from the cache when it is there and the hub is not.

    Args:
        revision: branch, tag or commit; None for the default branch.
        weights: for each part its possible weight files, the preferred one first.
        key: the setting that named the model, for messages.

    Raises:
        ModelError: unknown, gated, or unreachable and not in the cache.
    """
    try:
        folder = Path(
            snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.txt"])
        )
        for candidates in weights:
            _download_first(model, folder.name, candidates)
    except GatedRepoError as error:
        raise ModelError(
            f"{key}: '{model}' is gated; accept its terms on its hub page and `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{key}: '{model}' exists neither here nor on the hub; check the name, or run"
            " `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"base_revision: hub model '{model}' has no revision '{revision}'"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{key}: '{model}' does not exist here, and the hub cannot be reached; check the"
            " path or the network"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{key}: '{model}' is no file, folder or hub id") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{key}: hub model '{model}': {one_line(error)}") from error
    return folder


def _download_first(model: str, commit: str, candidates: Iterable[str]) -> None:
    """Fetch the first candidate that exists; none is no error here: loading will name the part."""
    unreachable: LocalEntryNotFoundError | None = None
    for name in candidates:
        try:
            hf_hub_download(model, name, revision=commit)
            return
        except LocalEntryNotFoundError as error:
            unreachable = error
        except EntryNotFoundError:
            continue
    if unreachable is not None:
        raise unreachable
