"""Sweeps in other processes: submitit's local one and Ray's, and what they say when a job fails.

Ray's launcher pins another cloudpickle, so it has an environment of its own:
`pip install -e '.[dev,ray]'` in a fresh one, then `pytest tests/cli/test_launchers.py`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HAS_RAY = importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None
NO_RAY = (
    "hydra-ray-launcher is not here: `pip install -e '.[dev,ray]'` in an environment of its own "
    "(it pins cloudpickle), then `pytest tests/cli/test_launchers.py`"
)
LAUNCHERS = [
    "submitit_local",
    pytest.param("ray", marks=pytest.mark.skipif(not HAS_RAY, reason=NO_RAY)),
]

# A script like those of scripts/, whose cells end in every way.
SCRIPT = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})

from lml.cli.main import main

class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(first)
        self.file = open(os.devnull)

@main("sample")
def task(cfg):
    from lml.errors import UserError

    seen = Path(f"started-{{cfg.seed}}")
    again = seen.exists()
    seen.write_text(" ".join(sys.argv[1:]))
    if cfg.seed == 1:
        raise UserError("seed=1: not this one")
    if cfg.seed == 2:
        1 / 0
    if cfg.seed == 3:
        raise Unpicklable("two", "arguments")
    if cfg.seed == 4 and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    Path(f"done-{{cfg.seed}}").write_text(str(os.getpid()))

if __name__ == "__main__":
    print(f"started by {{os.getpid()}}", flush=True)
    task()
"""


