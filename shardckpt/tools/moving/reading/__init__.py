"""How a step's bytes are found and checked, whichever window of a tensor is asked for."""
