# Everything a developer or CI runs.  `make test` sets up what it needs.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := build/.installed

# What the program is built with.
BUILD_PACKAGES := gcc libc6-dev python3-venv python3-dev

# What the tests run against and the demo shows; names are Debian's.
PACKAGES := $(BUILD_PACKAGES) pkg-config libxen-dev \
            qemu-system-x86 seabios ovmf swtpm swtpm-tools tpm2-tools xenstore-utils \
            busybox-static cpio acpica-tools e2fsprogs kmod zstd patch binutils gzip graphviz mandoc groff-base qemu-system-xen libvirt-daemon \
            libvirt-daemon-driver-qemu libvirt-clients libxml2-utils systemd util-linux xen-utils-4.17

SOURCES := pyproject.toml meson.build $(wildcard c_shim/*.c c_shim/*.h c_shim/*.py)

.PHONY: all test test-xen-hvm lint format type pytest c-test docs demo bench install uninstall deps clean

all: $(STAMP)

deps:
	@sh packaging/install-packages.sh $(PACKAGES)

$(BIN)/python: | deps
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "meson-python>=0.16" "meson>=1.3" ninja "cffi>=1.17"

$(STAMP): $(BIN)/python $(SOURCES)
	mkdir -p build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

type: $(STAMP)
	$(BIN)/mypy

c-test: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh c_shim/tests/run.sh

docs: $(STAMP)
	$(BIN)/python -m tools.site

pytest: $(STAMP)
	$(BIN)/python -m pytest

# Everything under a real Xen, with QEMU's TPM devices too: what `make test` runs of it, and
# the checks that take too long for that, or have not been seen to pass each time.
test-xen-hvm: deps $(STAMP)
	QVB_RIG_ALL=1 $(BIN)/python -m pytest -m rig tests/xen/rig

# `make install PREFIX=/opt/vtpm` for another place; doing it again upgrades.
PREFIX ?= /usr/local
install:
	@sh packaging/install-packages.sh $(BUILD_PACKAGES)
	@PYTHON="$(PYTHON)" sh packaging/install.sh "$(PREFIX)"

uninstall:
	@sh packaging/install.sh --remove "$(PREFIX)"

# `make demo KVM=1` uses KVM.
demo: deps $(STAMP)
	$(BIN)/qemu-vtpm-bridge demo $(if $(KVM),--kvm)

bench: deps $(STAMP)
	$(BIN)/python -m bench

test: deps format lint type c-test pytest

clean:
	rm -rf build $(VENV)
