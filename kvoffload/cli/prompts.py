"""Where the prompts of a run come from: the command line, a file of text, a file of many, standard input.

Owns that there is one source, and what is wrong with it, in one line that names the file and the line. Torch-free.

    PROMPT, --prompt     one prompt
    --prompt-file FILE   one, the whole text of the file
    --prompts FILE       many, one a line, or JSON lines: {"prompt": "...", whatever else goes to the output as it is}
    -, or piped          one, all of standard input; with --prompts -: many
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvoffload.errors import ConfigError

Record = dict[str, Any]  # "prompt", and what else a line of JSON holds


def read_prompts(argument: str | None, option: str | None, file: Path | None, many: Path | None) -> list[Record]:
    """The prompts, at least one, none of them empty.

    Args:
        argument: PROMPT; "-" is standard input, as is nothing at all where that is no terminal.
        option: `--prompt`.
        file: `--prompt-file`.
        many: `--prompts`.

    Raises:
        ConfigError: no source or several, one that cannot be read, an empty prompt, a line that is no JSON.
    """
    sources = {"PROMPT": argument, "--prompt": option, "--prompt-file": file, "--prompts": many}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both give prompts: leave out all but one")
    if many is not None:
        return _records(_read(many, "--prompts"), str(many))
    if file is not None:
        return [_one(_read(file, "--prompt-file"), f"--prompt-file: {file}")]
    if option is not None:
        return [_one(option, "--prompt")]
    if argument is not None and argument != "-":
        return [_one(argument, "PROMPT")]
    if argument is None and sys.stdin.isatty():
        raise ConfigError('no prompt: give one, "...", or --prompt-file FILE, --prompts FILE, or pipe it in')
    return [_one(_read(Path("-"), "PROMPT"), "standard input")]


def _read(path: Path, option: str) -> str:
    """A text in UTF-8, without the mark that some editors put before it."""
    try:
        if str(path) == "-":
            return sys.stdin.read()
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: {path} is no text in UTF-8 (byte {error.start}): convert it") from error
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path}: {error.strerror}") from error


def _one(text: str, source: str) -> Record:
    prompt = text.removesuffix("\n").removesuffix("\r")
    if not prompt.strip():
        raise ConfigError(f"{source} is empty: give it some text to answer")
    return {"prompt": prompt}


def _records(text: str, source: str) -> list[Record]:
    """One a line; JSON where the first line that is not empty looks like an object."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f'--prompts: {source} is empty: write one prompt a line, or JSON lines with a "prompt"')
    if not lines[0][1].lstrip().startswith("{"):
        return [{"prompt": line.strip()} for _, line in lines]
    return [_record(line, f"--prompts: line {number} of {source}") for number, line in lines]


def _record(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"{error.msg}, column {error.colno}"
        raise ConfigError(f"{where} is no JSON ({what}): correct it, or write all lines as plain text") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f'{where} has no text "prompt": write {{"prompt": "..."}}')
    return record  # type: ignore[no-any-return]
