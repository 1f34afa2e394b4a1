"""One-line messages for the errors of Hydra and OmegaConf."""

from __future__ import annotations

import re
import sys

from hydra.errors import OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lml.configs import CONFIGS
from lml.errors import UserError, first_line, nearest
from lml.quoting import CONTROL, shell_quoted, suggest

# The extras of setup.cfg that bring Hydra's launchers and sweepers.
EXTRAS = {"ray": "ray", "submitit_local": "slurm", "submitit_slurm": "slurm", "optuna": "optuna"}


def explain(error: Exception) -> str:
    """An error of Hydra or OmegaConf in one line: the key, the value and what is allowed."""
    text, cause = str(error), error.__cause__
    if isinstance(error, UserError):  # its paths may contain line breaks
        return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
    if match := re.search(r"Could not (?:find|load) '(.+)/(.+)'", text):
        group, option = match.groups()
        if group in ("hydra/launcher", "hydra/sweeper") and option in EXTRAS:
            return f"{group}={option}: needs `pip install -e '.[{EXTRAS[option]}]'`"
        files = (CONFIGS / group).glob("*.yaml")
        known = getattr(error, "options", None) or [file.stem for file in files]
        return f"{group}={option}: unknown; nearest: {nearest(option, known)}"
    if match := re.search(r"Could not override '(.+)'.*\n.* use \+(.+)", text):
        key, override = match.groups()
        level = getattr(cause, "parent_node", None)
        choices = set(level) - {"hydra"} if isinstance(level, DictConfig) else set()
        if "." not in key:
            choices |= {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {key}
        if not choices:
            return f"{override}: {key.rpartition('.')[0]} has no keys"
        return f"{override}: unknown key; nearest: {nearest(key.split('.')[-1], choices)}"
    if isinstance(error, OverrideParseException):
        return _explain_override(error.override, text)
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'", text):
        asked = "expected one value, a list in [], or a sweep with --multirun"
        return f"{match[1]}: {asked}; quote text with a comma: {suggest(match[1])}"
    if text.startswith("Config group override must be"):
        overrides = [a for a in sys.argv[1:] if (CONFIGS / a.split("=")[0]).is_dir()]
        return f"{' '.join(overrides)}: {text}"
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {first_line(error)}"
    return first_line(error) or first_line(cause)


def _explain_override(override: str, text: str) -> str:
    shown = shell_quoted(override) if CONTROL.search(override) else override
    typed = suggest(override)
    quoted = f"; quote text with such characters: {typed}" if typed else ""
    reason = ""
    # Hydra itself explains brackets that do not close, and unknown functions
    if not typed or re.search(r"[\[{(]", override):
        lines = [line.strip(" ^") for line in text.splitlines() if override not in line]
        lines = [line for line in lines if line and not line.startswith(("Lexer", "See "))]
        reason = f" ({lines[0]})" if lines else ""
    return f"{shown}: expected KEY=VALUE{reason}{quoted}"
