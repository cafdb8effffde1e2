"""Find, load and freeze the pretrained networks of metrics, losses and teachers."""
