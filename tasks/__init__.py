"""Training tasks, one file a domain: a LightningModule, a LightningDataModule, and `python -m tasks.<domain>`."""
