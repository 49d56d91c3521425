"""Base models from folders and the hub, saved again, and every way they can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from disttrain.errors import ModelError
from disttrain.models.base import load_base
from disttrain.models.loading import weights_digest

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def tiny():
    return load_base("tiny")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folder_gives_back_every_weight(tiny, saved):
    loaded = load_base(str(saved))
    assert same(loaded.unet, tiny.unet)
    assert same(loaded.text_encoder, tiny.text_encoder)
    assert same(loaded.load_vae(), tiny.load_vae())
    assert loaded.tokenizer("a sks fox").input_ids == tiny.tokenizer("a sks fox").input_ids
    assert loaded.tokenizer.model_max_length == 77
    assert (loaded.name, loaded.family) == ("model", "sd1")
    assert (loaded.latent_channels, loaded.latent_scale, loaded.resolution) == (8, 8, 64)
    assert loaded.scaling_factor == tiny.scaling_factor
    assert torch.equal(loaded.scheduler.betas, tiny.scheduler.betas)
    for part in (loaded.unet, loaded.text_encoder, loaded.load_vae()):
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())
        assert all(weight.data_ptr() % 64 == 0 for weight in part.parameters())


def test_where_a_model_lay_is_not_in_what_is_made_of_it(saved, tmp_path):
    load_base(str(saved)).save(tmp_path / "again")
    texts = [path.read_text() for path in (tmp_path / "again").rglob("*.json")]
    assert len(texts) > 5
    assert not any(str(saved) in text for text in texts)


def test_stock_pipeline_draws_the_same_picture(tiny, saved):
    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        start = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 3, "generator": start, "output_type": "np"}
        return torch.from_numpy(pipeline("a photo of a fox", height=64, width=64, **options).images)

    parts = StableDiffusionPipeline(
        vae=tiny.load_vae(),
        text_encoder=tiny.text_encoder,
        tokenizer=tiny.tokenizer,
        unet=tiny.unet,
        scheduler=tiny.pipeline_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert torch.equal(draw(StableDiffusionPipeline.from_pretrained(saved)), draw(parts))


def test_save_takes_other_weights_and_leaves_the_model_alone(tiny, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny.unet.state_dict().items()}
    unet = {name: tensor + 1 for name, tensor in before.items()}
    text = {name: tensor + 2 for name, tensor in tiny.text_encoder.state_dict().items()}
    tiny.save(tmp_path / "m", unet=unet, text_encoder=text)
    loaded = load_base(str(tmp_path / "m"))
    assert all(torch.equal(tensor, unet[n]) for n, tensor in loaded.unet.state_dict().items())
    assert all(torch.equal(t, text[n]) for n, t in loaded.text_encoder.state_dict().items())
    assert all(torch.equal(tensor, before[n]) for n, tensor in tiny.unet.state_dict().items())


def test_saved_folder_serves_other_programs(saved):
    names = load_file(saved / TEXT_WEIGHTS).keys()
    assert "text_model.embeddings.token_embedding.weight" in names
    assert all(name.startswith("text_model.") for name in names)
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (saved / "tokenizer").iterdir()}
    modes = {path.stat().st_mode for path in saved.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_half_precision_is_read_as_float32(tiny, tmp_path):
    tiny.save(tmp_path / "half", half=True)
    assert load_file(tmp_path / "half" / UNET_WEIGHTS)["conv_in.weight"].dtype == torch.float16
    weight = load_base(str(tmp_path / "half")).unet.conv_in.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tiny.unet.conv_in.weight.half().float())


@pytest.mark.parametrize("suffix", [".fp16.safetensors", ".bin", ".fp16.bin"])
def test_other_weight_files(tiny, folder, suffix):
    for path in list(folder.rglob("*.safetensors")):
        stem = path.name.removesuffix(".safetensors")
        if suffix.endswith(".bin"):
            stem = stem.replace("model", "pytorch_model") if stem == "model" else stem
            torch.save(load_file(path), path.parent / (stem + suffix))
            path.unlink()
        else:
            path.rename(path.parent / (stem + suffix))
    loaded = load_base(str(folder))
    assert same(loaded.unet, tiny.unet)
    assert same(loaded.text_encoder, tiny.text_encoder)
    assert same(loaded.load_vae(), tiny.load_vae())


def test_old_tokenizer_files_are_enough(tiny, folder):
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/tokenizer_config.json").unlink()
    tokenizer = load_base(str(folder)).tokenizer
    assert tokenizer("a photo of a cat").input_ids == tiny.tokenizer("a photo of a cat").input_ids
    assert tokenizer.model_max_length == 77


def test_prediction_type_and_scheduler(folder):
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    loaded = load_base(str(folder))
    assert loaded.prediction_type == "v_prediction"
    assert loaded.pipeline_scheduler.config.prediction_type == "v_prediction"
    assert load_base(str(folder), prediction_type="epsilon").prediction_type == "epsilon"
    old = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    old |= {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "set_alpha_to_one": False}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(old))
    loaded = load_base(str(folder))
    assert type(loaded.pipeline_scheduler).__name__ == "PNDMScheduler"
    assert (loaded.prediction_type, loaded.scheduler.config.clip_sample) == ("epsilon", False)


def test_digests_follow_the_weights_only(saved, folder):
    first = load_base(str(saved))
    copy = load_base(str(folder))
    assert (copy.digest, copy.vae_digest) == (first.digest, first.vae_digest)
    weights = load_file(folder / UNET_WEIGHTS)
    weights["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"] += 1e-3
    save_file(weights, folder / UNET_WEIGHTS, {"format": "pt"})
    changed = load_base(str(folder))
    assert changed.digest != first.digest
    assert changed.vae_digest == first.vae_digest


def test_large_files_are_told_apart_by_samples(tmp_path):
    size = 80 * 2**20
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, size, dtype=np.uint8)
    digests = set()
    for number, place in enumerate([None, 0, size // 2, size - 1]):
        data = content.copy()
        if place is not None:
            data[place] ^= 1
        path = tmp_path / f"{number}.bin"
        path.write_bytes(data.tobytes())
        digests.add(weights_digest([("weights", path)]))
    assert len(digests) == 4
    (tmp_path / "short.bin").write_bytes(content[:-1].tobytes())
    assert weights_digest([("weights", tmp_path / "short.bin")]) not in digests


def spoil_truncate(folder):
    path = folder / UNET_WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_missing_weight(folder):
    weights = load_file(folder / TEXT_WEIGHTS)
    del weights["text_model.final_layer_norm.weight"]
    save_file(weights, folder / TEXT_WEIGHTS, {"format": "pt"})


def spoil_shape(folder):
    weights = load_file(folder / UNET_WEIGHTS)
    weights["conv_in.weight"] = weights["conv_in.weight"][:8].clone()
    save_file(weights, folder / UNET_WEIGHTS, {"format": "pt"})


def spoil_vocabulary(folder):
    path = folder / "tokenizer/tokenizer_config.json"
    tokens = load_base(str(folder)).tokenizer
    tokens.add_tokens(["<extra>"])
    tokens.save_pretrained(path.parent)


SPOILED = {
    "truncated": (spoil_truncate, "diffusion_pytorch_model.safetensors: cannot be loaded"),
    "missing weight": (spoil_missing_weight, "1 weights are missing, such as"),
    "other shape": (spoil_shape, "cannot be loaded"),
    "no weights": (lambda f: (f / TEXT_WEIGHTS).unlink(), "no weights of the text_encoder"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "vae/config.json"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no vocab.json"),
    "big vocabulary": (spoil_vocabulary, "49409 entries, its text encoder only 49408"),
    "no config": (lambda f: (f / "unet/config.json").write_text("{"), "not JSON"),
    "no width": (lambda f: (f / "unet/config.json").write_text("[1]"), "not a model's config"),
    "scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="Nothing"),
        "unknown scheduler 'Nothing'",
    ),
    "sdxl": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "StableDiffusionXLPipeline is not supported yet: Stable Diffusion 1.x and 2.x are",
    ),
    "flux": (
        lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"),
        "FluxPipeline is not supported yet",
    ),
    "sdxl unet": (
        lambda f: edit(f / "unet/config.json", addition_embed_type="text_time"),
        "not supported yet",
    ),
    "inpainting": (lambda f: edit(f / "unet/config.json", in_channels=9), "takes 9 channels"),
    "other unet": (
        lambda f: edit(f / "unet/config.json", _class_name="UNet2DModel"),
        "UNet2DModel is not supported yet",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_folders_are_told_in_one_line(folder, what):
    spoil, message = SPOILED[what]
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        load_base(str(folder)).load_vae()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_spoiled_vae_is_told_when_it_is_loaded(folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(b"nonsense")
    base = load_base(str(folder))
    with pytest.raises(ModelError, match="vae/diffusion_pytorch_model"):
        base.load_vae()


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for spec, message in {
        str(tmp_path / "nowhere"): "nowhere does not exist",
        "./nowhere": "nowhere does not exist",
        "a/b/c": "a/b/c does not exist",
        "model.safetensors": "model.safetensors does not exist",
        "empty": "empty: no diffusers model",
        "notes.txt": "neither a .safetensors nor a .ckpt file",
        "": "no diffusers model",
    }.items():
        with pytest.raises(ModelError) as caught:
            load_base(spec)
        assert message in str(caught.value)


HUB = '''
import http.server, json, sys, threading
from pathlib import Path

folder, cache, port_file = map(Path, sys.argv[1:4])
COMMIT = "0123456789012345678901234567890123456789"
asked = []

class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub's interface that loading a model needs."""

    def log_message(self, *_): pass

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        asked.append((self.command, path))
        if "gated" in path:
            return self.refuse(403, "GatedRepo")
        if "missing" in path:
            return self.refuse(401, "RepoNotFound")
        if "/v9" in path:
            return self.refuse(404, "RevisionNotFound")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if path.startswith("/api/models/") and "/tree/" in path:
            rows = [{"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size,
                     "oid": "0" * 40} for p in files]
            data, headers = json.dumps(rows).encode(), {"Content-Type": "application/json"}
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": str(p.relative_to(folder))} for p in files]
            data = json.dumps({"id": "team/model", "sha": COMMIT, "siblings": siblings,
                               "private": False, "tags": [], "downloads": 0}).encode()
            headers = {"Content-Type": "application/json"}
        else:
            found = folder / path.split("/resolve/")[1].split("/", 1)[1]
            if not found.is_file():
                return self.refuse(404, "EntryNotFound")
            data = found.read_bytes()
            headers = {"ETag": f'"{abs(hash(path)):x}"', "X-Repo-Commit": COMMIT}
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(cache),
                  HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
