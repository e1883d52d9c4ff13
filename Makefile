# make demo   boot Linux and run a command in it      make test   lint and all tests
# make docs   the documentation, into site/       make sanitize   the engine's tests under AddressSanitizer
# make testbed-amd, make testbed-arm64   the KVM tests on real KVMs, in emulated machines
# Each sets up what is missing. Interrupted, a step leaves no stamp and is done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CARGO := cargo
MANIFEST := --manifest-path engine/Cargo.toml
RUST := engine/Cargo.toml engine/Cargo.lock $(shell find engine/src -name '*.rs')
ARCH := $(shell uname -m)
AGENT := src/kvmkit/guest/agent-$(ARCH)
AGENT_OPTIONS := --release --target $(ARCH)-unknown-linux-gnu
WRITTEN := src tests bench testbed docs tools
HEADERS := '^linux-headers-6\.[^-]*-common$$'  # the kernel's newest, as another witness of its structs

.DELETE_ON_ERROR:
.PHONY: build demo test lint docs bench sanitize testbed-amd testbed-arm64 wheel clean

build: $(VENV)/.built $(AGENT)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("make: kvmkit needs Python 3.11 or newer: make PYTHON=...") if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || tools/need ensurepip=python3-venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'maturin>=1.7,<2'
	touch $@

# The engine and the tools, in place: changes of Python files need no new build.
$(VENV)/.built: $(VENV)/.created pyproject.toml $(RUST)
	@tools/need cc=gcc cargo=cargo-web || { echo 'make: building takes Rust 1.85 or newer (https://rustup.rs); a wheel of kvmkit needs none' >&2; exit 1; }
	$(BIN)/maturin develop --release --extras dev
	$(BIN)/python -m compileall -q src
	touch $@

# The guest's init. Cargo takes agent/.cargo/config.toml, which makes it static, by the directory that it runs in.
$(AGENT): agent/Cargo.toml agent/Cargo.lock agent/.cargo/config.toml $(shell find agent/src -name '*.rs')
	@tools/need cc=gcc cargo=cargo-web
	cd agent && $(CARGO) build $(AGENT_OPTIONS)
	mkdir -p $(@D)
	install agent/target/$(ARCH)-unknown-linux-gnu/release/kvmkit-agent $@

demo: build
	$(BIN)/kvmkit run --verbose -- sh -c 'uname -a; head -n 12 /proc/cpuinfo'

test: lint
	@tools/need cc=gcc as=binutils
	@tools/need --optional cpio=cpio iasl=acpica-tools qemu-system-x86_64=qemu-system-x86 qemu-system-aarch64=qemu-system-arm debugfs=e2fsprogs
	@tools/need --optional mmdebstrap=mmdebstrap fakechroot=fakechroot fakeroot=fakeroot
	@ls -d /usr/src/linux-headers-*-common >/dev/null 2>&1 || tools/need --optional headers=$$(apt-cache search -n $(HEADERS) | cut -d' ' -f1 | sort -V | tail -n 1)
	$(CARGO) test --release $(MANIFEST) --no-default-features
	cd agent && $(CARGO) test $(AGENT_OPTIONS)
	$(BIN)/pytest -q

lint: build docs
	@tools/need cargo-fmt=rustfmt-web cargo-clippy=rust-web-clippy
	$(BIN)/ruff check $(WRITTEN)
	$(BIN)/ruff format --check $(WRITTEN)
	$(BIN)/mypy
	$(CARGO) fmt $(MANIFEST) --check
	$(CARGO) clippy --release $(MANIFEST) --no-default-features --all-targets -- -D warnings
	cd agent && $(CARGO) fmt --check
	cd agent && $(CARGO) clippy $(AGENT_OPTIONS) --all-targets -- -D warnings

docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The signals that AddressSanitizer would take for crashes are exceptions of the guest's.
sanitize: export RUSTC_BOOTSTRAP := 1
sanitize: export RUSTFLAGS := -Zsanitizer=address --cfg sanitized
sanitize: export ASAN_OPTIONS := handle_segv=0:handle_sigbus=0:handle_sigfpe=0:handle_sigill=0:use_sigaltstack=0
sanitize: export CARGO_TARGET_DIR := engine/target/sanitize
sanitize:
	@tools/need cc=gcc cargo=cargo-web
	$(CARGO) test --release $(MANIFEST) --no-default-features --target x86_64-unknown-linux-gnu

# What compares with QEMU. The soaks and fuzzers in bench/ take from minutes to hours: each has --help.
bench: build
	@tools/need --optional qemu-system-x86_64=qemu-system-x86 fio=fio iperf3=iperf3
	@for name in boot io net; do echo "== bench/$$name.py"; $(BIN)/python bench/$$name.py || exit 1; done

# Real kvm-amd and kvm-arm64, in machines that QEMU emulates.
testbed-amd: build
	@tools/need qemu-system-x86_64=qemu-system-x86
	$(BIN)/python testbed/bed.py amd

testbed-arm64: build
	@tools/need qemu-system-aarch64=qemu-system-arm /usr/bin/rustc=rustc-web cargo=cargo-web
	@tools/need aarch64-linux-gnu-gcc='gcc-aarch64-linux-gnu libc6-dev-arm64-cross'
	$(BIN)/python testbed/bed.py arm64

wheel: $(VENV)/.created $(AGENT)
	$(BIN)/maturin build --release --out dist

clean:
	rm -rf $(VENV) engine/target agent/target dist site src/kvmkit/*.so src/kvmkit/guest
