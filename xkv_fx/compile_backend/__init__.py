"""The backend "xkv" of torch.compile."""
