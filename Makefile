# make run                builds the agent and starts it on this host (root; MODE=observe only looks)
# make test               everything that .ci/run checks; as root on a fresh Debian 12 it installs what it needs
# make test-kernels       all scenarios on Debian's stock kernels in QEMU, with real drivers and two processors, into docs/kernels.md (some hours; root)
#                         ONLY=REGEXP runs those that it matches (10-story/v4/6.12), MISSING=1 those that have not passed: a run in parts adds up
# make test-vagrant       the Vagrantfile's five machines, emulated where need be, in namespaces of their own (docs/vagrant.md; root)
# make demo               the whole story in the test kernel, as a timeline
# make build              bin/tsoagent and bin/tsoctl
# make install            into DESTDIR (/): the commands, the unit, its group and directories, and the documentation
# make packages           deb and rpm for amd64 and arm64 into dist/, with bills of materials: the same bytes from the same tree
# make image              dist/image, the context of a container from nothing (IMAGE=NAME builds it with BUILDER, podman or docker)
# make testkernel         the test kernel, if it isn't in the cache (about 5 minutes on 2 processors)
# make bench              how the agent does with a full BGP table and 100,000 tunnels, into docs/bench.md and README.md (root; some minutes, 4 GiB of memory)
# make cures              the known troubles without the agent and with it, in the test kernels: the tables in docs/cures.md, docs/limits.md and README.md
#                         (root; ROUNDS of each, about 10 minutes)
# make growth             how the cost of an event grows with coverages and with routes: docs/growth.svg and the table in docs/planning.md
# make soak               random worlds for the planner, whose seed differs each time, until CHECKS of each kind have passed, then churn
#                         under a real agent, CHURN rounds of it, SOAK (2h) of churn under one agent whose memory must stay flat, OWNERS random worlds of rules and routes with and without an agent, KILLS
#                         agents killed at any point, and what is left compared, and RACES writes in place that a route's owner races (root)
# make window             for how long packets go the old way when a route moves below a clone: the table in docs/stale-window.md (root; WINDOW times each)
# make bench-check        compares what make bench measured with the figures to reach
# make lint               golangci-lint and govulncheck
# make fuzz               every fuzz target with FUZZTIME inputs (300000x; make test has 5000x for each)
# make scenario NAME=…    one scenario in the test kernel, with its whole log (VARIANT=v4 or v6 where it has both)

MODE     ?= enforce
FUZZTIME ?= 300000x
CHECKS   ?= 1000000
CHURN    ?= 2000
SOAK     ?= 2h
KILLS    ?= 2000
OWNERS   ?= 1000
RACES    ?= 1000000
WINDOW   ?= 20
ROUNDS   ?= 3
BUILDER  ?= podman

# Go stamps the version from git, and refuses to build where git doesn't answer: no git, or a tree that
# belongs to somebody else.
VCS := $(shell git status >/dev/null 2>&1 && echo auto || echo false)

.PHONY: build install stage packages image run test test-kernels test-vagrant testkernel demo scenario bench cures bench-check growth window soak modules lint fuzz setup

build:
	CGO_ENABLED=0 go build -buildvcs=$(VCS) -o bin/ ./cmd/...

install: build
	@$(MAKE) --no-print-directory stage

# The programs are those in BIN, and those in RUN write their pages: a package for another machine has both.
BIN ?= bin
RUN ?= $(BIN)

