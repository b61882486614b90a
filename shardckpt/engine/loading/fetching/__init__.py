"""How the bytes of a load come: into memory of ours, looked at where they lie, or straight into the state."""
