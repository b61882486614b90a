"""What the sinks share: how bytes are streamed, and how files are made known."""
