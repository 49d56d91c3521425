"""The command line as people and scripts know it, frozen; and what it says when it refuses."""

from __future__ import annotations

import argparse
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import disttrain, small_config, write_config

from disttrain import __version__, errors, schema
from disttrain.cli import COMMANDS, EXAMPLES, build_parser, main
from disttrain.config import RunConfig

# name or options, number of values, default, required, type
SURFACE: dict[str, list[tuple[str, Any, Any, bool, Any]]] = {
    "train": [
        ("config", None, None, True, Path),
        ("overrides", "*", [], False, None),
        ("--fresh", 0, False, False, None),
        ("--dry-run", 0, False, False, None),
    ],
    "cache": [("config", None, None, True, Path), ("overrides", "*", [], False, None)],
    "fleet": [
        ("manifest", "?", None, False, Path),
        ("config", "?", None, False, Path),
        ("overrides", "*", [], False, None),
        ("--status", None, None, False, Path),
        ("--retry-failed", 0, False, False, None),
        ("--dry-run", 0, False, False, None),
    ],
    "shard": [
        ("source", "?", None, False, Path),
        ("destination", "?", None, False, Path),
        ("--samples-per-shard", None, 1000, False, int),
        ("--max-size", None, "256MB", False, None),
        ("--index", "+", None, False, None),
        ("--output", None, None, False, Path),
        ("--caption-key", None, None, False, None),
        ("--workers", None, None, False, int),
        ("--verify", None, None, False, None),
    ],
    "sample": [
        ("run", None, None, True, Path),
        ("--prompt", None, None, True, None),
        ("--negative-prompt", None, "", False, None),
        ("--subject", None, "", False, None),
        ("--step", None, None, False, int),
        ("--count", None, 1, False, int),
        ("--seed", None, 0, False, int),
        ("--steps", None, None, False, int),
        ("--guidance-scale", None, None, False, float),
        ("--size", None, None, False, int),
        ("--output", None, None, False, Path),
    ],
    "score": [
        ("run", None, None, True, Path),
        ("--subject", None, "", False, None),
        ("--pictures", None, None, False, int),
        ("--steps", None, None, False, int),
        ("--seed", None, None, False, int),
        ("--features", None, "", False, None),
        ("--held-out", None, "", False, None),
        ("--clip", None, "", False, None),
        ("--dino", None, "", False, None),
    ],
    "doctor": [("--distributed", "?", None, False, None)],
    "keys": [("prefix", "?", "", False, None)],
    "launch": [
        ("config", None, None, True, Path),
        ("overrides", "*", [], False, None),
        ("--fleet", None, None, False, Path),
        ("--launcher", None, "torchrun", False, None),
        ("--deepspeed", None, None, False, None),
        ("--fsdp", 0, False, False, None),
        ("--offload", 0, False, False, None),
        ("--nproc", None, None, False, int),
        ("--nodes", None, 1, False, int),
        ("--node-rank", None, None, False, int),
        ("--rendezvous", None, None, False, None),
        ("--max-restarts", None, 0, False, int),
        ("--join-timeout", None, None, False, int),
        ("--fresh", 0, False, False, None),
        ("--dry-run", 0, False, False, None),
    ],
    "slurm": [
        ("config", "?", None, False, Path),
        ("overrides", "*", [], False, None),
        ("--fleet", None, None, False, Path),
        ("--launcher", None, "torchrun", False, None),
        ("--deepspeed", None, None, False, None),
        ("--fsdp", 0, False, False, None),
        ("--offload", 0, False, False, None),
        ("--array", None, None, False, int),
        ("--nodes", None, None, False, int),
        ("--gpus-per-node", None, None, False, int),
        ("--processes-per-node", None, None, False, int),
        ("--cpus-per-task", None, None, False, int),
        ("--time", None, None, False, None),
        ("--partition", None, None, False, None),
        ("--account", None, None, False, None),
        ("--qos", None, None, False, None),
        ("--mem", None, None, False, None),
        ("--constraint", None, None, False, None),
        ("--signal-seconds", None, None, False, int),
        ("--env", None, None, False, None),
        ("--sbatch-option", None, [], False, None),
        ("--dry-run", 0, False, False, None),
        ("--test-only", 0, False, False, None),
        ("--status", None, None, False, Path),
        ("--cancel", None, None, False, Path),
    ],
}


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no commands")


