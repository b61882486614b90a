"""What of a state a load is about: patterns and other names, how they change a record, and what would be read."""
