# `make demo` and `make test` set up everything they need in .venv, on any machine with python3.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
TORCHVISION := 0.28.0
TORCHAO := torchao==0.18.0

.PHONY: demo test test-oldest lint docs zoo figures clean

demo: $(VENV)/installed
	$(BIN)/normswap convert demo:digits --to group_norm --data demo:digits --recover 200 --onnx

# A process for each core, each of one thread.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The oldest versions that pyproject.toml allows, in an environment of their own; Python 3.10 or 3.11.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt TORCHVISION=0.24.0 TORCHAO=

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 normswap tools examples  # text has an encoding
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/; it opens from the file system. Warnings are errors.
docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

# torch is named first and pinned, so that pip takes the tested build and not the newest one.
# pip would compile the 16,000 files of the environment on one core, which takes a minute. A few
# are not of this version of Python, and stay as they are.
INSTALL := $(BIN)/pip install --quiet --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c $(CONSTRAINTS) torch==$$(sed -n 's/^torch==//p' $(CONSTRAINTS))
	$(INSTALL) -c $(CONSTRAINTS) -e '.[demo]'
	$(COMPILE)
	touch $@

# torchvision and timm only build architectures for the tests; their own requirements are left out.
$(VENV)/installed-test: $(VENV)/installed
	$(INSTALL) -c $(CONSTRAINTS) -e '.[demo,zoo,train,test,docs]'
	$(INSTALL) --no-deps torchvision==$(TORCHVISION) timm==1.0.31 $(TORCHAO)
	$(COMPILE)
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# The sweep over every torchvision and timm model behind docs/zoo.md, about 40 minutes on two cores; resumable.
zoo: $(VENV)/installed-test
	$(BIN)/python tools/zoo_sweep.py --jobs 2

# Every figure of the README and the docs, measured again into normswap-out/figures, a file for each
# tool; hours. What is there is not done again. DATA is a folder as tools/real_networks.py says;
# without it the figures of pretrained networks are left out.
MEASURED := center exact fold norms onnx onnx_block peers recurrent rotate sites size transformers tune
MEASURED += $(if $(DATA),calibrate methods private real recover shift)
FIGURES := normswap-out/figures

figures: $(MEASURED:%=$(FIGURES)/%.txt) zoo
	$(BIN)/python tools/charts.py

$(FIGURES)/%.txt: | $(VENV)/installed-test
	mkdir -p $(@D)
	$(BIN)/python tools/bench_$*.py $(if $(filter $*,calibrate methods private real recover shift),$(DATA)) > $@.part
	mv $@.part $@

clean:
	rm -rf $(VENV) .venv-oldest out site normswap-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
