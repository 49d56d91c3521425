"""The denoising loss against formulas written out here, on a very small real UNet in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from disttrain.methods.objective import Denoiser, draw, posterior_sample

CHANNELS, SIDE, LENGTH, WIDTH = 4, 8, 3, 8
SUBJECTS, EACH = 2, 3
PREDICTIONS = ("epsilon", "v_prediction")
Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
        )
    return model.double().eval().requires_grad_(False)


def scheduler_of(prediction: str) -> DDPMScheduler:
    return DDPMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", prediction_type=prediction, clip_sample=False
    )


def batch_of(seed: int = 0) -> Batch:
    source = torch.Generator().manual_seed(seed)
    rows = SUBJECTS * EACH

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    return {
        "latents": normal(rows, CHANNELS, SIDE, SIDE),
        "noise": normal(rows, CHANNELS, SIDE, SIDE),
        "timesteps": torch.tensor([0, 999, 500, 10, 700, 321]),
        "context": normal(rows, LENGTH, WIDTH),
        "weights": torch.tensor([[0.5, 0.25, 2.0], [1.0, 0.0, 0.125]], dtype=torch.float64),
    }


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_losses_are_the_written_formula(unet: UNet2DConditionModel, prediction: str) -> None:
    batch = batch_of()
    found = Denoiser(unet, None, scheduler_of(prediction))(batch)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    kept = torch.cumprod(1 - betas, 0).double()
    expected = torch.zeros(SUBJECTS, dtype=torch.float64)
    for row, (subject, place) in enumerate(itertools.product(range(SUBJECTS), range(EACH))):
        t, x, e = batch["timesteps"][row], batch["latents"][row], batch["noise"][row]
        noisy = kept[t] ** 0.5 * x + (1 - kept[t]) ** 0.5 * e
        guess = unet(noisy[None], t, batch["context"][row][None]).sample[0]
        target = e
        if prediction == "v_prediction":
            target = kept[t] ** 0.5 * e - (1 - kept[t]) ** 0.5 * x
        error = ((guess - target) ** 2).sum() / (CHANNELS * SIDE * SIDE)
        expected[subject] += batch["weights"][subject, place] * error
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noising_and_target_are_diffusers_own(
    unet: UNet2DConditionModel, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the UNet is given, and a loss of zero where it predicts what diffusers would ask for."""
    batch, scheduler = batch_of(), scheduler_of(prediction)
    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    wanted = noise
    if prediction == "v_prediction":
        wanted = scheduler.get_velocity(latents, noise, timesteps)
    seen: list[Tensor] = []

    def perfect(noisy: Tensor, *_: Tensor, return_dict: bool) -> tuple[Tensor]:
        seen.append(noisy)
        return (wanted,)

    denoiser = Denoiser(unet, None, scheduler)
    monkeypatch.setattr(unet, "forward", perfect)
    assert denoiser(batch).abs().max() < 1e-12
    torch.testing.assert_close(seen[0], scheduler.add_noise(latents, noise, timesteps))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_subject_sees_its_own_rows_only(unet: UNet2DConditionModel, prediction: str) -> None:
    denoiser = Denoiser(unet, None, scheduler_of(prediction))
    for subject in range(SUBJECTS):
        batch = batch_of()
        for name in ("latents", "noise", "context"):
            batch[name].requires_grad_()
        denoiser(batch)[subject].backward()
        own = slice(subject * EACH, (subject + 1) * EACH)
        weighted = batch["weights"][subject] > 0
        for name in ("latents", "noise", "context"):
            gradient = batch[name].grad
            assert gradient is not None
            touched = gradient.flatten(1).abs().sum(dim=1) > 0
            assert torch.equal(touched[own], weighted), name
            touched[own] = False
            assert not touched.any(), name


def test_a_subject_in_a_pack_has_the_loss_it_has_alone(unet: UNet2DConditionModel) -> None:
    denoiser, batch = Denoiser(unet, None, scheduler_of("epsilon")), batch_of()
    together = denoiser(batch)
    assert together.shape == (SUBJECTS,)
    for subject in range(SUBJECTS):
        own = slice(subject * EACH, (subject + 1) * EACH)
        part = {name: value[own] for name, value in batch.items() if name != "weights"}
        alone = denoiser({**part, "weights": batch["weights"][subject : subject + 1]})
        torch.testing.assert_close(alone[0], together[subject], rtol=1e-12, atol=0)


def test_ids_pass_through_the_text_encoder_with_their_gradient(unet: UNet2DConditionModel) -> None:
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(config).double().eval()
    batch = batch_of()
    ids = torch.arange(SUBJECTS * EACH * LENGTH).view(-1, LENGTH) % 20
    given = {name: value for name, value in batch.items() if name != "context"}
    found = Denoiser(unet, text_encoder, scheduler_of("epsilon"))({**given, "ids": ids})
    context = text_encoder(input_ids=ids).last_hidden_state.detach()
    expected = Denoiser(unet, None, scheduler_of("epsilon"))({**given, "context": context})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.sum().backward()
    table = text_encoder.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    assert table.grad is not None
    assert table.grad.abs().sum() > 0


def test_the_noise_schedule_is_no_part_of_what_is_saved(unet: UNet2DConditionModel) -> None:
    denoiser = Denoiser(unet, None, scheduler_of("epsilon"))
    assert "alphas_cumprod" in dict(denoiser.named_buffers())
    assert all(name.startswith("unet.") for name in denoiser.state_dict())


def same(left: object, right: object) -> bool:
    names = ("posterior", "noise", "timestep")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def test_draws_are_a_function_of_seed_subject_stream_and_index() -> None:
    key = ((2, 4, 4), 1000, 3, "fox", "instance", 7)
    first = draw(*key)
    draw(*key[:-1], 8)
    assert same(draw(*key), first)
    for place, other in ((2, 4), (3, "owl"), (4, "class"), (5, 8)):
        changed = draw(*key[:place], other, *key[place + 1 :])  # type: ignore[arg-type]
        for name in ("posterior", "noise"):
            assert not np.array_equal(getattr(changed, name), getattr(first, name))
    assert first.posterior.shape == first.noise.shape == (2, 4, 4)
    assert first.posterior.dtype == first.noise.dtype == np.float32
    assert not np.array_equal(first.posterior, first.noise)


def test_timesteps_are_uniform_over_all_of_them() -> None:
    drawn = [draw((1, 1, 1), 20, 0, "fox", "instance", i).timestep for i in range(4000)]
    counts = np.bincount(drawn, minlength=20)
    assert len(counts) == 20, "none beyond the last"
    assert ((counts - 200) ** 2 / 200).sum() < 50  # chi square, 19 degrees, p = 1e-4
    few = {draw((1, 1, 1), 1000, 0, "fox", "instance", i).timestep for i in range(2000)}
    assert min(few) < 10
    assert max(few) > 989


def test_posterior_sample_is_mean_and_scaled_noise() -> None:
    mean = torch.tensor([1.0, -2.0]).view(2, 1, 1)
    log_variance = torch.tensor([0.0, 4.0]).view(2, 1, 1)
    moments = torch.cat([mean, log_variance])
    assert torch.equal(posterior_sample(moments, torch.zeros(2, 1, 1)), mean)
    found = posterior_sample(moments, torch.tensor([1.0, -0.5]).view(2, 1, 1))
    expected = [1.0 + 1.0, -2.0 - 0.5 * float(np.exp(2.0))]
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-6)
    wild = torch.cat([mean, torch.full((2, 1, 1), 1000.0)])
    assert posterior_sample(wild, torch.ones(2, 1, 1)).isfinite().all(), "bounded as in the VAE"
