"""The first 20 losses of each method, compared with a committed file.

A refactor keeps them. A change that means to alter them writes them anew and says why:
`UPDATE_GOLDEN=1 make test`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import METHODS, small_config, train_here

GOLDEN = Path(__file__).parent / "losses.json"


@pytest.mark.parametrize("method", METHODS)
def test_first_losses_are_the_committed_ones(method: str, tmp_path: Path) -> None:
    tree = small_config(method, tmp_path, max_steps=20, checkpoint_every=100)
    tree["method"]["train_text_encoder"] = False
    if method == "textual_inversion":
        del tree["method"]["train_text_encoder"]
    run = train_here(tree)
    losses = [json.loads(row)["loss"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({**golden, method: losses}, indent=1) + "\n")
        return
    assert losses == pytest.approx(golden[method], rel=1e-4)
