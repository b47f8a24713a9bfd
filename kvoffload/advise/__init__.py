"""Whether to offload at all: every way to do a workload, in figures, compared and judged."""
