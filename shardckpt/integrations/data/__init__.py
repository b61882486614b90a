"""Where training is in its data: positions that a checkpoint keeps."""
