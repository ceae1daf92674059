# Two commands: `make study` runs the main job and says where its report is; `make test` runs the tests.
# DATA=digits|fashion-mnist|PATH, ARMS=bn,none,…, SEEDS=…, EPOCHS=…, OUT=… and ARGS="--lr 0.5" pass through to the study.

PYTHON ?= python3
BIN := .venv/bin
DATA ?= digits
ARMS ?= bn,none
WORKERS ?= 2

.PHONY: study test lint docs clean

study: .venv/lab
	$(BIN)/normwright study lenet arm=$(ARMS) --data "$(DATA)" $(if $(SEEDS),--seeds $(SEEDS)) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(OUT),--out "$(OUT)") $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "The pages are in site/index.html."

# one stamp a set of extras; pip is quick when nothing changed
.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf .venv build site *.egg-info src/*.egg-info
