"""`python -m shardckpt`: the same as the command `shardckpt`."""

from shardckpt.cli.main import main

if __name__ == "__main__":
    main()