def test_the_surface_is_frozen() -> None:
    """A change here breaks somebody's scripts: add to it freely, take away with care."""
    found = {
        command: [
            (", ".join(a.option_strings) or a.dest, a.nargs, a.default, a.required, a.type)
            for a in parser._actions
            if a.dest != "help"
        ]
        for command, parser in command_parsers().items()
    }
    assert found == SURFACE


def test_exit_codes_are_frozen() -> None:
    found = {kind.__name__: kind.exit_code for kind in errors.UserError.__subclasses__()}
    expected = dict.fromkeys(["ConfigError", "DataError", "ModelError", "CheckpointError"], 2)
    assert found == {**expected, "TrainingFailed": 3, "Interrupted": 75}
    assert (errors.EXIT_DONE, errors.EXIT_DEFECT, errors.UserError.exit_code) == (0, 1, 2)


def test_every_command_has_help_an_example_and_a_function() -> None:
    parsers = command_parsers()
    assert parsers.keys() == COMMANDS.keys() == EXAMPLES.keys()
    for command, parser in parsers.items():
        text = " ".join(parser.format_help().split())
        assert f"example: {EXAMPLES[command]}" in text
        for action in parser._actions:
            assert action.help, f"{command} {action.dest}"


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_examples_are_valid_command_lines(command: str) -> None:
    program, *words = shlex.split(EXAMPLES[command])
    assert program == "disttrain"
    assert build_parser().parse_args(words).command == command


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_version_and_help_are_answers_not_errors(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([flag])
    assert caught.value.code == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    if flag == "--version":
        assert shown.out == f"disttrain {__version__}\n"
    else:
        assert all(command in shown.out for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: CONFIG\n"),
        (["sample", "runs/x"], "the following arguments are required: --prompt"),
        (["train", "c.yaml", "--dry-rum"], "unrecognized arguments: --dry-rum"),
        (["doctor", "extra"], "unrecognized arguments: extra"),
        (["sample", "r", "--prompt", "p", "--count", "two"], "invalid int value: 'two'"),
    ],
)
def test_wrong_words_exit_with_2_and_say_why(
    words: list[str], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert fragment in capsys.readouterr().err


def test_a_bad_config_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    tree = small_config("lora", tmp_path / "runs")
    tree["optim"]["learning_rat"] = 1
    path = write_config(tree, tmp_path / "config.yaml")
    done = disttrain("train", path)
    assert done.returncode == 2
    assert done.stdout == ""
    expected = "disttrain: optim.learning_rat: unknown key; did you mean learning_rate?\n"
    assert done.stderr == expected
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "absent.yaml"], "absent.yaml: No such file or directory; give the path of"),
        (["train", "configs/lora.yaml", "seed=-1"], "seed: -1 is impossible"),
        (["train", "configs/lora.yaml", "--dry-run", "seed=-2"], "seed: -2 is impossible"),
        (["train", "configs/lora.yaml", "seed=-3", "--dry-run", "name=x"], "seed: -3 is"),
        (["train", "configs/lora.yaml", "--fresh", "nonsense"], "override 'nonsense': write it"),
        (["train", "configs/lora.yaml", "subjects.0.images=no"], "subjects.0.images: expected"),
        (["fleet"], "fleet: give MANIFEST and CONFIG, or --status RUN"),
        (["fleet", "examples/fleet.csv"], "fleet: give MANIFEST and CONFIG"),
        (["fleet", "a.csv", "configs/lora.yaml"], "a.csv: No such file or directory"),
        (["fleet", "examples/fleet.csv", "b.yaml"], "b.yaml: No such file or directory"),
        (["fleet", "configs/lora.yaml", "configs/lora.yaml"], "configs/lora.yaml: a manifest is"),
        (["fleet", "examples/fleet.csv", "configs/lora.yaml", "x"], "override 'x': write it"),
        (["fleet", "--status", "absent"], "absent/manifest.json: No such file or directory"),
        (["keys", "adam"], "no key starts with 'adam'"),
        (["keys", "nothing"], "no key starts with 'nothing'; disttrain keys lists them all"),
        (["shard", "only-one"], "shard: give SRC and DST"),
        (["shard", "a", "b", "--samples-per-shard", "0"], "--samples-per-shard: must be at least"),
        (["shard", "a", "b", "--workers", "0"], "--workers: must be at least 1"),
        (["shard", "a", "b", "--output", "x"], "--output: says where --index writes"),
        (["shard", "a", "b", "--max-size", "12 apples"], "--max-size: '12 apples' is no size"),
        (["shard", "a", "b", "--max-size", "0.1B"], "--max-size: must be at least one byte"),
        (["shard", "--index", "https://x.org/{0..3}.tar"], "https://x.org/0.tar: cannot write"),
        (["shard", "--index", "https://x.org/*.tar"], "https://x.org/*.tar: web servers do not"),
    ],
)
def test_refusals_are_one_line_on_standard_error(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"disttrain: {message}")
    assert shown.err.count("\n") == 1


