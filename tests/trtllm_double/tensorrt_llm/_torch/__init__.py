"""The part that computes with PyTorch."""
