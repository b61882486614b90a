"""What a save and a load cost on thousands of ranks: the real planner, receipts, record and loader, in one process."""
