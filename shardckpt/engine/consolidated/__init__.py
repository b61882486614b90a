"""The consolidated model file."""
