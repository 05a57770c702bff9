"""What a run shows and leaves behind: progress, metrics, log, environment, result, report."""
