"""Adds the repository's configs, assets and scripts to a wheel, which setup.cfg cannot do."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "assets", "scripts")


class BuildWithRepository(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the clone itself is used
            return
        for folder in FOLDERS:
            target = Path(self.build_lib, "lml", "repository", folder)
            shutil.rmtree(target, ignore_errors=True)
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(Path(__file__).parent / folder, target, ignore=ignore)


setup(cmdclass={"build_py": BuildWithRepository})