def test_other_ranks_say_who_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "absent.yaml"]) == 2
    prefix = f"[{socket.gethostname()} rank 3] disttrain: absent.yaml: "
    assert capsys.readouterr().err.startswith(prefix)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TrainingFailed("loss"), 3),
        (errors.Interrupted("stopped"), 75),
        (errors.CheckpointError("damaged"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_end_has_its_exit_code(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "doctor", end)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(COMMANDS, "doctor", fail)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_overrides_may_stand_on_both_sides_of_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(small_config("lora", tmp_path), tmp_path / "config.yaml")
    assert main(["train", str(path), "train.max_steps=7", "--dry-run", "data.batch_size=2"]) == 0
    assert "7 steps of 2 pictures" in capsys.readouterr().out


def test_a_fleet_may_be_looked_at_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["examples/fleet.csv", "configs/lora.yaml", f"output_dir={tmp_path}/runs"]
    assert main(["fleet", *words, "--dry-run", "train.max_steps=9"]) == 0
    first, fox, penguin, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"fleet of 5 subjects in {tmp_path}/runs/fox-lora"
    assert fox.split() == [
        *("fox", "examples/subjects/fox", "token", "sks"),
        *("optim.learning_rate=0.0005", "train.max_steps=9"),
    ]
    assert penguin.split()[-1] == "train.max_steps=200"
    assert last == "nothing was written (dry run)"
    assert list(tmp_path.iterdir()) == []


def test_the_status_of_a_fleet_without_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from disttrain.engine.fleet_folder import FAILED, FINISHED, TRAINING, FleetFolder, Status

    folder = FleetFolder(tmp_path)
    folder.remember(["fox", "owl", "elk", "cod"])
    folder.write(Status("fox", FINISHED, 9, 9, 0.125, 3.0, "0@here:1"))
    folder.write(Status("owl", TRAINING, 4, 9))
    folder.write(Status("elk", FAILED, 0, 9, reason="no pictures"))
    assert main(["fleet", "--status", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["fox", "finished", "9/9", "loss", "0.1250", "3.0s", "0@here:1"],
        ["owl", "stopped", "4/9", "0.0s"],
        ["elk", "failed", "0/9", "0.0s", "no", "pictures"],
        ["cod", "waiting", "0/0", "0.0s"],
        ["1", "failed,", "1", "finished,", "1", "stopped,", "1", "waiting"],
    ]


def test_keys_lists_every_key_with_default_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = schema.describe(RunConfig)
    assert len(lines) == 2 * len(rows)
    shown = zip(lines[::2], lines[1::2], strict=True)
    for (head, text), (key, default, help_text) in zip(shown, rows, strict=True):
        assert head == f"{key}  [{default}]"
        assert text == "    " + " ".join(help_text.split())


def test_keys_may_be_asked_for_by_their_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "optim.adam"]) == 0
    heads = capsys.readouterr().out.splitlines()[::2]
    assert [head.split()[0] for head in heads] == [
        "optim.adam_beta1",
        "optim.adam_beta2",
        "optim.adam_epsilon",
    ]


def test_every_key_of_the_example_configs_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys"])
    keys = {line.split("  [")[0] for line in capsys.readouterr().out.splitlines()[::2]}
    for path in sorted(Path("configs").glob("*.yaml")):
        tree = yaml.safe_load(path.read_text())
        method = tree["method"]["name"]
        for dotted in schema.flatten(tree):
            start, *rest = dotted.split(".")
            if start == "method":
                start = f"method({method})"
            if start == "subjects":
                start, rest = "subjects.N", rest[1:]
            rest = rest[:1]
            assert ".".join([start, *rest]) in keys, dotted
