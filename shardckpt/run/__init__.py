"""Many checkpoints: which steps there are, how they are scored, which are kept, how they are removed. No torch."""
