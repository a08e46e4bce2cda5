"""One reader for each kind of place that holds images."""
