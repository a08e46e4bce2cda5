"""The networks of the paper for 32x32 images."""
