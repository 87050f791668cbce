"""Every message that advises something is followed in a test, or stands below with the reason.

The package's source is walked for advising words (:mod:`tests.unit.messages`); each must lie in
words that a case of a ``test_advice_*.py`` claims. A message whose words change loses its case.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.unit.advice import CLAIMS, Claim
from tests.unit.messages import Message, all_messages, messages

# Elsewhere because of what they need: several processes that are killed.
CASES_ELSEWHERE = ("tests.smoke.test_data_kill",)

for _file in sorted(Path(__file__).parent.glob("test_advice_*.py")):
    if _file.stem != Path(__file__).stem:
        importlib.import_module(f"tests.unit.{_file.stem}")
for _module in CASES_ELSEWHERE:
    importlib.import_module(_module)

EXCEPTIONS: dict[str, tuple[Claim, ...]] = {
    "says what is, not what to do": (
        Claim("with --tasks"),  # shown by --help
        Claim("--batch-size must be positive and --max-sequences not negative"),
        Claim("the Python standard library's sources and documentation, takes their place"),
        Claim("no document with text in what --add-validation names"),
        Claim("{}.bin is not what `prepare` wrote"),
        Claim("{} is not a manifest of `prepare`: {}"),
        Claim("run through"),
        Claim("longer than --max-line-mib"),
        Claim("one device: NCCL wants a GPU per rank"),
        Claim("run dir", whole=True),
        Claim("set on a table: its whole shape"),  # notes on DeepSpeed's insides
        Claim("set on a table: its whole size"),
        Claim("set on a table before it is partitioned: its own group"),
        Claim("loaders and many ranks need {}"),
        Claim("{} has {} GB free, checkpoints need {} GB", whole=True),
        Claim("{} GB free on {}, checkpoints need {} GB"),
        Claim("saving will take long"),
        Claim("write, fsync and rename work, {} MB/s"),
        Claim("`{}`", "kernels/build.py"),
        Claim("`{}`", "kernels/gpu_code.py"),
        Claim("torch's embedding_bag, for want of native code: {}"),
        Claim("lower right"),
        Claim("start's backward runs after wait's"),
        Claim("a confidence band needs at least three points"),
        Claim("train.tasks needs make_judge, as the train verb gives it"),
        Claim("intermediate_size={} cannot be split over --tensor-parallel-size {}"),
    ),
    "names a file to read": (
        Claim("see its copyright file"),
        Claim("see its LICENSE file"),
        Claim("{}: exit code {}, see {}"),
        Claim("libraries: see {}"),
    ),
    "text of a file that is written; what it shows is run by tests/unit/test_hf_uses.py": (
        Claim("# Written by `ultramem-ds export` from the sources of ultramem_ds"),
        Claim("```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
              "model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)\n"
              "tokenizer = AutoTokenizer.from_pretrained(DIR)\n```\n\n"
              "Without `trust_remote_code`: `import ultramem_ds.hf` first. `memory_device=\"cpu\"` "
              "keeps value tables\nin main memory. `ultramem_run.json` holds"),
    ),
    "needs a program that the tests do not have": (
        Claim("a 7z archive; unpack it"),
        Claim("a rar archive; unpack it"),
        Claim("compressed by snappy; decompress it"),
        Claim("compressed by compress (.Z); decompress it"),
        Claim("an Avro file; write it as Parquet"),
        Claim("a Git LFS pointer, not the data; `git lfs pull` fetches it"),
        Claim("a Git LFS pointer, not the tokenizer; `git lfs pull` fetches it"),
    ),
    "needs another version of this program": (
        Claim("{} {}: {}; use the version that trained it"),
    ),
    "installs software or changes the machine": (
        Claim("echo madvise | sudo tee {}"),
        Claim("remove leftovers, or start the container with --shm-size=8g (or --ipc=host)"),
        Claim("use a local disk or a parallel file system, or a larger train.save_every"),
        Claim("install a torch built with NCCL"),
        Claim("pip install triton"),
        Claim("install an official build of torch"),
        Claim("install torch for your CUDA (README, CUDA); look at CUDA_VISIBLE_DEVICES and the "
              "driver's version; set CUDA_VISIBLE_DEVICES= to train on the CPU"),
    ),
    "is about other machines and the network between them": (
        Claim("add {} to /etc/hosts or DNS, or set GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME"),
        Claim("look at MASTER_ADDR, MASTER_PORT and the network interfaces of all machines"),
        Claim("set GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME to the fast interface"),
    ),
    "vLLM has an environment of its own, where tests/vllm serves with and without these": (
        Claim("which may lie in another stage; use --tensor-parallel-size, which shards tables by "
              "rows"),
        Claim("leave out --enable-expert-parallel"),
        Claim("leave out --enable-dbo"),
        Claim("leave out --quantization"),
        Claim("--dtype float32 serves them as they are"),
    ),
}  # fmt: skip
EXCEPTED = [claim for claims in EXCEPTIONS.values() for claim in claims]


def unclaimed(found: Iterable[Message], claims: Iterable[Claim]) -> list[str]:
    """Advice that lies in no claim, a line each."""
    claims = list(claims)
    missing = []
    for message in found:
        spans = [s for claim in claims if (s := claim.span(message.text, message.module))]
        for begin, end in message.advice:
            if not any(a <= begin and end <= b for a, b in spans):
                words = message.text[begin:end]
                missing.append(f"{message.module}:{message.line} {words!r} in {message.text!r}")
                break
    return missing


FOUND = all_messages()


def test_every_advice_is_followed() -> None:
    missing = unclaimed(FOUND, [*CLAIMS, *EXCEPTED])
    assert not missing, "follow these in a test_advice_*.py:\n" + "\n".join(missing)


@pytest.mark.parametrize("claim", [*CLAIMS, *EXCEPTED], ids=lambda claim: claim.words[:60])
def test_claims_are_of_one_message(claim: Claim) -> None:
    """Words that no message has any more, or that several have, claim nothing."""
    texts = {m.text for m in FOUND if claim.span(m.text, m.module)}
    assert len(texts) == 1, sorted(texts)


def test_what_is_excepted_is_not_followed_too() -> None:
    followed = {claim.words for claim in CLAIMS}
    assert followed.isdisjoint(claim.words for claim in EXCEPTED)


@pytest.mark.parametrize(
    "statement",
    [
        'raise ValueError(f"{key} is too large; use a smaller one")',
        'require(x > 0, "no rank can do this: start with --fewer-ranks")',
        'logger.warning("%s is slow, or set KEY=%s", name, value)',
        'print("run `ultramem-ds fix` on it", file=sys.stderr)',
        'raise ValueError("the run "\n f"{x}; lower train.keep_last")',
        'said = f"unknown {x}: did you mean {near}?"',
        'yield Finding("disk", "fail", what, "free some")',
        'raise ValueError(f"{x} needs memory.expansion=1")',
    ],
)
def test_a_new_message_is_noticed(statement: str) -> None:
    """Advice that somebody adds anywhere has no case yet."""
    source = f'"""Use this module."""\ndef f(x):\n    """Set x."""\n    {statement}\n'
    new = list(messages(source, "new.py"))
    (missing,) = unclaimed(new, [*CLAIMS, *EXCEPTED])
    assert missing.startswith("new.py:4 ")


def test_other_strings_are_left_alone() -> None:
    source = (
        'parser.add_argument("--x", help="use this one")\n'
        'ROWS = "number of rows"\nraise ValueError("x=1 must be at least 2")\n'
    )
    assert unclaimed(messages(source, "new.py"), []) == []


def test_there_are_many() -> None:
    """The walk finds what it is for."""
    advising = [message for message in FOUND if message.advice]
    assert len(advising) > 200 and len(CLAIMS) > 150
