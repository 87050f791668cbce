"""Scripts depend on verbs, options and their defaults: they change on purpose or not at all.

``make golden`` records ``tests/golden/command_line.json`` anew.
"""

import argparse
import json
import os
from pathlib import Path

from ultramem_ds.cli.main import VERBS, build_parser

GOLDEN = Path(__file__).parents[1] / "golden" / "command_line.json"


def options_of(parser: argparse.ArgumentParser, name: str) -> dict[str, list[str]]:
    """Options by verb, sub-verbs apart: ``--micro-batch=1`` is an option with its default."""
    found: dict[str, list[str]] = {}
    mine = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, child in action.choices.items():
                found |= options_of(child, f"{name} {verb}".strip())
        elif "--help" not in action.option_strings:
            spelled = "/".join(action.option_strings) or action.dest
            hidden = action.default is argparse.SUPPRESS
            mine.append(spelled if hidden else f"{spelled}={action.default}")
    found[name] = sorted(mine)
    return found


def test_verbs_options_and_defaults_are_the_recorded_ones() -> None:
    found = options_of(build_parser(tuple(VERBS)), "")
    if os.environ.get("RECORD_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(GOLDEN.read_text())
