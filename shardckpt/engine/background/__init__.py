"""What goes on beside training: the threads that do it, and how many saves may be under way at a time."""
