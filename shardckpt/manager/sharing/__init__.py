"""Is the root of a run one place for all ranks of the job?"""
