"""Runs: numbered folders below a root, each with a `run.json` that says what it is and what came of it. No torch."""