def launch(script: Path, *arguments: str, cwd: Path, seconds: float = 900):
    """Run a script in `cwd`, without anything on the path but what it puts there itself."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def lines_of(err: str) -> list[str]:
    """What was said on stderr, but for what Ray says of itself."""
    noise = re.compile(
        r"\[.* [WIE] \d|\d{4}-\d\d-\d\d .*(INFO|WARNING)|.*\(_run_job pid=|.*\(raylet"
    )
    return [line for line in err.splitlines() if line.strip() and not noise.match(line)]


@pytest.fixture
def ends(tmp_path) -> Path:
    (tmp_path / "code").mkdir()
    path = tmp_path / "code/ends.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_failures_are_told_and_the_other_jobs_end(ends, tmp_path, launcher):
    here = tmp_path / "here"
    here.mkdir()
    arguments = ["-m", f"hydra/launcher={launcher}", "seed=0,1,2,3,5"]
    process = launch(ends, *arguments, cwd=here)
    assert process.returncode == 2, process.stderr
    log = "(its traceback is in the job's log)"
    assert lines_of(process.stderr) == [
        "seed=1: seed=1: not this one",
        f"seed=2: ZeroDivisionError: division by zero {log}",
        f"seed=3: Unpicklable: two {log}",
    ]
    done = {file.name: file.read_text() for file in here.glob("done-*")}
    assert set(done) == {"done-0", "done-5"}
    first = re.match(r"started by (\d+)", process.stdout)[1]
    assert first not in done.values()
    # In the folder where the sweep was started, with its command line, and nothing else anywhere.
    assert (here / "started-0").read_text() == " ".join(arguments)
    started = {f"started-{seed}" for seed in (0, 1, 2, 3, 5)}
    assert {file.name for file in here.iterdir()} == {"outputs", *started, *done}
    assert {file.name for file in tmp_path.iterdir()} == {"code", "here"}
    logs = [file.read_text() for file in here.glob("outputs/multirun/.submitit/*/*.err")]
    if launcher == "submitit_local":
        assert sum("ZeroDivisionError: division by zero" in text for text in logs) == 1
    else:
        assert "ZeroDivisionError: division by zero" in process.stdout + process.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_whose_process_dies(ends, tmp_path, launcher):
    """submitit names it, and the same command completes the sweep; Ray does so by itself."""
    arguments = ["-m", f"hydra/launcher={launcher}", "seed=0,4,5"]
    process = launch(ends, *arguments, cwd=tmp_path)
    if launcher == "submitit_local":
        assert process.returncode == 2
        (line,) = lines_of(process.stderr)
        assert re.fullmatch(
            r"seed=4: its process died; see .*/\d+_0_log\.err; "
            "the same command completes the sweep",
            line,
        )
        assert {file.name for file in tmp_path.glob("done-*")} == {"done-0", "done-5"}
        process = launch(ends, *arguments, cwd=tmp_path)
    assert (process.returncode, lines_of(process.stderr)) == (0, [])
    assert {file.name for file in tmp_path.glob("done-*")} == {"done-0", "done-4", "done-5"}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_makes_the_images_of_this_process(script, toy, tmp_path, launcher):
    cells = ["lml.anchor=ema", "lml.kappa=0.5", "lml.rank=1,0,2"]
    assert script("sample", "-m", *toy, *cells).code == 0
    runs = {path.parent.name: path for path in tmp_path.glob("outputs/cifar10-*/*/images")}
    here = tmp_path / "here"
    here.mkdir()
    arguments = ["-m", f"hydra/launcher={launcher}", *toy, *cells]
    process = launch(ROOT / "scripts/sample.py", *arguments, cwd=here)
    (refused,) = lines_of(process.stderr)
    assert process.returncode == 0
    assert "lml.rank=2: lml.rank=2: must be 0 or 1 with anchor=ema" in refused
    assert (
        "cifar10-dpmsolverpp: 3 cells, 1 refused; to make: 20 images, 80 evaluations, "
        "time not known yet (give rate=, in evaluations/s)\n"
    ) in process.stdout
    made = {path.parent.name: path for path in here.glob("outputs/cifar10-*/*/images")}
    assert len(made) == 2 and made.keys() == runs.keys()
    for name, folder in made.items():
        files = sorted(folder.iterdir())
        assert [file.name for file in files] == sorted(f.name for f in runs[name].iterdir())
        assert all(f.read_bytes() == (runs[name] / f.name).read_bytes() for f in files)
        assert f"hydra/launcher={launcher}" in (folder.parent / "config.yaml").read_text()
    sweeps = [
        yaml.safe_load((folder / "outputs/cifar10-dpmsolverpp/sweep.yaml").read_text())
        for folder in (tmp_path, here)
    ]
    assert sweeps[0]["cells"] == sweeps[1]["cells"]
    assert [cell["status"] for cell in sweeps[1]["cells"]] == ["done", "done", "refused"]


@pytest.mark.skipif(not HAS_RAY, reason=NO_RAY)
def test_a_running_cluster_by_its_address(ends, tmp_path):
    """Its workers know nothing of this process: neither its folder nor its path."""
    ray = Path(sys.executable).with_name("ray")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["RAY_AUTH_MODE"] = "token"
    options = ["--num-cpus=1", "--node-ip-address=127.0.0.1", "--port=6399"]
    options += ["--include-dashboard=false", "--object-store-memory=80000000"]
    start = [str(ray), "start", "--head", *options]
    (tmp_path / "theirs").mkdir()
    subprocess.run(
        start,
        cwd=tmp_path / "theirs",
        env=environment,
        check=True,
        capture_output=True,
        timeout=120,
    )
    try:
        os.environ["RAY_AUTH_MODE"] = "token"
        address = "hydra.launcher.ray.init.address=127.0.0.1:6399"
        arguments = ["-m", "hydra/launcher=ray", address, "seed=0,1"]
        process = launch(ends, *arguments, cwd=tmp_path)
    finally:
        del os.environ["RAY_AUTH_MODE"]
        subprocess.run([str(ray), "stop"], env=environment, capture_output=True, timeout=120)
    assert process.returncode == 2
    assert lines_of(process.stderr) == ["seed=1: seed=1: not this one"]
    assert (tmp_path / "done-0").exists() and not list((tmp_path / "theirs").iterdir())


@pytest.mark.skipif(HAS_RAY, reason="hydra-ray-launcher is here")
def test_a_launcher_that_is_not_installed(script, toy):
    outcome = script("sample", "-m", *toy, "hydra/launcher=ray", "nfe=4,5")
    assert outcome.code == 2
    assert outcome.err == "hydra/launcher=ray: needs `pip install -e '.[ray]'`\n"


def test_a_launcher_that_cannot_start(script, toy, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # no sbatch there
    outcome = script("sample", "-m", *toy, "hydra/launcher=submitit_slurm", "nfe=4,5")
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("hydra/launcher=submitit_slurm: ")
    assert "srun" in outcome.err or "slurm" in outcome.err.split(": ", 1)[1]
