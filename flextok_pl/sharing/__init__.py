"""Models given to others: what a model card says, from a run's own records, and the way to the Hugging Face Hub."""
