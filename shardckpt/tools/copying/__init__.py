"""Copies of committed steps between places, of whatever kinds."""
