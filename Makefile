# `make demo` and `make test` set up everything they need in .venv, on any machine with python3.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint zoo clean

demo: $(VENV)/installed
	$(BIN)/normswap convert demo:digits --to group_norm --data demo:digits --recover 200 --onnx

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch is named first and pinned, so that pip takes the tested build and not the newest one.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

# torchvision and timm only build architectures for the tests; their own requirements are left out.
$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,zoo,train,test]'
	$(BIN)/pip install --quiet --no-deps torchvision==0.28.0 timm==1.0.31
	touch $@

# The sweep over every torchvision and timm model behind docs/zoo.md, about 40 minutes on two cores; resumable.
zoo: $(VENV)/installed-test
	$(BIN)/python tools/zoo_sweep.py --jobs 2

clean:
	rm -rf $(VENV) out normswap-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
