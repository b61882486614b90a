"""On what terms a step is loaded."""
