"""How the messages of a gang travel: through a store, or over a gloo group."""
