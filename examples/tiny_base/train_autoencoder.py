"""Second step of the embedded base model: the autoencoder between pixels and latents.

    python examples/tiny_base/train_autoencoder.py PICTURES AUTOENCODER --steps 4000

AUTOENCODER becomes a diffusers folder. The same command goes on where it was stopped. When it is
done, the mean and spread of each latent channel over all pictures are folded into the layers beside
the latents, so that they have mean 0 and spread 1 and `scaling_factor` is 1 in truth.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from parts import drawn
from torch import Tensor, nn
from torch.nn import functional

from disttrain import randomness
from disttrain.data.images import decode
from disttrain.files import atomic_writer, write_json

SETTINGS = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": (16, 32, 96, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 1.0,
}
BATCH = 16
LEARNING_RATE = 1.5e-3
WARM_UP = 200  # steps
DIVERGENCE_WEIGHT = 1e-5  # of the posterior's distance to a standard normal distribution
EDGE_WEIGHT = 1.0  # of differences between neighbouring pixels, which keep outlines sharp
KEEP_EVERY = 250  # steps


def load_pictures(folder: Path) -> np.ndarray:
    """All pictures below a folder, `[N, H, W, 3]`, 0 to 255, in the order of their names."""
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    return np.stack([decode(path.read_bytes(), str(path)).pixels for path in paths])


def to_tensor(pixels: np.ndarray) -> Tensor:
    """`[N, 3, H, W]` in -1 to 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch_of(pictures: np.ndarray, step: int) -> Tensor:
    """The pictures of one step: half of them mirrored, half with their colours exchanged."""
    source = randomness.generator(0, ("tiny base", "autoencoder"), step)
    chosen = pictures[source.integers(len(pictures), size=BATCH)]
    for number in range(BATCH):
        if source.random() < 0.5:
            chosen[number] = chosen[number, :, ::-1]
        if source.random() < 0.5:
            chosen[number] = chosen[number][..., source.permutation(3)]
    return to_tensor(chosen)


def loss_of(vae: AutoencoderKL, batch: Tensor, draws: Tensor) -> Tensor:
    """Absolute error of pixels and of edges, and the divergence (Kingma and Welling 2014)."""
    posterior = vae.encode(batch).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    latents = posterior.mean + posterior.std * draws
    decoded = vae.decode(latents).sample.float()  # pyright: ignore[reportAttributeAccessIssue]
    error = (decoded - batch).abs().mean()
    for dimension in (2, 3):
        edges = decoded.diff(dim=dimension) - batch.diff(dim=dimension)
        error = error + EDGE_WEIGHT * edges.abs().mean()
    return error + DIVERGENCE_WEIGHT * posterior.kl().float().mean()


def rate_at(step: int, steps: int) -> float:
    """Learning rate: up in a line, then down in half a cosine."""
    part = min(1.0, (step + 1) / WARM_UP)
    return LEARNING_RATE * part * 0.5 * (1 + math.cos(math.pi * step / steps))


class State:
    """What goes on after a stop: weights, moments of the optimizer, steps done."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path = folder / "training.pt"
        self.vae = drawn("tiny base vae", lambda: AutoencoderKL(**SETTINGS)).to(device).train()
        self.vae.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.vae.parameters(), betas=(0.9, 0.99))
        self.step = 0
        if self.path.is_file():
            saved = torch.load(self.path, map_location=device, weights_only=True)
            self.vae.load_state_dict(saved["vae"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]

    def save(self) -> None:
        """Replace the file at once."""
        state = {
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with atomic_writer(self.path) as handle:
            torch.save(state, handle)


def train(state: State, pictures: np.ndarray, steps: int, device: str) -> None:
    """Take the autoencoder to its steps."""
    started, first = time.perf_counter(), state.step
    while state.step < steps:
        for group in state.optimizer.param_groups:
            group["lr"] = rate_at(state.step, steps)
        batch = batch_of(pictures, state.step).to(device)
        shape = (BATCH, 8, batch.shape[2] // 8, batch.shape[3] // 8)
        draws = randomness.normal(shape, 0, ("tiny base", "posterior"), state.step)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(state.vae, batch, torch.from_numpy(draws).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.vae.parameters(), 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        if state.step % KEEP_EVERY == 0 or state.step == steps:
            state.save()
            rate = (state.step - first) * BATCH / (time.perf_counter() - started)
            print(
                f"step {state.step}/{steps}  loss {loss.item():.4f}  {rate:.0f} pictures/s",
                flush=True,
            )


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: np.ndarray, device: str) -> Tensor:
    """The posterior means of all pictures, `[N, C, h, w]`."""
    means = []
    for start in range(0, len(pictures), 64):
        batch = to_tensor(pictures[start : start + 64]).to(device)
        means.append(vae.encode(batch).latent_dist.mean)  # pyright: ignore
    return torch.cat(means)


@torch.no_grad()
def normalise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold mean and spread of each latent channel into the layers on both sides of the latents."""
    channels = latents.shape[1]
    mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out_of = vae.quant_conv, vae.post_quant_conv
    assert isinstance(into, nn.Conv2d)
    assert isinstance(out_of, nn.Conv2d)
    assert into.bias is not None
    assert out_of.bias is not None
    into.weight[:channels] /= spread[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / spread
    into.bias[channels:] -= 2 * spread.log()
    out_of.bias += (out_of.weight[:, :, 0, 0] @ mean[:, None])[:, 0]
    out_of.weight *= spread[None, :, None, None]


@torch.no_grad()
def signal_to_noise(vae: AutoencoderKL, pictures: np.ndarray, device: str) -> float:
    """Mean peak signal-to-noise ratio of the pictures after a way through the latents, in dB."""
    found = []
    for start in range(0, len(pictures), 64):
        batch = to_tensor(pictures[start : start + 64]).to(device)
        latents = vae.encode(batch).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
        decoded = vae.decode(latents).sample.clamp(-1, 1)  # pyright: ignore
        error = functional.mse_loss(decoded, batch, reduction="none").mean(dim=(1, 2, 3))
        found.append(10 * torch.log10(4 / error))
    return float(torch.cat(found).mean())


def main() -> None:
    """Command line: pictures in, a diffusers folder out."""
    parser = argparse.ArgumentParser(description="Train the autoencoder of the embedded base.")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures = load_pictures(arguments.pictures)
    state = State(arguments.output, device)
    train(state, pictures, arguments.steps, device)
    vae = state.vae.eval()
    normalise(vae, latents_of(vae, pictures, device))
    ratio = signal_to_noise(vae, pictures, device)
    vae.save_pretrained(arguments.output)
    write_json(arguments.output / "quality.json", {"pictures": len(pictures), "psnr_db": ratio})
    print(f"{arguments.output}: {ratio:.2f} dB over {len(pictures)} pictures")


if __name__ == "__main__":
    main()
