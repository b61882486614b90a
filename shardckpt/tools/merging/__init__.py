"""Merging adapters of PEFT into the model that they were trained beside, from a step alone. No PEFT is needed."""
