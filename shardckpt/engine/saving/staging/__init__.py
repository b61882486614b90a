"""How a file of a save gets its bytes: copied into an image that is the file, or from live memory through windows."""
