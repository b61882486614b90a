"""ONE checkpoint: plan, stage, write, commit; load."""