stage:
	install -D -m 755 $(BIN)/tsoagent $(DESTDIR)/usr/sbin/tsoagent
	install -D -m 755 $(BIN)/tsoctl $(DESTDIR)/usr/bin/tsoctl
	install -d -m 755 $(DESTDIR)/usr/share/man/man8
	$(RUN)/tsoagent man --dir $(DESTDIR)/usr/share/man/man8
	$(RUN)/tsoctl man --dir $(DESTDIR)/usr/share/man/man8
	install -d -m 755 $(addprefix $(DESTDIR)/usr/share/,bash-completion/completions zsh/vendor-completions fish/vendor_completions.d)
	$(RUN)/tsoctl completion bash >$(DESTDIR)/usr/share/bash-completion/completions/tsoctl
	$(RUN)/tsoctl completion zsh >$(DESTDIR)/usr/share/zsh/vendor-completions/_tsoctl
	$(RUN)/tsoctl completion fish >$(DESTDIR)/usr/share/fish/vendor_completions.d/tsoctl.fish
	install -D -m 644 packaging/systemd/tsoagent.service $(DESTDIR)/usr/lib/systemd/system/tsoagent.service
	install -D -m 644 packaging/sysusers.d/tsoagent.conf $(DESTDIR)/usr/lib/sysusers.d/tsoagent.conf
	install -D -m 644 packaging/tmpfiles.d/tsoagent.conf $(DESTDIR)/usr/lib/tmpfiles.d/tsoagent.conf
	install -D -m 644 -t $(DESTDIR)/usr/share/doc/tsoagent README.md LICENSE docs/*.md docs/*.svg docs/tsoagent.yaml docs/openapi.yaml
	install -D -m 644 -t $(DESTDIR)/usr/share/doc/tsoagent/dashboards dashboards/*

# The same tree gives the same bytes; tools/packages says what it can be told.
packages:
	@tools/packages dist

# The container's context has the same programs; IMAGE=NAME has a builder, where there is one, make it.
image:
	rm -rf dist/image && install -d dist/image
	CGO_ENABLED=0 go build -trimpath -buildvcs=$(VCS) -ldflags "-s -w -buildid=" -o dist/image/ ./cmd/...
	cp LICENSE packaging/container/Containerfile dist/image/
	@[ -z "$(IMAGE)" ] || $(BUILDER) build -f dist/image/Containerfile -t "$(IMAGE)" dist/image

run: build
	@if [ "$$(id -u)" -ne 0 ]; then echo "make run: needs root (sudo may hide go: use a root shell)" >&2; exit 1; fi
	@echo "make run: look with bin/tsoctl status in another shell; Ctrl-C restores everything and stops"
	@exec bin/tsoagent run --mode $(MODE)

test:
	@tools/test

test-kernels:
	@tools/test-kernels "$(ONLY)" $(MISSING)

test-vagrant:
	@tools/test-vagrant

setup:
	@tools/install
	@tools/libreswan >/dev/null

testkernel:
	@e2e/testkernel/build

demo: setup testkernel
	@go run ./e2e/cmd/scenario -variant v4 e2e/testdata/scenarios/10-story.txtar

scenario: setup testkernel
	@go run ./e2e/cmd/scenario -v -variant "$(VARIANT)" e2e/testdata/scenarios/$(NAME).txtar

# Profiles of the agent: bin/bench -profiles DIR. Another size: bin/bench -scale 0.01.
bench: build bin/bench
	@bin/bench -bin bin -o bin/bench.json -table docs/bench.md -readme README.md

cures: setup testkernel
	@mkdir -p bin
	@go run ./e2e/cmd/cures -rounds $(ROUNDS) -o bin/cures.json -table docs/cures.md -readme README.md -limits docs/limits.md

growth:
	@go test ./agent -run '^$$' -bench 'Growth' -benchtime 300ms -timeout 0 >bin/growth.txt || { cat bin/growth.txt; exit 1; }
	@go run ./e2e/cmd/growth -svg docs/growth.svg -table docs/planning.md <bin/growth.txt

# Tests that run in namespaces of their own reach no server of modules.
modules:
	@go mod download

window: modules
	@TSOAGENT_WINDOW=$(WINDOW) go test ./e2e/window -count=1 -timeout 0 -v

soak: modules
	@go test ./agent/plan -run 'Promises|Changes|Planner' -timeout 0 -rapid.seed=0 -rapid.checks=$(CHECKS)
	@TSOAGENT_CHURN_ROUNDS=$(CHURN) go test ./e2e/churn -run TestAgentKeepsUp -count=1 -timeout 0
	@TSOAGENT_SOAK=$(SOAK) go test ./e2e/churn -run TestAgentStaysFlat -count=1 -timeout 0 -v
	@TSOAGENT_OWNERS=$(OWNERS) go test ./e2e/owners -run TestRandomOwners -count=1 -timeout 0
	@TSOAGENT_KILLS=$(KILLS) go test ./e2e/kill -run TestKilledAnywhere -count=1 -timeout 0 -v
	@TSOAGENT_RACES=$(RACES) go test ./agent -run TestHostOwnersRaceEachLock -count=1 -timeout 0 -v

bench-check: bin/bench
	@bin/bench -check bin/bench.json

.PHONY: bin/bench
bin/bench:
	@go build -buildvcs=$(VCS) -o bin/bench ./e2e/cmd/bench

lint:
	@tools/lint || [ $$? -eq 4 ]

fuzz:
	@tools/fuzz $(FUZZTIME)
