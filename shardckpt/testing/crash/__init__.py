"""What a power cut may leave: operations are recorded, the states that may come of them are made and judged."""
