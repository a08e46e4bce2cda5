"""Students on the Hugging Face hub: model card, folder, upload, and the check that files belong together."""
