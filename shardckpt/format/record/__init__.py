"""The parts of a commit record that also travel by themselves."""
