"""RunConfig: every check names its key, and the example configs are what they say."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import METHODS, ROOT, small_config

from disttrain import schema
from disttrain.config import (
    DreamboothSettings,
    LoraSettings,
    RunConfig,
    TextualInversionSettings,
)
from disttrain.config_file import load_config, parse_config
from disttrain.errors import ConfigError

# Those that run as they stand; the embedded base's own pictures are made by `make tiny-base`.
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {ROOT / "configs/tiny_base.yaml"})

TI, LORA, DREAMBOOTH = METHODS
FINE_SUBJECT = "{name: b, images: examples/subjects/owl, token: ohwx, class_name: owl}"

# method, overrides, expected key, fragment of what is said about it
REFUSED: list[tuple[str, list[str], str, str]] = [
    (LORA, ["name=a/b"], "name", "'a/b' is no folder name"),
    (LORA, ["name=.."], "name", "'..' is no folder name"),
    (LORA, ["name="], "name", "'' is no folder name"),
    (LORA, ['name="a\\n"'], "name", "is no folder name"),
    (LORA, ["name=" + "a" * 101], "name", "is no folder name"),
    (LORA, ["subjects=[]"], "subjects", "empty; name at least one"),
    (
        LORA,
        [f"subjects=[{FINE_SUBJECT}, {FINE_SUBJECT.replace('name: b', 'name: B', 1)}]"],
        "subjects.1.name",
        "'B' is used twice",
    ),
    (LORA, ["method.target_modules=[]"], "method.target_modules", "empty"),
    (
        LORA,
        ["method.text_encoder_target_modules=[]"],
        "method.text_encoder_target_modules",
        "empty",
    ),
    *[
        (method, [*off, "optim.text_encoder_learning_rate=1e-4"], key, "is not trained")
        for key in ["optim.text_encoder_learning_rate"]
        for method, off in [
            (TI, []),
            (LORA, ["method.train_text_encoder=false"]),
            (DREAMBOOTH, ["method.train_text_encoder=false"]),
        ]
    ],
    (LORA, ["subjects.0.held_out=no/where"], "subjects.0.held_out", "no/where does not exist"),
    (
        LORA,
        ["subjects.0.images=examples/subjects/fox", "subjects.0.held_out=examples/subjects/fox/"],
        "subjects.0.held_out",
        "the training pictures themselves",
    ),
    (LORA, ["score.features="], "score.features", "empty; use effnet"),
    (LORA, ["score.features=./no/where"], "score.features", "./no/where does not exist"),
    (TI, ["score.sanity_prompts=['a <FOX>']"], "score.sanity_prompts.0", "subject's token"),
    (LORA, ["score.prompts=['a {tokn}']"], "score.prompts.0", "{tokn} is unknown"),
    (LORA, ["score.prompts=[a boat, 'a {caption}']"], "score.prompts.1", "write the words out"),
    (LORA, ["score.sanity_prompts=['a {tokn}']"], "score.sanity_prompts.0", "{tokn} is unknown"),
    *[
        (
            LORA,
            [f"score.sanity_prompts=[a boat, '{text}']"],
            "score.sanity_prompts.1",
            "subject's token",
        )
        for text in ("{token} at sea", "a sks boat")
    ],
    (LORA, ["train.sample_every=5"], "train.sample_prompts", "empty while sample_every"),
    *[
        (LORA, [f"{key}={value}"], key, "is impossible; it must be at least")
        for key, value in [
            ("seed", "-1"),
            ("data.resolution", "0"),
            ("data.batch_size", "0"),
            ("data.cached_crops", "0"),
            ("optim.lr_warmup_steps", "-1"),
            ("optim.max_grad_norm", "-0.1"),
            ("optim.max_grad_norm", ".nan"),
            ("optim.weight_decay", "-1e-9"),
            ("optim.weight_decay", ".inf"),
            ("train.max_steps", "0"),
            ("train.gradient_accumulation_steps", "0"),
            ("train.checkpoint_every", "0"),
            ("train.keep_checkpoints", "0"),
            ("train.sample_every", "-1"),
            ("train.sample_steps", "0"),
            ("train.sample_guidance_scale", "0.9"),
            ("train.sample_seed", "-1"),
            ("score.pictures", "0"),
            ("score.steps", "0"),
            ("score.guidance_scale", "0.5"),
            ("score.seed", "-1"),
            ("method.num_class_images", "-1"),
            ("method.prior_loss_weight", "-0.5"),
            ("method.class_infer_steps", "0"),
            ("method.class_guidance_scale", "0.5"),
            ("method.rank", "0"),
            ("optim.adam_beta1", "-0.1"),
            ("optim.adam_beta2", "1.0"),
            ("optim.adam_beta1", ".nan"),
        ]
    ],
    *[
        (LORA, [f"{key}={value}"], key, "is impossible; it must be above 0")
        for key in [
            "optim.learning_rate",
            "optim.text_encoder_learning_rate",
            "optim.adam_epsilon",
            "method.alpha",
        ]
        for value in ["0", "-1e-4", ".nan", ".inf"]
    ],
    (LORA, ["data.resolution=100"], "data.resolution", "100 is not a multiple of 8"),
    (TI, ["method.num_vectors=0"], "method.num_vectors", "it must be 1 to 75"),
    (TI, ["method.num_vectors=76"], "method.num_vectors", "it must be 1 to 75"),
    (LORA, ["optim.lr_warmup_steps=7"], "optim.lr_warmup_steps", "more than train.max_steps"),
    (LORA, ["subjects.0.name=a b"], "subjects.0.name", "'a b' is no file name"),
    (LORA, ["subjects.0.name=.hidden"], "subjects.0.name", "is no file name"),
    (LORA, ["subjects.0.images=nowhere"], "subjects.0.images", "nowhere does not exist"),
    (LORA, ["subjects.0.images=" + "a" * 300], "subjects.0.images", "does not exist"),
    (LORA, ["subjects.0.token="], "subjects.0.token", "'' is no word"),
    (LORA, ['subjects.0.token=" sks"'], "subjects.0.token", "' sks' is no word"),
    (TI, ["subjects.0.token=my fox"], "subjects.0.token", "has a blank"),
    (
        LORA,
        ["subjects.0.instance_prompt=a {token}", "subjects.0.template=subject.txt"],
        "subjects.0.template",
        "given beside instance_prompt",
    ),
    (
        DREAMBOOTH,
        ["method.num_class_images=0"],
        "subjects.0.class_images",
        "prior preservation is off",
    ),
    (TI, ["subjects.0.class_images=examples"], "subjects.0.class_images", "textual_inversion has"),
    (
        DREAMBOOTH,
        ["subjects.0.class_images=nowhere"],
        "subjects.0.class_images",
        "nowhere does not exist",
    ),
    (
        LORA,
        ["subjects.0.instance_prompt='{token} {klass}'"],
        "subjects.0.instance_prompt",
        "{klass} is unknown",
    ),
    (
        LORA,
        ["subjects.0.instance_prompt='{token} {}'"],
        "subjects.0.instance_prompt",
        "{} is unknown",
    ),
    (
        DREAMBOOTH,
        ["subjects.0.class_prompt='a {kind}'"],
        "subjects.0.class_prompt",
        "{kind} is unknown",
    ),
    (
        DREAMBOOTH,
        ["subjects.0.class_prompt='a {caption}'"],
        "subjects.0.class_prompt",
        "{caption} belongs to training pictures",
    ),
    (
        LORA,
        ["train.sample_prompts=['a {token}', 'a {caption}']"],
        "train.sample_prompts.1",
        "{caption} belongs to training pictures",
    ),
    (
        LORA,
        ["train.sample_prompts=['a {nmae}']"],
        "train.sample_prompts.0",
        "{nmae} is unknown",
    ),
    (
        TI,
        ["subjects.0.class_name=", "train.sample_prompts=['a {class_name}']"],
        "subjects.0.class_name",
        "empty, but train.sample_prompts.0 asks for {class_name}",
    ),
    (
        LORA,
        ["subjects.0.class_name=", "subjects.0.instance_prompt='{token} {class_name}'"],
        "subjects.0.class_name",
        "empty, but subjects.0.instance_prompt asks for {class_name}",
    ),
    (LORA, ["subjects.0.class_name="], "subjects.0.class_name", "empty; say what kind"),
    (
        LORA,
        ["subjects.0.instance_prompt=a photo"],
        "subjects.0.instance_prompt",
        "does not hold {token}",
    ),
    # A few that the schema refuses, to hold the types of the real tree.
    (LORA, ["optim.learning_rate="], "optim.learning_rate", "expected a number"),
    (LORA, ["mixed_precision=fp8"], "mixed_precision", "is not one of no, bf16, fp16"),
    (LORA, ["train.trackers=[tensorbord]"], "train.trackers.0", "did you mean tensorboard?"),
    (LORA, ["method.name=loar"], "method.name", "did you mean lora?"),
    (TI, ["method.rank=4"], "method.rank", "unknown key"),
    (LORA, ["data.latent_sampling=sometimes"], "data.latent_sampling", "is not one of random"),
]


def parsed(method: str, overrides: list[str] | None = None) -> RunConfig:
    return parse_config(schema.apply_overrides(small_config(method, Path("runs")), overrides or []))


@pytest.mark.parametrize(
    ("method", "overrides", "key", "fragment"),
    REFUSED,
    ids=[f"{method}-{';'.join(overrides)[:60]}" for method, overrides, _, _ in REFUSED],
)
def test_every_check_names_its_key_on_one_line(
    method: str, overrides: list[str], key: str, fragment: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(method, overrides)
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert fragment in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        (LORA, ["seed=0", "optim.max_grad_norm=0", "optim.weight_decay=0", "train.max_steps=1"]),
        (LORA, ["data.resolution=8", "method.rank=1", "train.sample_guidance_scale=1"]),
        (LORA, ["optim.adam_beta1=0", "optim.adam_beta2=0", "optim.lr_warmup_steps=6"]),
        (LORA, ["method.prior_loss_weight=0", "optim.text_encoder_learning_rate="]),
        (LORA, ["optim.text_encoder_learning_rate=1e-9", "mixed_precision=no"]),
        (LORA, ["subjects.0.token=two words", "subjects.0.instance_prompt='a [name]'"]),
        (LORA, ["subjects.0.class_name=", "subjects.0.template=subject.txt"]),
        (TI, ["method.num_vectors=75", "method.init_text=", "subjects.0.class_name="]),
        (DREAMBOOTH, ["train.sample_prompts=['a {token} {class_name}']", "train.sample_every=2"]),
    ],
)
def test_the_edges_of_what_is_possible_are_accepted(method: str, overrides: list[str]) -> None:
    assert parsed(method, overrides).method.name == method


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (TI, TextualInversionSettings),
        (LORA, LoraSettings),
        (DREAMBOOTH, DreamboothSettings),
    ],
)
def test_method_is_chosen_by_its_name(method: str, kind: type) -> None:
    assert type(parsed(method).method) is kind


def test_derived_settings() -> None:
    inversion, lora, dreambooth = (parsed(method) for method in METHODS)
    assert (inversion.packable, lora.packable, dreambooth.packable) == (True, True, False)
    assert (inversion.weight_decay, lora.weight_decay, dreambooth.weight_decay) == (0, 0.01, 0.01)
    assert parsed(TI, ["optim.weight_decay=0.2"]).weight_decay == 0.2
    assert parsed(LORA, ["optim.weight_decay=0"]).weight_decay == 0
    assert parsed(LORA, ["optim.weight_decay="]).weight_decay == 0.01
    assert (inversion.prior, lora.prior) == (None, None)
    assert dreambooth.prior is dreambooth.method
    assert (lora.folder, lora.cache_folder) == (Path("runs/lora"), Path("runs/.cache"))


def settings_in(value: Any) -> typing.Iterator[Any]:
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from settings_in(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from settings_in(item)


def test_the_whole_tree_is_frozen() -> None:
    found = list(settings_in(parsed(LORA)))
    assert len(found) == 10
    for settings in found:
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.name = "other"


def test_every_key_has_a_help_text() -> None:
    rows = schema.describe(RunConfig)
    assert len(rows) == len({key for key, _, _ in rows}) > 60
    for key, default, text in rows:
        assert len(text) > 8, key
        assert text.endswith("."), key
        assert default, key


@pytest.mark.parametrize("method", METHODS)
def test_resolved_settings_survive_yaml(method: str) -> None:
    config = parsed(method, ["train.sample_prompts=['ä {token}']", "optim.learning_rate=1.1e-7"])
    tree = schema.to_mapping(config)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    again = parse_config(yaml.safe_load(text))
    assert again == config
    assert schema.differences(tree, schema.to_mapping(again)) == {}


def test_differences_of_two_runs_name_the_keys() -> None:
    old = schema.to_mapping(parsed(LORA))
    new = schema.to_mapping(parsed(LORA, ["method.rank=5", "subjects.0.token=ohwx"]))
    expected = {"method.rank": (4, 5), "subjects.0.token": ("sks", "ohwx")}
    assert schema.differences(old, new) == expected


def test_there_is_a_config_for_each_method() -> None:
    assert {load_config(path).method.name for path in CONFIGS} >= set(METHODS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_example_configs_load_and_their_header_says_how_to_run_them(path: Path) -> None:
    config = load_config(path, ["train.max_steps=2", "optim.lr_warmup_steps=0"])
    assert config.train.max_steps == 2
    header = path.read_text().split("\n\n", 1)[0]
    assert f"disttrain train configs/{path.name}" in header
    for word in ("Hardware:", "Time:", "Expect:"):
        assert word in header
