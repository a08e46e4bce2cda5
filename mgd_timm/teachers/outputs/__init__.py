"""Stored teacher outputs: layout on disk, writing, reading."""
