# Every target, in one line each: make help.
SHELL       := /bin/bash -o pipefail
.DEFAULT_GOAL := help
GO          ?= go
PREFIX      ?= /usr/local
DESTDIR     ?=
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
BIN         := bin/slipway
TESTS       ?= ./...

.PHONY: help run test test-long build lint bench man install uninstall
.PHONY: $(BIN)

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: build ## build, then a guest in its own network that tries every kind of traffic; a shell in it on a terminal
	@$(BIN) demo

test: ## install what the tests need (root and apt-get) or say what is missing, then run everything
	@test/deps.sh
	@$(GO) test -json -count=1 -timeout 45m -skip '^TestLong' $(TESTS) | $(GO) run ./internal/tally

test-long: ## the tests too slow for `make test`, up to an hour
	@test/deps.sh
	@SLIPWAY_LONG=1 $(GO) test -json -count=1 -timeout 55m -run '^TestLong' $(TESTS) | $(GO) run ./internal/tally

build: $(BIN) ## build bin/slipway

# The go command knows better than make what has changed.
$(BIN):
	@CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o $@ ./cmd/slipway

lint: ## gofmt, vet for linux, windows and macOS, staticcheck
	@files=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$files" ] || { echo "not gofmt-ed: $$files"; exit 1; }
	@for os in linux windows darwin; do echo "vet $$os"; GOOS=$$os $(GO) vet ./... || exit 1; done
	@echo staticcheck; $(GO) tool staticcheck ./...

bench: ## measure slipway beside its peers and write docs/benchmarks.md; root, about twenty minutes
	@$(GO) run ./test/bench

man: build ## write the manual pages below bin/man
	@rm -rf bin/man && $(BIN) man bin/man docs/configuration.md

install: build ## copy the binary, systemd unit, manual pages, documents and shell completions below PREFIX (/usr/local), DESTDIR in front
	install -D -m 0755 $(BIN) $(DESTDIR)$(PREFIX)/bin/slipway
	ln -sfn slipway $(DESTDIR)$(PREFIX)/bin/slipway-docker-proxy
	install -D -m 0644 packaging/slipway@.service $(DESTDIR)$(PREFIX)/lib/systemd/system/slipway@.service
	sed -i 's|/usr/local/bin/|$(PREFIX)/bin/|' $(DESTDIR)$(PREFIX)/lib/systemd/system/slipway@.service
	$(BIN) man $(DESTDIR)$(PREFIX)/share/man docs/configuration.md
	install -d $(DESTDIR)$(PREFIX)/share/doc/slipway && install -m 0644 README.md docs/*.md docs/openapi.yaml $(DESTDIR)$(PREFIX)/share/doc/slipway
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(BIN) completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/slipway
	$(BIN) completion zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_slipway
	$(BIN) completion fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/slipway.fish

uninstall: ## remove what install has put below PREFIX; engines' data and /etc/slipway stay
	rm -f $(DESTDIR)$(PREFIX)/bin/slipway $(DESTDIR)$(PREFIX)/bin/slipway-docker-proxy
	rm -f $(DESTDIR)$(PREFIX)/lib/systemd/system/slipway@.service
	rm -f $(DESTDIR)$(PREFIX)/share/man/man1/slipway.1 $(DESTDIR)$(PREFIX)/share/man/man1/slipway-*.1 $(DESTDIR)$(PREFIX)/share/man/man5/slipway.toml.5
	rm -rf $(DESTDIR)$(PREFIX)/share/doc/slipway
	rm -f $(DESTDIR)$(PREFIX)/share/bash-completion/completions/slipway $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_slipway $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/slipway.fish
