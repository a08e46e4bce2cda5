"""The report of runs: one HTML page that compares students with their teacher and with the student alone."""
