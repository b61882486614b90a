"""What is done to checkpoints that are there: look at them, verify them, repair them. No process group, any storage."""
