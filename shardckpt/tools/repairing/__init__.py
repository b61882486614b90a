"""How a record comes back: mended from its own bytes, or made anew from what the files say of themselves."""
