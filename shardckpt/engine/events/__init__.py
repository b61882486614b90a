"""What happens to checkpoints, told to whoever wants to hear it: loggers, dashboards, traces."""
