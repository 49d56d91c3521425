"""The files of launch/: each says when, how and what it expects, and its command is one of ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, clean_environment

LAUNCH = ROOT / "launch"
FILES = sorted(
    path for path in LAUNCH.rglob("*") if path.suffix in (".yaml", ".sh") and path.is_file()
)


def dry_run(script: str, tmp_path: Path, **environment: str) -> str:
    """What `disttrain launch` would do when a template's shell lines run on a node."""
    shown = script.replace("disttrain launch", "disttrain launch --dry-run")
    assert shown != script
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", shown],
        cwd=ROOT,
        env=clean_environment(PATH=path, **environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_says_when_how_and_what_it_expects(path: Path) -> None:
    header = "\n".join(line for line in path.read_text().splitlines()[:25] if line.startswith("#"))
    for word in ("# When:", "# Command", "# Expects:"):
        assert word in header, f"{path}: no '{word}'"
    for mentioned in re.findall(r"\b(?:launch|configs|slurm)/[\w./-]+\.\w+", header):
        assert (ROOT / mentioned).exists(), mentioned


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".yaml"], ids=lambda p: p.name)
def test_each_yaml_file_can_be_read(path: Path) -> None:
    assert all(list(yaml.safe_load_all(path.read_text())))


@pytest.mark.parametrize(
    "path", sorted((LAUNCH / "accelerate").glob("*.yaml")), ids=lambda p: p.name
)
def test_accelerate_reads_its_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found: Any = load_config_from_file(str(path))
    assert found.mixed_precision in ("no", None)
    settings = yaml.safe_load(path.read_text()).get("deepspeed_config", {})
    if settings:
        assert (ROOT / settings["deepspeed_config_file"]).is_file()


def test_the_skypilot_task_starts_this_node(tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "cloud/skypilot.yaml").read_text())
    out = dry_run(
        task["run"],
        tmp_path,
        **task["envs"],
        SKYPILOT_NODE_IPS="127.0.0.1\n10.0.0.7",
        SKYPILOT_NUM_GPUS_PER_NODE="4",
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NODE_RANK="1",
    )
    assert "--nproc-per-node=4" in out.replace(" 4", "=4")
    assert "127.0.0.1:29500" in out
    assert "train configs/lora.yaml output_dir=/runs" in out


@pytest.mark.parametrize(
    ("file", "pods", "variable"),
    [
        ("kubernetes_job.yaml", ["spec.template"], "JOB_COMPLETION_INDEX"),
        (
            "kubernetes_pytorchjob.yaml",
            [f"spec.pytorchReplicaSpecs.{kind}.template" for kind in ("Master", "Worker")],
            "RANK",
        ),
    ],
)
def test_kubernetes_pods_start_their_node(
    file: str, pods: list[str], variable: str, tmp_path: Path
) -> None:
    job = list(yaml.safe_load_all((LAUNCH / "cloud" / file).read_text()))[-1]
    for dotted in pods:
        found: Any = job
        for key in dotted.split("."):
            found = found[key]
        (container,) = found["spec"]["containers"]
        assert container["command"] == ["/bin/bash", "-c"]
        (line,) = container["args"]
        out = dry_run(line.removeprefix("exec "), tmp_path, **{variable: "1"})
        assert "disttrain" in out.split("--rdzv-endpoint")[1].split(":29500")[0]
        assert "train configs/lora.yaml output_dir=/runs" in out
