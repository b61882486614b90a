"""Save and load beside what people would use instead, in one run, on their own machine: `python -m benchmarks`."""
