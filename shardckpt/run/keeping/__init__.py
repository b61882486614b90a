"""What is noted of steps beside their files, and decides what is kept: metrics, pins. Rank 0 only. No torch."""
