# Everything a developer or a new user runs. Needs python3 (3.11 to 3.13) and make; the rest is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ATLAS := lapwing-atlas
SOAKED = $(shell grep -rl LAPWING_SOAK tests --include='test_*.py' | sort)
SHIPPED := detector/lapwing_detector/atlas

# What the client needs, at both ends of what pyproject.toml admits.
OLDEST := 'grpcio==1.76.*' protobuf==6.31.1 googleapis-common-protos==1.70.0 typer==0.16.0 rich==13.8.0
NEWEST := 'grpcio<2' 'protobuf<8' 'googleapis-common-protos<2' 'typer<1' 'rich<16'

# --no-compile: most of what torch brings is never imported; Python compiles the rest when it is, and must keep that.
INSTALL := -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

# Nothing here asks the network for models or data.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test soak compat check format proto bench atlas clean help

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(INSTALLED)  ## the main job: a model answers, every token is scored, heatmaps are drawn
	$(BIN)/lapwing demo

test: $(INSTALLED)  ## all tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(INSTALLED)  ## the tests that go on for long: kills, swaps, restarts, and a quarter of an hour of mixed load
	LAPWING_SOAK=1 $(BIN)/python -m pytest --timeout 3600 $(SOAKED)

compat: $(INSTALLED)  ## the client with the oldest and the newest libraries that pyproject.toml admits
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python $(INSTALL) $(OLDEST)
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python $(INSTALL) --upgrade $(NEWEST)
	LAPWING_PYTHONS=$(VENV)-oldest/bin/python:$(VENV)-newest/bin/python $(BIN)/python -m pytest tests/client/test_compatibility.py

check: $(INSTALLED)  ## style, types, and whether the generated stubs are those of the .proto files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python proto/generate.py --check

format: $(INSTALLED)  ## put the code into the form that check asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(INSTALLED)  ## generate the stubs from the .proto files
	$(BIN)/python proto/generate.py

bench: $(INSTALLED)  ## measure what the README claims (about an hour; QUICK=1 for a look)
	$(BIN)/python benchmarks/capture.py $(if $(QUICK),--quick)
	$(BIN)/python benchmarks/running.py $(if $(QUICK),--quick)
	$(BIN)/python benchmarks/training.py $(if $(QUICK),--quick)
	$(BIN)/python benchmarks/serving.py $(if $(QUICK),--quick)
	$(BIN)/python benchmarks/gpu.py $(if $(QUICK),--quick)

atlas: $(INSTALLED)  ## make the embedded model again from nothing and put it into the package
	$(BIN)/lapwing demo --rebuild --into $(ATLAS)
	rm -rf $(SHIPPED)
	mkdir -p $(SHIPPED)
	cp -r $(ATLAS)/model $(ATLAS)/probe $(ATLAS)/generations.jsonl.gz $(ATLAS)/sampled.jsonl.gz $(ATLAS)/rates.json $(ATLAS)/README.md $(SHIPPED)
	chmod -R a+rX,u+w $(SHIPPED)
	cp $(ATLAS)/demo_questions.json client/lapwing_client/

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest lapwing-demo

BUILT := $(addprefix detector/,build_native.py lapwing_detector/native/attention.c lapwing_detector/native/build.py)

$(INSTALLED): pyproject.toml constraints.txt $(BUILT)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "lapwing needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@
