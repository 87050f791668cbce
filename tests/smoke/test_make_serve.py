"""``make serve`` as people type it, then curl from a second terminal and an OpenAI client."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.launching import ROOT
from tests.servers import wait_for
from tests.unit.exported_models import greedy, random_model, small_tokenizer, write_model
from ultramem_ds.utils.ports import free_port

VLLM_VENV = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm"))
START_S = 580.0  # imports take most of it, on a busy machine many times over
PROMPT = "def main("
TOKENS = 16
CLIENT = """
import json, sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="none")
request = dict(model="ultramem", prompt=sys.argv[2], max_tokens=int(sys.argv[3]), temperature=0)
whole = client.completions.create(**request)
parts = client.completions.create(**request, stream=True)
print(json.dumps([
    [model.id for model in client.models.list().data],
    whole.choices[0].text,
    "".join(part.choices[0].text for part in parts),
]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (VLLM_VENV / ".installed").exists(), reason="no .venv-vllm here: make vllm-install"
    ),
]


@pytest.fixture(scope="module")
def model():
    """vLLM's attention on a CPU wants heads of 32."""
    return random_model("ultramem", ("model.hidden_size=64", "model.seq_len=256"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The two environments are taken as they are."""
    root, port = tmp_path_factory.mktemp("serve"), free_port()
    run_dir = write_model(model, root / f"served-{port}")
    kept = [str(ROOT / ".venv" / ".installed"), ".venv/.installed", f"{VLLM_VENV}/.installed"]
    command = ["make", *(word for file in kept for word in ("-o", file)), "serve"]
    command += [f"CHECKPOINT={run_dir}", f"PORT={port}", f"VLLM_VENV={VLLM_VENV}"]
    command += ["KV_CACHE_BYTES=67108864", "ARGS=--block-size 32"]
    log = root / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log, START_S)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        shutil.rmtree(ROOT / "runs" / "serve" / run_dir.name, ignore_errors=True)


@pytest.fixture(scope="module")
def expected(model) -> str:
    """This program's own continuation."""
    tokenizer = small_tokenizer()
    (new,) = greedy(model, [tokenizer.encode(PROMPT)], TOKENS)
    return tokenizer.decode(new)


def test_curl(server: str, expected: str) -> None:
    """The README's second terminal."""
    body = {"model": "ultramem", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    command = ["curl", "--silent", "--fail", f"{server}/completions", "-d", json.dumps(body)]
    command += ["-H", "Content-Type: application/json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(answer.stdout)["choices"][0]["text"] == expected


def test_openai_client(server: str, expected: str) -> None:
    """Whole and streamed."""
    command = [str(VLLM_VENV / "bin" / "python"), "-c", CLIENT, server, PROMPT, str(TOKENS)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(answer.stdout) == [["ultramem"], expected, expected]