from disttrain.errors import ModelError
from disttrain.models.base import load_base
from disttrain.models.loading import weights_digest

def attempt(spec, **options):
    try:
        base = load_base(spec, **options)
    except ModelError as error:
        return str(error)
    return [base.name, base.digest, base.vae_digest, base.load_vae().dtype.__str__()]

found = {spec: attempt(spec) for spec in ("team/model", "team/gated", "team/missing")}
fetched = sorted(path.rsplit("/", 1)[-1] for command, path in asked if command == "GET")
found["fetched"] = fetched
found["revision"] = attempt("team/model", revision="v9")
server.shutdown()
server.server_close()
found["cached"] = attempt("team/model")
found["offline"] = attempt("team/other")
print(json.dumps(found))
'''


def test_hub_models_and_their_errors(saved, tmp_path):
    """Against a local server that speaks the hub's protocol; then with that server gone."""
    (tmp_path / "model").mkdir()
    shutil.copytree(saved, tmp_path / "model", dirs_exist_ok=True)
    weights = tmp_path / "model" / UNET_WEIGHTS
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    script = tmp_path / "hub.py"
    script.write_text(HUB)
    command = [sys.executable, str(script), str(tmp_path / "model"), str(tmp_path / "c"), "x"]
    environment = {n: v for n, v in os.environ.items() if "proxy" not in n.lower()}
    environment["HF_HUB_OFFLINE"] = "0"
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    local = load_base(str(saved))
    expected = ["team/model", local.digest, local.vae_digest, "torch.float32"]
    assert found["team/model"] == expected
    assert found["cached"] == expected
    assert "diffusion_pytorch_model.safetensors" in found["fetched"]
    assert "diffusion_pytorch_model.fp16.safetensors" not in found["fetched"]
    assert "is gated" in found["team/gated"]
    assert "exists neither here nor on the hub" in found["team/missing"]
    assert "no revision 'v9'" in found["revision"]
    assert "the hub cannot be reached" in found["offline"]
