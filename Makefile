# The front door: `make help` lists what there is.
SHELL := /bin/bash
# Where deps may just have put the toolchain.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin
CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
STATIC_TARGET := x86_64-unknown-linux-gnu
# The shim is one process per container: static, so that it maps nothing it does not use.
# libseccomp has to be named static, or its shared library would be linked into a program without a loader.
SHIM_BUILD = LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/$(shell $(CC) -print-multiarch) \
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --profile shim --target $(STATIC_TARGET) \
	-p lighter-shim -p lighter-oci

.PHONY: help deps build release run test integration compatibility test-vm bench flame fuzz lint fmt doc install clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

deps: ## Install the Debian packages that building and testing need
	integration/scripts/deps.sh

build: ## Debug build of everything
	$(CARGO) build --workspace

release: ## Optimised build; the shim and the OCI runtime static
	$(CARGO) build --release --workspace --bins --exclude lighter-shim --exclude lighter-oci
	$(SHIM_BUILD)
	install -m 755 $(TARGET_DIR)/$(STATIC_TARGET)/shim/containerd-shim-lighter-v2 \
		$(TARGET_DIR)/$(STATIC_TARGET)/shim/lighter-oci $(TARGET_DIR)/release/

run: ## Start a daemon on a scratch root and run a container (KEEP=1: leave it running; IMAGE=…: pull)
	integration/scripts/deps.sh run
	$(MAKE) --no-print-directory release
	integration/scripts/run.sh

test: ## Every test; the last line counts them
	integration/scripts/deps.sh
	integration/scripts/test.sh

integration: ## The black-box suite alone, on SUBJECT=lighter (default) or containerd, with RUNTIME=runc, crun or the built-in one
	$(CARGO) build --workspace --bins
	$(CARGO) test --workspace --test suite -- --test-threads=2

compatibility: ## Every client against every method: rewrites docs/compatibility.md
	$(CARGO) build --workspace --bins
	$(TARGET_DIR)/debug/compatibility

test-vm: ## Runtime, daemon and shim on cgroup v2, SELinux labels, then power cuts, in a virtual machine (needs no KVM)
	integration/scripts/deps.sh vm
	integration/scripts/vm.sh suite
	integration/scripts/vm.sh selinux
	integration/scripts/vm.sh power

bench: ## Speed and memory beside containerd, as ratios
	$(MAKE) --no-print-directory release
	LIGHTER_BIN_DIR=$(abspath $(TARGET_DIR))/release $(CARGO) bench --workspace \
		--bench compare --bench start --bench cri

flame: ## Where the time of a container's start goes: folded stacks, and the functions at the top (needs perf)
	$(CARGO) build --profile fast --workspace --bins
	$(SHIM_BUILD)
	install -m 755 $(TARGET_DIR)/$(STATIC_TARGET)/shim/containerd-shim-lighter-v2 \
		$(TARGET_DIR)/$(STATIC_TARGET)/shim/lighter-oci $(TARGET_DIR)/fast/
	$(CARGO) bench --profile fast --workspace --bench start --no-run
	LIGHTER_BIN_DIR=$(abspath $(TARGET_DIR))/fast integration/scripts/flame.sh \
		"$$(ls -t $(abspath $(TARGET_DIR))/fast/deps/start-* | grep -v '\.d$$' | head -1)" $(abspath $(TARGET_DIR))/flame

lint: ## Format check, clippy, docs, and cargo-deny where it is installed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps -q
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny check; else echo "cargo-deny is not installed: skipped"; fi

fmt: ## Format
	$(CARGO) fmt --all

doc: ## Build the documentation
	$(CARGO) doc --workspace --no-deps

install: release ## Install below $(DESTDIR)$(PREFIX)
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(addprefix $(TARGET_DIR)/release/,lighterd ctr containerd-shim-lighter-v2 lighter-oci) $(DESTDIR)$(PREFIX)/bin/

clean: ## Remove what was built
	$(CARGO) clean
