"""What rank 0 does: it knows where all parts of the whole model are, and puts them together."""
