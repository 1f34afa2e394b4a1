"""A wheel works without the repository beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from lml.data.assets import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("wheel")
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    # setuptools builds inside the folder of the sources
    sources = out / "sources"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "lml", "configs", "assets", "scripts"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in [*listed, "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE.txt"]:
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, sources / name)
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=sources, check=True)
    (path,) = out.glob("*.whl")
    return path


def test_a_wheel_holds_what_the_scripts_need(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("configs", "scripts", "assets"):
        theirs = {n.removeprefix("lml/repository/") for n in names if f"repository/{folder}/" in n}
        ours = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert theirs == ours, folder
    assert {name for name in names if name.startswith("lml/report/") and ".py" not in name} == {
        "lml/report/page.html",
        *(f"lml/report/uplot/{file.name}" for file in (ROOT / "lml/report/uplot").iterdir()),
    }


def test_an_installed_wheel_samples(wheel, tmp_path):
    """In an environment of its own, which sees this one's libraries but not its lml."""
    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    python = tmp_path / "venv/bin/python"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--no-index", str(wheel)], env=environment, cwd=tmp_path, check=True)
    ours = [path for path in sys.path if path.endswith("site-packages")]
    Path(target, "libraries.pth").write_text("\n".join(ours))
    work = tmp_path / "work"
    work.mkdir()
    made = subprocess.run(
        [
            tmp_path / "venv/bin/lml-sample",
            *("num_images=2", "batch_size=2", "nfe=5", "lml=calibrated", "threads=1"),
        ],
        cwd=work, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (run,) = work.glob("outputs/*/*/metrics.json")
    assert json.loads(run.read_text())["fd_cifar"]["value"] > 0
    where = [python, "-c", "import lml; print(lml.__file__)"]
    found = subprocess.run(where, cwd=work, env=environment, capture_output=True, text=True).stdout
    assert found.startswith(str(tmp_path))
