"""Bad input of any kind ends in one line: some of what tests/count_bad_input.py tries, each time.

All in this process, on tiny models, so that a setting which happens to be well is simply made.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import count_bad_input as bad
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lml.quoting import hydra_quoted

FUZZ = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    # `script` restores what it changes, and the folder is made anew for each example
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """What the cases work on; not to be written to."""
    folder = tmp_path_factory.mktemp("workshop")
    bad.furnish(folder)
    return folder


@pytest.fixture
def outcome_of(script, workshop, tmp_path, monkeypatch):
    """`outcome_of(case)` is how the case ends, in a folder of its own; fails unless it is well."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def run(case: bad.Case) -> bad.Outcome:
        shutil.rmtree(tmp_path)
        shutil.copytree(workshop, tmp_path)
        case.damage(tmp_path)
        before = {file.name for file in tmp_path.iterdir()}
        try:
            left = script(case.script, *case.arguments)
        except Exception as error:
            pytest.fail(f"{case.script} {' '.join(case.arguments)}: {error!r}")
        outcome = bad.Outcome(left.code or 0, left.out, left.err)
        assert outcome.fault() is None, (case.arguments, outcome.fault())
        odd = {file.name for file in tmp_path.iterdir()} - before - case.made
        assert outcome.code == 0 or not odd, (case.arguments, odd)
        return outcome

    return run


@pytest.mark.parametrize("name", bad.COMMANDS)
def test_a_bad_value_of_any_key(outcome_of, name):
    cases = list(bad.lines(name))
    refused = set()

    @settings(max_examples=9, **FUZZ)
    @given(case=st.sampled_from(cases))
    def of_a_word(case):
        refused.add(outcome_of(case).code)

    @settings(max_examples=2, **FUZZ)
    @given(case=st.sampled_from(cases), text=st.text(max_size=20))
    def of_text(case, text):
        key = case.name.partition(":")[0]
        arguments = [*case.arguments[:-1], f"{key}={hydra_quoted(text)}"]
        outcome_of(bad.Case(case.group, case.script, arguments, key))

    of_a_word()
    of_text()
    assert 2 in refused  # else nothing bad was tried


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, arguments) for name, lines in bad.LINES.items() for arguments in lines],
    ids=lambda value: value if isinstance(value, str) else value[-1][:30].replace("/", "_"),
)
def test_a_bad_line(outcome_of, name, arguments):
    outcome_of(bad.Case(name, name, arguments, ""))


@pytest.mark.parametrize("kind", ["models", "runs", "calibrations"])
def test_a_damaged_file(outcome_of, workshop, kind):
    cases = list(getattr(bad, kind)(workshop))

    @settings(max_examples=7, **FUZZ)
    @given(case=st.sampled_from(cases))
    def damaged(case):
        outcome_of(case)

    damaged()
