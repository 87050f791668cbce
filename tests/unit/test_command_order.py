"""Options and overrides in any order, and inputs that are given twice."""

from itertools import permutations
from pathlib import Path

import pytest

from ultramem_ds.cli.main import VERBS, build_parser

TRAIN = (
    ("--preset", "dense-debug"),
    ("train.max_steps=2",),
    ("--data", "DATA"),
    ("train.save_every=0", "optim.lr=-1"),
    ("--run-dir=r",),
)


@pytest.mark.parametrize("order", list(permutations(TRAIN))[::7])
def test_overrides_on_any_side_of_options(order):
    words = [word for part in order for word in part]
    found = build_parser(["train"]).parse_args(["train", *words])
    overrides = [word for word in words if "=" in word and not word.startswith("--")]
    assert found.overrides == overrides, "in the order given: the last one wins"
    assert (found.preset, str(found.data), str(found.run_dir)) == ("dense-debug", "DATA", "r")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("doctor a.b=1 --preset dense-debug c.d=2", {"overrides": ["a.b=1", "c.d=2"]}),
        ("plan --world-size 2 a.b=1 --preset p c.d=2", {"overrides": ["a.b=1", "c.d=2"]}),
        ("inspect-data --samples 2 DIR --verify", {"data": "DIR", "verify": True}),
        ("report A --output O B", {"run_dirs": [Path("A"), Path("B")]}),
        ("prepare --input a --output o --tokenizer t --input b c", {"input": ["a", "b", "c"]}),
        ("train-tokenizer --input a --output o --text-key k --input b", {"input": ["a", "b"]}),
    ],
)
def test_every_verb_takes_any_order(words, expected):
    found = vars(build_parser([words.split()[0]]).parse_args(words.split()))
    missing = {key: value for key, value in expected.items() if found.get(key) != value}
    assert not missing, {key: found.get(key) for key in missing}


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_unknown_stays_an_error(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser([verb]).parse_args([verb, "--no-such-option"])
    assert stop.value.code == 2
    capsys.readouterr()
