"""Faces of the manager that choose among the steps of a run: which to load, which to save, which to keep."""
