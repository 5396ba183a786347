# `make demo` and `make test` need Python 3.11+ and nothing else.
PYTHON ?= python3
BIN := .venv/bin

REAL = --recipe smollm2-segment --model runs/real/model --out runs/real \
	--data $(PREFERENCES) --set data.prompts=$(PREFERENCES)

.PHONY: demo real pairs-given test check docs study-quick study clean

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

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
