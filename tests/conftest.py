"""Small real runs on the embedded base, shared by the tests that need a trained result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
METHODS = ("textual_inversion", "lora", "dreambooth")

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SETTINGS: dict[str, dict[str, Any]] = {
    "textual_inversion": {
        "method": {"name": "textual_inversion", "num_vectors": 2, "init_text": "animal face"},
        "token": "<fox>",
        "learning_rate": 5e-3,
    },
    "lora": {
        "method": {"name": "lora", "rank": 4, "alpha": 8, "train_text_encoder": True},
        "token": "sks",
        "learning_rate": 1e-3,
    },
    "dreambooth": {
        "method": {"name": "dreambooth", "num_class_images": 6, "train_text_encoder": True},
        "token": "sks",
        "learning_rate": 1e-4,
    },
}


def small_config(method: str, output: Path, **train: Any) -> dict[str, Any]:
    """The tree of a run of a few steps; LoRA and DreamBooth with everything they can train."""
    chosen = SETTINGS[method]
    subject = {
        "name": "fox",
        "images": str(ROOT / "examples/subjects/fox"),
        "token": chosen["token"],
        "class_name": "fox",
    }
    if method == "textual_inversion":
        subject["template"] = str(ROOT / "templates/subject.txt")
    if method == "dreambooth":
        subject["class_images"] = str(ROOT / "examples/class_pictures/animal_face")
    return {
        "name": method,
        "output_dir": str(output),
        "method": dict(chosen["method"]),
        "subjects": [subject],
        "data": {"resolution": 64, "batch_size": 4, "random_flip": True, "center_crop": False},
        "optim": {"learning_rate": chosen["learning_rate"], "scale_lr": "none"},
        "train": {"max_steps": 6, "checkpoint_every": 3, **train},
    }


def write_config(tree: dict[str, Any], path: Path) -> Path:
    """The tree as a YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment without what a launcher may have left in it; one thread a process."""
    dropped = ("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def run_command(
    *arguments: str | Path, timeout: float = 180, **extra: str
) -> subprocess.CompletedProcess[str]:
    """A real process in the repository root, its output captured."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=ROOT,
        env=clean_environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def disttrain(*arguments: str | Path, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """`python -m disttrain ...` in a process of its own."""
    return run_command(sys.executable, "-m", "disttrain", *arguments, timeout=timeout)


def train_here(tree: dict[str, Any], fresh: bool = False) -> Path:
    """Train in this process; returns the run folder."""
    from disttrain.config_file import parse_config
    from disttrain.engine.train import train

    config = parse_config(tree)
    try:
        train(config, fresh=fresh)
    finally:
        forget_accelerate()
    return config.folder


def checkpoints(run: Path, subject: str = "") -> list[Path]:
    """Checkpoints of a subject of a run, or of its only one, oldest first."""
    from disttrain.engine.checkpoint import list_checkpoints

    folders = [run / "subjects" / subject] if subject else list((run / "subjects").iterdir())
    assert len(folders) == 1
    return list_checkpoints(folders[0] / "checkpoints")


def forget_accelerate() -> None:
    """Accelerate keeps one state per process; a test needs a new one."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished small run per method, with previews."""
    output = tmp_path_factory.mktemp("trained")
    preview = {
        "sample_prompts": ["a photo of {token}"],
        "sample_every": 3,
        "sample_steps": 4,
        "sample_guidance_scale": 4.0,
    }
    return {method: train_here(small_config(method, output, **preview)) for method in METHODS}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base as a diffusers folder, for stock pipelines."""
    from disttrain.models.base import load_base

    folder = tmp_path_factory.mktemp("base") / "tiny"
    load_base("tiny").save(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of configs are meant from the repository root."""
    monkeypatch.chdir(ROOT)
