"""What the loaders of all engines have in common: which lease they ask for, what they compare, and what a process holds afterwards. No PyTorch."""
