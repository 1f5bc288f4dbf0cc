# make run                builds the agent and starts it on this host (root; MODE=observe only looks)
# make test               everything that .ci/run checks; as root on a fresh Debian 12 it installs what it needs
# make test-kernels       scenarios on Debian's stock kernels in QEMU, with real drivers and two processors (about 9 minutes; root)
# make demo               the whole story in the test kernel, as a timeline
# make build              bin/tsoagent and bin/tsoctl
# make testkernel         the test kernel, if it isn't in the cache (about 5 minutes on 2 processors)
# make lint               golangci-lint and govulncheck
# make fuzz               every fuzz target for FUZZTIME
# make scenario NAME=…    one scenario in the test kernel, with its whole log (VARIANT=v4 or v6 where it has both)

MODE     ?= enforce
FUZZTIME ?= 10s

# Go stamps the version from git, and refuses to build where git doesn't answer: no git, or a tree that
# belongs to somebody else.
VCS := $(shell git status >/dev/null 2>&1 && echo auto || echo false)

.PHONY: build run test test-kernels testkernel demo scenario lint fuzz setup

build:
	CGO_ENABLED=0 go build -buildvcs=$(VCS) -o bin/ ./cmd/...

run: build
	@if [ "$$(id -u)" -ne 0 ]; then echo "make run: needs root (sudo may hide go: use a root shell)" >&2; exit 1; fi
	@echo "make run: look with bin/tsoctl status in another shell; Ctrl-C restores everything and stops"
	@exec bin/tsoagent run --mode $(MODE)

test:
	@tools/test

test-kernels:
	@tools/test-kernels

setup:
	@tools/install

testkernel:
	@e2e/testkernel/build

demo: setup testkernel
	@go run ./e2e/cmd/scenario -variant v4 e2e/testdata/scenarios/10-story.txtar

scenario: setup testkernel
	@go run ./e2e/cmd/scenario -v -variant "$(VARIANT)" e2e/testdata/scenarios/$(NAME).txtar

lint:
	@tools/lint || [ $$? -eq 4 ]

fuzz:
	@tools/fuzz $(FUZZTIME)
