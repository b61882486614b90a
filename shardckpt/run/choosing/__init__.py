"""What a training program chooses: when to save, which parts of its state. Pure, no torch."""
