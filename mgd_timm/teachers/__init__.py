"""Make a teacher ready: load, adapt, fit heads and classifiers, store outputs."""
