"""The phases of a save, each of which knows only the messages of the one before."""
