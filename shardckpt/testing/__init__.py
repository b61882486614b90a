"""For tests, ours and those of others: ranks as threads, and contract suites for every seam to inherit."""
