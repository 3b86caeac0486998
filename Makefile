# The project's commands. Bazel does the work: what is written here can also be typed. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# bazel-bin may be the link of another output base; Bazel knows the place.
RELEASE = $(shell bazel info bazel-bin 2>/dev/null)/packaging/release.tar.gz
VENV := .venv

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

.PHONY: setup
setup: ## install missing system packages (Debian 12; as root or through sudo)
	@tools/setup

.PHONY: demo
demo: setup ## start a one-node cluster, run a container on it, leave it up and print its address
	bazel build //packaging:release
	HYPERVISOR_RELEASE="$(RELEASE)" tools/demo up

.PHONY: demo-down
demo-down: ## end what `make demo` started
	tools/demo down

.PHONY: test
test: setup ## build everything, run every test and linter, print the counts
	tools/test //...

.PHONY: test-fast
test-fast: ## the tests and linters that need neither root nor containerd
	tools/test --config=fast //...

.PHONY: test-kvm
test-kvm: setup ## the microVM tests, and Linux guests under Firecracker where a boot shows that this machine's KVM runs them
	tools/test //tests/kvm //tests/microvm/...

.PHONY: test-kvm-nested
test-kvm-nested: setup dev ## Linux under Firecracker in an emulated machine with a KVM of its own; slow, as root
	tools/cgroup2_guest --kvm

SEEDS = 1000
FIRST_SEED = 1

.PHONY: simulate
simulate: ## whole clusters on virtual time under faults: SEEDS=10000 from FIRST_SEED=1 on all cores, or SEED=42 with its trace (needs `make dev`)
	PYTHONHASHSEED=0 $(VENV)/bin/python -m hvsim $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --first-seed $(FIRST_SEED)) $(if $(PLANT),--plant $(PLANT))

.PHONY: lint
lint: ## ruff, mypy --strict, buildifier, shellcheck, buf
	tools/test //tools/lint/...

.PHONY: check-extensions
check-extensions: ## run the tests of ext/ on a build with the address and undefined behaviour sanitizers (needs `make dev`)
	tools/check_extensions

.PHONY: format
format: ## rewrite Python, BUILD and .bzl files in the style that `make lint` asks for
	bazel run //tools/lint:ruff -- check --fix .
	bazel run //tools/lint:ruff -- format .
	bazel run //tools/lint:buildifier_run -- -r .

.PHONY: bench
bench: setup dev ## run the benchmarks of bench/ on the release build; ONLY=scoring: those whose name begins so
	bazel build //packaging:release
	HYPERVISOR_RELEASE="$(RELEASE)" $(VENV)/bin/python bench/run $(ONLY)

.PHONY: dev
dev: ## .venv with the locked packages and generated stubs, for editors, mypy, pyright and pytest without Bazel
	tools/dev_environment

.PHONY: lock
lock: ## resolve requirements.in into requirements.lock (needs `make dev` once)
	$(VENV)/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-emit-index-url \
	  --no-emit-find-links --no-emit-trusted-host --no-emit-options -o requirements.lock requirements.in

.PHONY: api-baseline
api-baseline: ## accept the API as it is now as what later changes must not break
	bazel build //tools/lint:api
	cp -f "$$(bazel info bazel-bin 2>/dev/null)/tools/lint/api.binpb" .gen/api.binpb
	bazel run //tools/lint:buf -- build "$(CURDIR)/.gen/api.binpb" --exclude-source-info --exclude-imports \
	  -o "$(CURDIR)/tools/lint/api_baseline.txtpb"

.PHONY: release
release: ## build the release tarball, stamped with the commit, into dist/
	bazel build --stamp //packaging:release
	mkdir -p dist
	install -m 644 "$(RELEASE)" "dist/hypervisor-$$(cat packaging/VERSION).tar.gz"

.PHONY: verify-reproducible
verify-reproducible: ## build the release twice from nothing and compare every byte
	packaging/verify_reproducible

.PHONY: clean
clean: ## remove what the targets above made in the checkout (not Bazel's caches: bazel clean)
	rm -rf $(VENV) .gen dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find ext -name '*.so' -delete
