"""Pretraining scripts: from raw text to token shards, and from shards to a trained model."""
