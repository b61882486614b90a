"""The command line, `shardckpt COMMAND`: thin, each command a module that is imported when it is run."""
