# `make demo` and `make test` need Python 3.11+ and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs study-quick study clean

demo: .venv/installed  ## the whole pipeline on the embedded task
	$(BIN)/denserl demo --out runs/demo --resume

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
