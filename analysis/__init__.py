"""Floor 2, the answers: records to data frames to metrics to figures to a report."""
