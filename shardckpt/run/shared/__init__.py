"""What several steps of a run refer to."""
