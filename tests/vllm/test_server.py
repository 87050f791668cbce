"""vLLM's server, as ``make serve`` starts it, with an OpenAI client."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
from openai import OpenAI

from tests.servers import wait_for
from tests.unit.exported_models import greedy, prompts_of
from tests.vllm.conftest import BLOCK_SIZE
from ultramem_ds.utils.ports import free_port

START_S = 500.0  # imports take most of it, on a busy machine many times over


@pytest.fixture(scope="module")
def server(export, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server of the UltraMem export."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(export("ultramem").directory), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--served-model-name", "ultramem",
        "--block-size", str(BLOCK_SIZE), "--kv-cache-memory-bytes", str(64 << 20),
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log, START_S)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):  # a server stopped while it starts lingers
            os.killpg(process.pid, signal.SIGKILL)


def test_completions(server: str, export):
    model = export("ultramem").model
    prompt = prompts_of(20)[0]
    expected = greedy(model, [prompt], 32)[0]
    client = OpenAI(base_url=server, api_key="none")
    request = {
        "model": "ultramem",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": len(expected),
        "extra_body": {"return_token_ids": True},
    }
    whole = client.completions.create(**request).choices[0]
    assert list(whole.token_ids) == expected
    chunks = list(client.completions.create(**request, stream=True))
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
