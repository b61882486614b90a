"""What other programs write: read as data, by allow-lists, and never believed before it is checked."""
