"""`disttrain slurm`: the job that is written, what reaches the training in it, and what is kept.

The scripts run here under bash with small stand-ins for SLURM's programs, which write down what
they were called with; tests/cluster runs them on a real cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, clean_environment, small_config, write_config

from disttrain import __version__, schema
from disttrain.cli import main
from disttrain.cluster import slurm_job
from disttrain.cluster.slurm_job import job_environment, revision
from disttrain.cluster.slurm_script import log_pattern, read_script, render, split_option
from disttrain.cluster.snapshot import manifest_rows
from disttrain.config_file import load_config
from disttrain.errors import UserError
from disttrain.manifest import read_manifest

GOLDEN = ROOT / "tests/golden"
STAMP = re.compile(r"[0-9]{8}-[0-9]{6}")
TRICKY = "a 'photo' of \"{token}\" $HOME `id` \\n ; # %j\nand a second line"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in slurm_job.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["slurm", *words, "--dry-run"]) == 0
    return STAMP.sub("STAMP", capsys.readouterr().out)


def compare(name: str, script: str) -> None:
    """What is rendered into a script, from its first option to its arguments.

    With UPDATE_GOLDEN set the file is written instead; read what changed before it is kept.
    """
    path = GOLDEN / name
    head, _, _ = script.replace(__version__, "VERSION").partition("\nset -uo pipefail")
    text = head[head.index("#SBATCH") :]
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


# The script.


def test_a_training_as_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    text = dry_run(
        capsys,
        *("configs/dreambooth.yaml", "--nodes", "2", "--gpus-per-node", "8"),
        *("--cpus-per-task", "64", "--time", "12:00:00", "--partition", "gpu", "--account", "a b"),
        *(
            "--qos",
            "high",
            "--mem",
            "256G",
            "--constraint",
            "a100&nvlink",
            "--signal-seconds",
            "300",
        ),
        *("--launcher", "accelerate", "--deepspeed", "zero2", "--env", "source '/my env/activate'"),
        *("--sbatch-option", "--exclusive", "--sbatch-option", "--comment=it's $5"),
        *("output_dir=my runs/100%", "name=fox"),
    )
    compare("slurm-train.sbatch", text)


def test_a_fleet_as_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    text = dry_run(
        capsys,
        *("configs/lora.yaml", "--fleet", "examples/fleet.csv", "--array", "8"),
        *(
            "--gpus-per-node",
            "4",
            "--cpus-per-task",
            "8",
            "--env",
            "image:disttrain",
            "name=people",
        ),
    )
    compare("slurm-fleet.sbatch", text)


@pytest.mark.parametrize("name", ["train.sbatch", "fleet.sbatch"])
def test_a_rendered_script_is_the_shipped_one(name: str) -> None:
    """Only its options, environment and arguments are new; bash can read it."""
    shipped = read_script(name)
    assert shipped == (ROOT / "slurm" / name).read_text()
    text = render(shipped, {"time": "5"}, {"DISTTRAIN_NPROC": "2"}, ["x"], "A note.")
    kept = [line for line in text.splitlines() if not line.startswith("#SBATCH")]
    body = [line for line in shipped.splitlines() if not line.startswith("#SBATCH")]
    added = ["", "# A note.", "export DISTTRAIN_NPROC=2", "set -- x"]
    place = kept.index("# A note.") - 1
    assert kept[place : place + 4] == added
    assert kept[:place] + kept[place + 4 :] == body
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_options_replace_those_of_the_script() -> None:
    text = render("#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --requeue\ntrue\n", {}, {}, [], "n")
    assert text.count("#SBATCH") == 2
    text = render("#!/bin/bash\n#SBATCH --nodes=1\ntrue\n", {"nodes": "4"}, {}, [], "n")
    assert re.findall("#SBATCH.*", text) == ["#SBATCH --nodes=4"]
    with pytest.raises(UserError, match=r"--partition: .* cannot stand in a line for sbatch"):
        render("#SBATCH --nodes=1\n", {"partition": "a\n#SBATCH --nodes=9"}, {}, [], "n")


def test_a_percent_sign_of_a_folder_is_no_field_of_slurm() -> None:
    assert log_pattern(Path("runs/%j"), "%j") == "runs/%%j/job-%j.log"


@pytest.mark.parametrize("text", ["-p x", "partition", "--", "--a b=c"])
def test_only_long_options_are_handed_on(text: str) -> None:
    with pytest.raises(UserError, match="is no long option; write --name=value"):
        split_option(text)


def test_variables_are_those_of_the_shell_unless_options_say_otherwise() -> None:
    options = argparse.Namespace(env=None, processes_per_node=None, launcher="torchrun")
    found = job_environment(options, {"DISTTRAIN_ENV": "module load x", "HOME": "/h"})
    assert found == {"DISTTRAIN_ENV": "module load x"}
    options = argparse.Namespace(env="e", processes_per_node=4, launcher="accelerate")
    inherited = {
        "DISTTRAIN_ENV": "x",
        "DISTTRAIN_LAUNCH": "--join-timeout 9",
        "DISTTRAIN_NPROC": "1",
    }
    assert job_environment(options, inherited) == {
        "DISTTRAIN_ENV": "e",
        "DISTTRAIN_NPROC": "4",
        "DISTTRAIN_LAUNCH": "--join-timeout 9 --launcher accelerate",
    }


# What reaches the training, through a real shell.

STUBS = {
    "sbatch": 'printf "%s\\0" "$@" >"$NOTES/sbatch"; [ "$1" = --parsable ] && echo "41;cluster"; '
    '[ "$1" = --test-only ] && cat >"$NOTES/stdin" && echo "Job 7 to start at noon" >&2; true',
    "srun": 'while case $1 in -*) true ;; *) false ;; esac; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; fi',
    "scancel": 'printf "%s\\0" "$@" >"$NOTES/scancel"',
    "disttrain": 'printf "%s\\0" "$@" >"$NOTES/disttrain"; pwd >"$NOTES/place"; '
    'printf "%s" "$MARK" >"$NOTES/mark"; exit "${STUB_CODE:-0}"',
}


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's programs and disttrain as scripts that note their words; returns where."""
    folder, notes = tmp_path / "stubs", tmp_path / "notes"
    folder.mkdir()
    notes.mkdir()
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(notes))
    return notes


