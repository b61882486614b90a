"""What is in a checkpoint, what another job would read of it, and how two of them differ. Nothing is changed."""
