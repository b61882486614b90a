"""What readers of foreign checkpoints are made of."""
