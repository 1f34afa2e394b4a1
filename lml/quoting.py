"""How to type text in a shell so that Hydra takes it literally."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z./][\w./-]*", re.IGNORECASE)


def hydra_quoted(text: str) -> str:
    """`text` as a value that Hydra takes literally."""
    return QuotedString(text, Quote.double).with_quotes()


def hydra_value(value: str | int | float | bool | list | None) -> str:
    """A value of a config as Hydra reads it; text is quoted where it could be read otherwise."""
    if isinstance(value, list):
        return f"[{','.join(map(hydra_value, value))}]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else hydra_quoted(value)
    return "null" if value is None else str(value).lower()


def shell_quoted(word: str) -> str:
    """`word` as one types it in a shell, on one line."""
    if not CONTROL.search(word):
        return shlex.quote(word)
    word = re.sub(r"[\\']", r"\\\g<0>", word)
    word = CONTROL.sub(lambda match: rf"\x{ord(match[0]):02x}", word)
    return f"$'{word}'"


def suggest(override: str) -> str | None:
    """How to type `override` so that Hydra takes its value literally; None if there is no way."""
    key, equal, value = override.partition("=")
    quoted = f"{key}={hydra_quoted(value)}"
    try:
        text = OverridesParser.create().parse_override(quoted).value()
        OmegaConf.create({"value": text})  # raises for an incomplete interpolation
    except (HydraException, OmegaConfBaseException):
        return None
    return shell_quoted(quoted) if key and equal else None


def gathered(arguments: Sequence[str], key: str) -> list[str]:
    """`arguments` with those that have no `=` as one override: A B is key=["A","B"]."""
    words = [argument for argument in arguments if "=" not in argument]
    others = [argument for argument in arguments if "=" in argument]
    return [f"{key}=[{','.join(map(hydra_quoted, words))}]", *others] if words else others
