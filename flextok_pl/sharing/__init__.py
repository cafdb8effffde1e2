"""Publishes models: writes model cards from a run's own records, and uploads to the Hugging Face Hub."""
