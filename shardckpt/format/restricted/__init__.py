"""Reading `data.pkl`: an unpickler that can build plain values and meta tensors, and nothing else."""
