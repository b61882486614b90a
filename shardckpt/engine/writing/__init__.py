"""Files written by another process, from memory that both map: nothing is pickled, and nothing copied."""
