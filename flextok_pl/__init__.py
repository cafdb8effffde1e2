"""Train, evaluate and use FlexTok with PyTorch Lightning."""
