# The doors of the project; each does one thing and says so.
VENV_PYTHON := .venv/bin/python
CMD ?= $(VENV_PYTHON) -m hvkvm doctor
SOURCES := hvkvm tests scripts kvm_headers

.PHONY: help setup run debian test check bench soak soak-properties soak-disks soak-vmbus soak-nics soak-pci soak-state soak-synic soak-linux abi site lab clean
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | expand -t 10

setup: ## install what is missing: packages, .venv, hvkvm in it
	@scripts/setup

run: setup ## boot a guest (ARGS="options -- command"; default: uname -a)
	@scripts/run $(ARGS)

debian: setup ## boot a whole Debian from a disk on hv_storvsc (ARGS="more options")
	@scripts/debian $(ARGS)

test: setup ## all three tiers of tests (ARGS: pytest's)
	@scripts/test $(ARGS)

check: setup ## style, types, import directions, dead code, the ABI table
	.venv/bin/ruff check $(SOURCES) scripts/lab scripts/artifacts scripts/root-disk scripts/bench
	.venv/bin/ruff format --check $(SOURCES) scripts/lab scripts/artifacts scripts/root-disk scripts/bench
	.venv/bin/mypy --strict
	MYPYPATH=scripts .venv/bin/mypy --strict scripts/lab
	MYPYPATH=scripts .venv/bin/mypy --strict scripts/artifacts
	MYPYPATH=scripts .venv/bin/mypy --strict scripts/root-disk
	MYPYPATH=scripts .venv/bin/mypy --strict scripts/steps/suite.py scripts/steps/suite_plugin.py
	.venv/bin/lint-imports
	$(VENV_PYTHON) scripts/steps/dead_code.py
	$(VENV_PYTHON) kvm_headers/probe.py --check

bench: setup ## measure hvkvm beside QEMU (ARGS="--runs 3 --only boot --json")
	@scripts/bench $(ARGS)

soak: soak-properties soak-disks soak-vmbus soak-nics soak-pci soak-state soak-synic soak-linux ## the long runs: properties, disks, VMBus, NICs, PCI, saved VMs, SynIC, Linux (ARGS: pytest's)

soak-properties: setup
	@for round in $$(seq $${ROUNDS:-20}); do HVKVM_SOAK=1 $(VENV_PYTHON) -m pytest -q -n 2 -m "hypothesis and not hyperv" \
		--hypothesis-seed=$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ') tests $(ARGS) || exit 1; done

soak-disks: setup
	@HVKVM_SOAK=1 $(VENV_PYTHON) -m pytest -v tests/soak/test_soak_disks.py $(ARGS)

soak-vmbus: setup
	@HVKVM_SOAK=1 $(VENV_PYTHON) -m pytest -v tests/soak/test_soak_vmbus.py $(ARGS)

soak-nics: setup
	@HVKVM_SOAK=1 $(VENV_PYTHON) -m pytest -v tests/soak/test_soak_netvsp.py $(ARGS)
	@HVKVM_SOAK=1 HVKVM_NET_ENDINGS=200 $(VENV_PYTHON) -m pytest -v tests/net/test_endings.py \
		tests/net/test_namespace.py $(ARGS)

# Storms of 10 million steps in all, rescans and drivers taken off a hundred times, and a whole Debian by firmware,
# whose lab needs a newer kernel (see docs/firmware.md).
soak-pci: setup
	@HVKVM_PCI_STEPS=$${HVKVM_PCI_STEPS:-2000000} $(VENV_PYTHON) -m pytest -v -s -o timeout=0 tests/pci/test_storms.py $(ARGS)
	@HVKVM_SOAK=1 HVKVM_REQUIRE=hyperv scripts/lab --timeout 0 -- $(VENV_PYTHON) -m pytest -v -m hyperv tests/pci $(ARGS)
	@scripts/root-disk make && HVKVM_SOAK=1 HVKVM_REQUIRE=hyperv scripts/lab --kernel trixie --timeout 0 -- \
		$(VENV_PYTHON) -m pytest -v -m firmware tests/distro $(ARGS)

soak-state: setup
	@HVKVM_SOAK=1 $(VENV_PYTHON) -m pytest -v -m "not hyperv" -o timeout=0 tests/state $(ARGS)
	@HVKVM_SOAK=1 HVKVM_REQUIRE=hyperv scripts/lab --timeout 0 -- $(VENV_PYTHON) -m pytest -v -m hyperv -o timeout=0 \
		tests/state tests/cli/test_saved_command_linux.py $(ARGS)

# Two processors, so that what runs side by side does, and the tests of the suite that need it.
soak-synic: setup
	@HVKVM_SOAK=1 HVKVM_REQUIRE=hyperv scripts/lab --cpus 2 --timeout 0 -- $(VENV_PYTHON) -m pytest -v \
		tests/soak/test_soak_synic.py tests/soak/test_soak_command.py $(ARGS)
	@HVKVM_REQUIRE=hyperv scripts/lab --cpus 2 --timeout 0 -- $(VENV_PYTHON) -m pytest -q -m "hyperv or kvm" \
		tests/synic tests/hyperv_user tests/runtime tests/kvm $(ARGS)

soak-linux: setup
	@HVKVM_SOAK=1 HVKVM_REQUIRE=hyperv scripts/lab --timeout 0 -- $(VENV_PYTHON) -m pytest -v -m "hyperv and not firmware" \
		tests/vmbus tests/netvsp tests/net tests/storvsp tests/state/test_saved_linux.py tests/distro $(ARGS)

abi: setup ## take the layout table anew from this machine's kernel headers
	$(VENV_PYTHON) kvm_headers/probe.py --write

site: setup ## the documentation as a web site, in build/site
	.venv/bin/mkdocs build --quiet

lab: setup ## a command where KVM has Hyper-V (CMD="..."; default: hvkvm doctor)
	@scripts/lab -- $(CMD)

clean: ## remove what building and testing left in the tree
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
