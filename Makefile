# make demo   boot Linux and run a command in it      make test   lint and all tests
# Each sets up what is missing. Interrupted, a step leaves no stamp and is done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CARGO := cargo
MANIFEST := --manifest-path engine/Cargo.toml
RUST := engine/Cargo.toml engine/Cargo.lock $(shell find engine/src -name '*.rs')
WRITTEN := src tests $(wildcard bench)

.DELETE_ON_ERROR:
.PHONY: build demo test lint bench wheel clean

build: $(VENV)/.built

$(VENV)/.created:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kvmkit needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV) || { echo 'make: no venv module: apt-get install python3-venv' >&2; exit 1; }
	$(BIN)/pip install --quiet 'maturin>=1.7,<2'
	touch $@

# The engine and the tools, in place: changes of Python files need no new build.
$(VENV)/.built: $(VENV)/.created pyproject.toml $(RUST)
	@command -v $(CARGO) >/dev/null || { echo 'make: no cargo: install Rust 1.85 or newer (https://rustup.rs)' >&2; exit 1; }
	$(BIN)/maturin develop --release --extras dev
	touch $@

demo: build
	$(BIN)/kvmkit run --verbose -- sh -c 'uname -a; head -n 9 /proc/cpuinfo'

test: lint
	$(CARGO) test --release $(MANIFEST) --no-default-features
	$(BIN)/pytest -q

lint: build
	$(BIN)/ruff check $(WRITTEN)
	$(BIN)/ruff format --check $(WRITTEN)
	$(BIN)/mypy
	$(CARGO) fmt $(MANIFEST) --check
	$(CARGO) clippy --release $(MANIFEST) --no-default-features --all-targets -- -D warnings

bench: build
	@for program in $(wildcard bench/[a-z]*.py); do echo "== $$program"; $(BIN)/python $$program || exit 1; done

wheel: $(VENV)/.created
	$(BIN)/maturin build --release --out dist

clean:
	rm -rf $(VENV) engine/target dist src/kvmkit/*.so