def words_of(note: Path) -> list[str]:
    return note.read_text().split("\0")[:-1]


def run_job(script: Path, **variables: str) -> int:
    """The script as SLURM would start it, on the first of two nodes."""
    job = {
        "SLURM_JOB_ID": "41",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
    }
    environment = clean_environment(**{**job, **variables})
    done = subprocess.run(["bash", script], env=environment, check=False, timeout=60)
    return done.returncode


def submitted(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Path, str]:
    """Submit; returns the job's folder and what was printed."""
    assert main(["slurm", *words]) == 0
    text = capsys.readouterr().out
    log = re.search("^log (.*)$", text, re.M)
    assert log
    return Path(log[1]).parent, text


def test_settings_survive_blanks_quotes_dollars_and_lines(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my $runs 'of' 100%"
    path = write_config(small_config("lora", output, max_steps=2), tmp_path / "c.yaml")
    override = f"train.sample_prompts={json.dumps([TRICKY])}"
    env = "export MARK='a b' # it's \"so\" $HOME"
    folder, text = submitted(capsys, str(path), "--nodes", "2", "--env", env, override)
    assert folder.parent == output / "lora.jobs"
    assert text == f"submitted job 41\nlog {folder}/job-41.log\n"
    assert words_of(stubs / "sbatch") == ["--parsable", str(folder / "job.sbatch")]

    assert run_job(folder / "job.sbatch") == 0
    assert (stubs / "mark").read_text() == "a b"
    assert (stubs / "place").read_text().strip() == str(ROOT)
    command, config, *options = words_of(stubs / "disttrain")
    assert command == "launch"
    port = 20000 + 41 * 7
    expected = ["--rendezvous", f"node1:{port}", "--nodes", "2", "--node-rank", "0"]
    assert options == expected
    found = load_config(Path(config))
    assert found == load_config(path, [override])
    assert found.train.sample_prompts == (TRICKY,)


def test_options_of_launch_reach_it(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(small_config("dreambooth", tmp_path / "runs"), tmp_path / "c.yaml")
    words = ["--launcher", "accelerate", "--processes-per-node", "3", "--deepspeed", "zero3"]
    folder, _ = submitted(capsys, str(path), *words, "--offload", "--env", "true")
    assert run_job(folder / "job.sbatch", SLURM_NNODES="1") == 0
    assert words_of(stubs / "disttrain") == [
        *("launch", str(folder / "config.yaml"), "--launcher", "accelerate", "--nproc", "3"),
        *("--nodes", "1", "--node-rank", "0"),
    ]
    parallel = load_config(folder / "config.yaml").parallel
    assert (parallel.strategy, parallel.offload_optimizer) == ("zero3", True)


def test_the_code_of_the_training_is_the_job_s(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(small_config("lora", tmp_path / "runs"), tmp_path / "c.yaml")
    folder, _ = submitted(capsys, str(path), "--env", "true")
    assert run_job(folder / "job.sbatch", STUB_CODE="3") == 3


def test_a_fleet_s_job_runs_its_own_manifest(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["configs/lora.yaml", "--fleet", "examples/fleet.csv", "--array", "2", "--env", "true"]
    overrides = [f"output_dir={tmp_path}/runs", f"train.sample_prompts={json.dumps([TRICKY])}"]
    folder, text = submitted(capsys, *words, *overrides)
    assert text.endswith(f"log {folder}/job-41_*.log\n")
    assert run_job(folder / "job.sbatch", SLURM_NNODES="1") == 0
    command, manifest, config = words_of(stubs / "disttrain")
    assert command == "fleet"
    found = read_manifest(Path(manifest), schema.read_mapping(Path(config)))
    tree = schema.apply_overrides(schema.read_mapping(Path("configs/lora.yaml")), overrides)
    assert found == read_manifest(Path("examples/fleet.csv"), tree)


# Snapshots.


def fleet_tree(tmp_path: Path) -> dict[str, Any]:
    tree = small_config("lora", tmp_path)
    tree["subjects"][0]["instance_prompt"] = "{token} by the river"
    return tree


def test_a_manifest_s_snapshot_gives_the_same_subjects_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there/fox pictures").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    rows = [
        {"name": "007", "images": "fox pictures", "token": "a 'b' $c"},
        {"name": "b", "images": "fox pictures", "seed": 5, "train.max_steps": 9},
        {"name": "c", "images": "fox pictures", "captions.filename_pattern": '"[a-z]+ no"'},
        {"name": "d", "images": "fox pictures", "train.sample_prompts": ["a {token}", "yes"]},
        {"name": "e", "images": "fox pictures", "data.max_damaged": "0.25", "instance_prompt": ""},
        {"name": "f", "images": "fox pictures", "data.max_damaged": "null", "class_name": "null"},
    ]
    manifest = tmp_path / "there/m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = fleet_tree(tmp_path / "runs")
    tree["data"]["max_damaged"] = 0.5
    members = read_manifest(manifest, tree)
    kept = tmp_path / "runs/manifest.jsonl"
    kept.write_text(manifest_rows(members, tree))
    assert read_manifest(kept, tree) == members
    assert members[2].captions.filename_pattern == "[a-z]+ no"
    assert members[5].data.max_damaged is None
    # The test can fail: another subject is another member.
    assert read_manifest(kept, {**tree, "seed": 3}) != members


def test_a_folder_of_folders_becomes_rows(tmp_path: Path) -> None:
    tree = fleet_tree(tmp_path)
    members = read_manifest(ROOT / "examples/subjects", tree)
    kept = tmp_path / "manifest.jsonl"
    kept.write_text(manifest_rows(members, tree))
    assert read_manifest(kept, tree) == members
    changed = [replace(member, seed=4) for member in members]
    assert manifest_rows(changed, tree) != kept.read_text()


def test_what_is_kept_of_a_submission(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(small_config("lora", tmp_path / "runs"), tmp_path / "c.yaml")
    folder, _ = submitted(capsys, str(path), "--env", "true", "seed=3")
    names = ["config.yaml", "job.json", "job.sbatch", "revision.txt"]
    assert sorted(found.name for found in folder.iterdir()) == names
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 3
    assert (folder / "revision.txt").read_text().startswith(f"disttrain {__version__}\n")
    again, _ = submitted(capsys, str(path), "--env", "true")
    assert again != folder
    assert again.parent == folder.parent


def test_the_revision_names_commit_and_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", *who, *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    unknown = f"disttrain {__version__}\ncommit unknown (not a git checkout)\n"
    assert revision(tmp_path) == unknown
    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")
    assert revision(tmp_path) == f"disttrain {__version__}\ncommit {commit}\nclean\n"
    (tmp_path / "file").write_text("2")
    assert revision(tmp_path).endswith(f"commit {commit}\ndirty, 1 files differ\n M file\n")
    (tmp_path / "inside").mkdir()  # such as an environment within somebody's own repository
    assert revision(tmp_path / "inside") == unknown


def test_nothing_is_written_when_sbatch_refuses(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = "#!/bin/bash\necho 'sbatch: error: invalid partition' >&2\nexit 1\n"
    (stubs.parent / "stubs/sbatch").write_text(refusal)
    path = write_config(small_config("lora", tmp_path / "runs"), tmp_path / "c.yaml")
    assert main(["slurm", str(path), "--env", "true"]) == 2
    error = capsys.readouterr().err
    assert error == "disttrain: sbatch refused the job: sbatch: error: invalid partition\n"
    assert not list(tmp_path.glob("runs/*"))


def test_a_test_asks_sbatch_and_writes_nothing(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(small_config("lora", tmp_path / "runs"), tmp_path / "c.yaml")
    assert main(["slurm", str(path), "--test-only", "--env", "true", "--time", "5"]) == 0
    assert capsys.readouterr().out == "Job 7 to start at noon\n"
    assert words_of(stubs / "sbatch") == ["--test-only"]
    assert "#SBATCH --time=5\n" in (stubs / "stdin").read_text()
    assert not list(tmp_path.glob("runs/*"))


def test_without_slurm_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_config(small_config("lora", tmp_path / "runs"), tmp_path / "c.yaml")
    assert main(["slurm", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("disttrain: sbatch is not installed on this machine; run this where")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "slurm: give CONFIG, or --status RUN, or --cancel RUN"),
        (["configs/lora.yaml", "--nodes", "0"], "--nodes: must be at least 1"),
        (["configs/lora.yaml", "--array", "3"], "--array: only a fleet has tasks"),
        (["configs/lora.yaml", "--dry-run", "--test-only"], "--test-only: given beside --dry-run"),
        (["configs/lora.yaml", "--fsdp", "--deepspeed", "zero1"], "--fsdp: given beside"),
        (
            ["configs/lora.yaml", "--gpus-per-node", "2", "--processes-per-node", "4"],
            "--processes-per-node: 4 for 2 GPUs",
        ),
        (
            ["configs/lora.yaml", "--time", "5", "--sbatch-option", "--time=6"],
            "--sbatch-option: --time is set by disttrain slurm",
        ),
        (["configs/lora.yaml", "--sbatch-option", "--output=x"], "--sbatch-option: --output is"),
        (["configs/lora.yaml", "--sbatch-option", "-p"], "--sbatch-option: '-p' is no long option"),
        (
            ["configs/lora.yaml", "--fleet", "examples/fleet.csv", "--launcher", "accelerate"],
            "--launcher: workers of a fleet",
        ),
        (["--status", "runs/x", "--cancel", "runs/x"], "--cancel: takes a run folder alone"),
        (["configs/lora.yaml", "--status", "runs/x"], "--status: takes a run folder alone"),
        (["--status", "absent/run"], "absent/run: no job was submitted for it"),
        (["configs/lora.yaml", "--dry-run", "seed=-1"], "seed: -1 is impossible"),
        (["configs/lora.yaml", "--partition", "a\nb", "--dry-run"], "--partition: 'a\\nb' cannot"),
    ],
)
def test_contradictions_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slurm", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"disttrain: {message}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


# Status and cancel.

SHOWN = (
    "JobId=41 JobName=fox JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
    "ExitCode=0:0 RunTime=00:01:00 TimeLimit=12:00:00 NodeList=node[1-2] NumNodes=2"
)


def test_status_asks_slurm_and_the_run(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(small_config("lora", tmp_path / "runs"), tmp_path / "c.yaml")
    folder, _ = submitted(capsys, str(path), "--env", "true")
    (stubs.parent / "stubs/scontrol").write_text(f"#!/bin/bash\necho '{SHOWN}'\n")
    run = tmp_path / "runs/lora"
    assert main(["slurm", "--status", str(run)]) == 0
    job = "job 41: RUNNING, Restarts 2, RunTime 00:01:00, TimeLimit 12:00:00, NodeList node[1-2], "
    assert capsys.readouterr().out.splitlines() == [
        f"{job}ExitCode 0:0",
        f"log {folder}/job-41.log",
        f"{run}: not begun yet",
    ]
    run.mkdir()
    (run / "progress.json").write_text('{"finished": {"fox": 6}}')
    assert main(["slurm", "--status", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "fox: finished at step 6"


def test_status_of_a_job_that_slurm_forgot(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(small_config("lora", tmp_path / "runs"), tmp_path / "c.yaml")
    submitted(capsys, str(path), "--env", "true")
    for name in ("scontrol", "sacct"):
        stub = stubs.parent / "stubs" / name
        stub.write_text("#!/bin/bash\necho 'Invalid job id specified' >&2\nexit 1\n")
        stub.chmod(0o755)
    run = str(tmp_path / "runs/lora")
    assert main(["slurm", "--status", run]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "job 41: SLURM no longer knows it (Invalid job id specified)"
    (stubs.parent / "stubs/sacct").write_text(
        '#!/bin/bash\n[ "$1" = --completion ] && echo "41|COMPLETED|0:0"\ntrue\n'
    )
    assert main(["slurm", "--status", run]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "job 41: COMPLETED, exit code 0:0"


def test_cancel_ends_the_newest_job(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(small_config("lora", tmp_path / "runs"), tmp_path / "c.yaml")
    submitted(capsys, str(path), "--env", "true")
    newer = (stubs.parent / "stubs/sbatch").read_text().replace("41;cluster", "42")
    (stubs.parent / "stubs/sbatch").write_text(newer)
    submitted(capsys, str(path), "--env", "true")
    assert main(["slurm", "--cancel", str(tmp_path / "runs/lora")]) == 0
    assert capsys.readouterr().out == "cancelled job 42\n"
    assert words_of(stubs / "scancel") == ["42"]
