"""The phases of a load."""
