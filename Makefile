# Two commands matter: `make demo` (first results in minutes) and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
SOURCES := disttrain tests examples docs benchmarks
# A file's tests stay in one process, because they share what they made.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: install demo test test-all tiny-base tiny-base-check benchmark-learning benchmark-data benchmark-pack benchmark-placement drill-fleet cluster-test check format clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; make PYTHON=python3.12 install"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# A step of the embedded base is too small to be shared: with one thread it takes half the time.
demo: export OMP_NUM_THREADS = 1
demo: install
	rm -rf build/demo
	$(BIN)/disttrain train configs/lora.yaml output_dir=build/demo
	$(BIN)/disttrain train configs/textual_inversion.yaml output_dir=build/demo
	$(BIN)/disttrain score build/demo/fox-lora --held-out examples/held_out/fox
	$(BIN)/disttrain score build/demo/penguin-ti --held-out examples/held_out/penguin

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

# The embedded base model from nothing: hours on a processor, minutes on a GPU; may be stopped.
tiny-base: install
	examples/tiny_base/make.sh

tiny-base-check: install
	examples/tiny_base/make.sh check

# Whether subjects are learned, by every method, seed and number of processes: about an hour.
benchmark-learning: install
	$(BIN)/python benchmarks/fidelity.py --output benchmarks/results/fidelity.json
	$(BIN)/python benchmarks/same_result.py --output benchmarks/results/same_result.json
	$(BIN)/python benchmarks/far_past.py --output benchmarks/results/far_past.json

# About five minutes on a machine with nothing else to do.
benchmark-data: install
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/data.py --output benchmarks/results/data.json

# About five minutes.
benchmark-pack: install
	$(BIN)/python benchmarks/pack.py --ranks --output benchmarks/results/pack.json

# About five minutes.
benchmark-placement: install
	$(BIN)/python benchmarks/placement.py --output benchmarks/results/placement.json

# 200 subjects, 4 workers, 20 of them killed: about five minutes on 2 cores.
drill-fleet: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fleet_drill.py

# A SLURM cluster of three hosts on this machine, as root: about a quarter of an hour.
cluster-test: install
	$(BIN)/python tests/cluster/run_checks.py

check: install
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright

format: install
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
