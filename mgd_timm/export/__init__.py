"""Exports of a run: a folder that timm.create_model loads."""
