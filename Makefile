# Needs Python 3.11+ with venv, g++ and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP_BUILD := build/cpp
FUZZ_BUILD := build/fuzz
FUZZ_SECONDS ?= 60
# Passed on: make demo ARGS="--help", make test ARGS="-k pack_weights"
ARGS ?=

NATIVE := setup.py setup.cfg $(shell find csrc kernels -type f -name '*.*')
FORMATTED := $(shell find csrc kernels tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# One ninja for every build: another version would start over.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: build demo lint test test-all pytest cpp fuzz docs zoo clean

build: $(VENV)/.native

# torch comes before the package, because the package builds against the installed torch (pyproject.toml).
$(VENV)/.tools:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip 'setuptools>=77' wheel
	$(BIN)/python -m pip install torch torchvision numpy ninja cmake 'pybind11>=2.13'
	touch $@

$(VENV)/.package: $(VENV)/.tools pyproject.toml
	$(BIN)/python -m pip install --no-build-isolation -e '.[all]'
	touch $@

$(VENV)/.native: $(VENV)/.package $(NATIVE)
	$(BIN)/python setup.py build_ext
	touch $@

demo: build
	$(BIN)/python -m stamp_fast demo $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

test: lint pytest cpp

# With the tests marked slow.
test-all: ARGS += -m ''
test-all: test

pytest: build
	$(BIN)/python -m pytest $(ARGS)

cpp: build
	$(BIN)/cmake -S . -B $(CPP_BUILD) -G Ninja -DSF_SANITIZE=ON
	$(BIN)/cmake --build $(CPP_BUILD)
	$(BIN)/ctest --test-dir $(CPP_BUILD) --output-on-failure

# Random networks, compacted against masked; then their operator records through the C++ core under ASan and UBSan, as
# they are and mutated (by libFuzzer too, where there is clang). ARGS="--networks 10000 --seed 1", FUZZ_SECONDS=600
fuzz: build
	rm -rf $(FUZZ_BUILD)/records
	mkdir -p $(FUZZ_BUILD)/corpus
	$(BIN)/python -m tests.fuzz --records $(FUZZ_BUILD)/records --failures $(FUZZ_BUILD)/failures.txt $(ARGS)
	$(BIN)/cmake -S . -B $(FUZZ_BUILD) -G Ninja -DSF_SANITIZE=ON -DSF_FUZZ=ON \
		$(addprefix -DCMAKE_CXX_COMPILER=,$(shell command -v clang++))
	$(BIN)/cmake --build $(FUZZ_BUILD)
	$(FUZZ_BUILD)/fuzz_record $(FUZZ_SECONDS) $(FUZZ_BUILD)/records
	test ! -x $(FUZZ_BUILD)/fuzz_libfuzzer || $(FUZZ_BUILD)/fuzz_libfuzzer $(FUZZ_BUILD)/corpus $(FUZZ_BUILD)/records \
		-max_len=8000 -timeout=10 -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=$(FUZZ_BUILD)/ \
		-verbosity=0 -print_final_stats=1

# Timed suites: a process and a result file each, then all tables and docs/benchmarks.md. One alone:
# make bench-train_step. For a quick look ARGS="--rounds 2"
SUITES := structural train_step baselines kernels phases
bench: CHOSEN := $(SUITES)
$(SUITES:%=bench-%): CHOSEN = $(@:bench-%=%)

bench $(SUITES:%=bench-%): build
	for suite in $(CHOSEN); do \
		$(BIN)/python -m pytest benchmarks/test_$$suite.py --keep $$suite $(ARGS) || exit 1; \
	done
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.table --write docs/benchmarks.md

# Experiments: hours each. Rows that the result files hold are not run again, so that each goes on where it was
# interrupted. ARGS="--seeds 1" for less; the page is of all rows that there are.
bench-time_to_accuracy: build
	$(BIN)/python -m benchmarks.time_to_accuracy $(ARGS)
	$(BIN)/python -m benchmarks.accuracy_table

bench-ablation: build
	$(BIN)/python -m benchmarks.ablation $(ARGS)

bench-early: build
	$(BIN)/python -m benchmarks.early $(ARGS)
	$(BIN)/python -m benchmarks.early --scan --network resnet18 --seeds 1
	$(BIN)/python -m benchmarks.early --table

bench-metapruning: build
	$(BIN)/python -m benchmarks.metapruning $(ARGS)
	$(BIN)/python -m benchmarks.metapruning --latencies
	$(BIN)/python -m benchmarks.metapruning --table

bench-budgets: build
	$(BIN)/python -m benchmarks.budgets $(ARGS)
	$(BIN)/python -m benchmarks.budgets --table

bench-all: bench bench-budgets bench-time_to_accuracy bench-ablation bench-early bench-metapruning zoo

# An hour or more; goes on where it was interrupted with ARGS="--resume".
zoo: build
	$(BIN)/python -m benchmarks.zoo --table docs/zoo.md $(ARGS)

# The documentation as a site in build/site; reads the sources without importing them, so that it needs no torch.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

DOCS_EXTRA := ["project"]["optional-dependencies"]["docs"]
DOCS_PACKAGES := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))$(DOCS_EXTRA))

$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $$($(BIN)/python -c '$(DOCS_PACKAGES)')
	touch $@

# Keeps .venv: it takes gigabytes to fetch.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV)/.native
	find csrc kernels stamp_fast tests -name '__pycache__' -prune -exec rm -rf {} +
	rm -f stamp_fast/*.so
