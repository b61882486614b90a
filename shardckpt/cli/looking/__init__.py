"""Commands that look at runs and steps, and at what a machine can do."""
