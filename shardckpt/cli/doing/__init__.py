"""Commands that do something with steps: convert, copy, keep, repair."""
