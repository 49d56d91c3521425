"""Hosts that do not agree, or cannot work: one line that names the host, soon, and no restart."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from jobs import GONE, TRAIN, Job, submit
from lab import Lab
from trees import config_file

SECONDS = 30
HOSTS = ["--nodelist=node1,node2", "--nodes=2"]


def refused(job: Job) -> str:
    """The line with which a job ended, soon, with exit code 2, and for good."""
    job.wait_state(GONE, 120)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0), job.text
    began, ended = (datetime.fromisoformat(job.field(name)) for name in ("StartTime", "EndTime"))
    assert (ended - began).total_seconds() <= SECONDS, job.text
    lines = [line for line in job.text.splitlines() if "disttrain: " in line and "wait" not in line]
    assert lines, job.text
    return lines[0]


def hide(lab: Lab, host: str, path: Path, text: str) -> None:
    """Show another text in place of a file, on one host."""
    other = lab.share / f"other-{path.name}"
    other.write_text(text)
    done = lab.run("mount", "--bind", other, path, host=host)
    assert done.returncode == 0, done.stderr


def show(lab: Lab, host: str, path: Path) -> None:
    """Take away what hides a file."""
    lab.run("umount", path, host=host)


def test_another_config_and_another_package_on_one_host(whole_lab: Lab) -> None:
    import accelerate

    lab = whole_lab
    folder = lab.share / "disagree"
    config = config_file("lora", folder)
    text = config.read_text()
    assert "learning_rate: 0.001" in text
    (metadata,) = Path(accelerate.__file__).parent.parent.glob("accelerate-*.dist-info/METADATA")
    version = f"\nVersion: {accelerate.__version__}\n"
    assert version in metadata.read_text()
    hide(lab, "node2", config, text.replace("learning_rate: 0.001", "learning_rate: 0.5"))
    hide(lab, "node2", metadata, metadata.read_text().replace(version, "\nVersion: 1.0.0\n"))
    line = refused(submit(lab, TRAIN, config, options=HOSTS))
    show(lab, "node2", config)
    show(lab, "node2", metadata)
    for word in ("preflight: ", "node1", "node2", "optim.learning_rate", "0.5", "0.001"):
        assert word in line, line
    for word in ("accelerate", "1.0.0", accelerate.__version__):
        assert word in line, line
    assert not (folder / "lora").exists()


def test_a_full_disk(whole_lab: Lab) -> None:
    lab = whole_lab
    folder = lab.share / "full"
    config = config_file("lora", folder)
    words = ["-t", "tmpfs", "-o", "size=16m", "none"]
    for host in ("node1", "node2"):
        place = folder / "small"
        place.mkdir(exist_ok=True)
        assert lab.run("mount", *words, place, host=host).returncode == 0
    line = refused(submit(lab, TRAIN, config, f"output_dir={place}", options=HOSTS))
    for host in ("node1", "node2"):
        show(lab, host, place)
    assert "preflight: node" in line, line
    assert f"{place} has 16 MiB free" in line


def test_a_first_host_that_cannot_be_reached(whole_lab: Lab) -> None:
    """On node2 the name of node1 leads to an address that nobody has."""
    lab = whole_lab
    config = config_file("lora", lab.share / "unreachable")
    hosts = Path("/etc/hosts")
    text = lab.run("cat", hosts, host="node2").stdout
    lines = [line for line in text.splitlines() if not line.endswith(" node1")]
    hide(lab, "node2", hosts, "\n".join([*lines, "10.77.0.99 node1"]) + "\n")
    line = refused(submit(lab, TRAIN, config, options=HOSTS))
    show(lab, "node2", hosts)
    assert "cannot reach the rendezvous node1:" in line, line
    assert "from node2" in line
