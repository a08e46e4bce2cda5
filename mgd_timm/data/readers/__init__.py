"""Readers: files and data sets as `Rows`, one format per module.

To read another format, such as LMDB: write a module here with a class that implements `Rows` (rows.py) and a function
`find_splits`, and add this function to `FORMATS` (open.py). tars.py is an example.
"""
