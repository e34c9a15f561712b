"""What people look at: the self-contained report of a run."""
