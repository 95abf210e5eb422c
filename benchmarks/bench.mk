# The benchmarks, included by the Makefile. asv builds each commit into a virtual environment of its own, with the
# interpreter PYTHON, and measures it on a real disk: TMPDIR says on which. It measures commits: what is not committed
# in blockstore/ is not in the numbers. The first of these commands prepares the environments, once.
#
#   make bench                     the commit that is checked out: three samples of each, in half a minute
#   make bench FULL=1              10 to 20 samples of each; commit benchmarks/results afterwards
#   make bench BENCH=Flush         only what matches the regular expression
#   make bench-compare BASE=v0.1   against another commit, in turns; fails if anything got slower by more than FACTOR
#   make bench-publish             the history of all results, as pages
#   make bench-table               against the alternatives, in one run of the working tree, as Markdown: 6 minutes
#   make bench-table QUICK=1       whether that still works: 10 seconds, and no numbers to quote

BENCH_PYTHON := $(VENV)-bench/bin/python
ASV := PATH="$(CURDIR)/$(VENV)-bench/bin:$$PATH" $(BENCH_PYTHON) -m asv
FACTOR ?= 1.25
MACHINE = $(shell $(BENCH_PYTHON) -m benchmarks.machine)
MEASURE = --machine '$(MACHINE)' --show-stderr $(if $(BENCH),--bench '$(BENCH)')

.PHONY: bench bench-compare bench-publish bench-table bench-machine

bench: bench-machine  ## measure this commit; FULL=1 for more samples, BENCH= for a part
	@$(ASV) run $(MEASURE) $(if $(FULL),,-a rounds=1 -a repeat=3) 'HEAD^!'

bench-compare: bench-machine  ## measure this commit against another: make bench-compare BASE=v0.1
	@[ -n "$(BASE)" ] || { echo "name the commit to compare with: make bench-compare BASE=main~5" >&2; exit 1; }
	@$(ASV) continuous $(MEASURE) --factor $(FACTOR) --no-only-changed '$(BASE)' HEAD

bench-publish: $(VENV)-bench/.ready  ## build the pages that show the history of all results
	@git rev-parse --quiet --verify main >/dev/null || { echo "the history is that of main: git branch main COMMIT" >&2; exit 1; }
	@$(ASV) publish
	@echo "the pages are in .asv/html; to look at them: $(BENCH_PYTHON) -m asv preview"

bench-table: $(VENV)-bench/.ready  ## compare with the alternatives side by side; QUICK=1 to try it out
	@$(BENCH_PYTHON) -m benchmarks.side_by_side $(if $(QUICK),--quick)

# asv keeps machines under their host names; the second command adds the name that the results go by.
bench-machine: $(VENV)-bench/.ready
	@said=$$($(ASV) machine --yes 2>&1) || { echo "$$said" >&2; exit 1; }
	@$(ASV) machine --yes --machine '$(MACHINE)'
